"""What SGLang does in another way on a plain CPU: functions that have a Triton kernel and no other, and processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType
from torch import Tensor

PROBE_LIMIT = 3.0  # seconds; where it works it takes hundredths


def fork_processes(result: None, server_args: Any) -> None:
    """Let scheduler and detokenizer be forked: spawned, each imports SGLang anew, which takes a small CPU a minute."""
    probe = multiprocessing.get_context("fork").Process(target=_use_all_threads)
    probe.start()
    probe.join(PROBE_LIMIT)
    if probe.is_alive():  # GNU's OpenMP hangs in a fork of a process where it has had threads
        probe.kill()
    else:
        multiprocessing.set_start_method("fork", force=True)


def _use_all_threads() -> None:
    torch.ones(1 << 20).sum()


def last_slots(req_to_token: Tensor, req_pool_indices: Tensor, lens: Tensor) -> Tensor:
    """The slot of each request's last token [bs], -1 where it has none: a page is filled up from there."""
    last = req_to_token[req_pool_indices, (lens - 1).clamp(min=0)].to(lens.dtype)
    return torch.where(lens > 0, last, -1)


def device_module(original: Callable[[Any], Any], device: Any = None) -> Any:
    """Torch's module of the device in use, where none is named: a torch built for CUDA says torch.cuda without a GPU
    too, and SGLang waits for that device when memory is released.
    """
    return original("cpu" if device is None else device)


def pin_memory(original: Callable[..., Tensor], tensor: Tensor, *device: Any) -> Tensor:
    """All memory is where it is needed: SGLang pins what it copies to a device, in places without asking for one."""
    return tensor


HOOKS: dict[str, tuple[Callable[..., Any], HookType]] = {
    "sglang.srt.mem_cache.allocation.get_last_loc": (last_slots, HookType.REPLACE),
    "sglang.srt.entrypoints.engine._set_envs_and_config": (fork_processes, HookType.AFTER),
    "torch.get_device_module": (device_module, HookType.AROUND),
    "torch.Tensor.pin_memory": (pin_memory, HookType.AROUND),
}
