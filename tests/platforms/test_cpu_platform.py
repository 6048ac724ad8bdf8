"""Where the plain-CPU platform is active, and what it tells SGLang."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.plugins.hook_registry import HookType

from sglang_dflash.platforms import PLAIN_ATTENTION, cpu
from sglang_dflash.platforms.cpu.hooks import HOOKS


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_USE_CPU_ENGINE", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


def on_machine_with(accelerator: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)


def test_a_device_that_nobody_names_is_the_cpu() -> None:
    """Torch built for CUDA names torch.cuda, whose calls need a driver."""
    hook, kind = HOOKS["torch.get_device_module"]
    assert kind == HookType.AROUND
    assert hook(torch.get_device_module) is torch.cpu
    assert hook(torch.get_device_module, "cuda") is torch.cuda


def test_no_memory_is_pinned() -> None:
    """Torch built for CUDA asks a driver for it."""
    hook, kind = HOOKS["torch.Tensor.pin_memory"]
    tensor = torch.ones(2)
    assert kind == HookType.AROUND and hook(torch.Tensor.pin_memory, tensor) is tensor


def test_active_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine_with(None, monkeypatch)
    assert cpu.activate() == "sglang_dflash.platforms.cpu.platform.PlainCpuPlatform"


@pytest.mark.parametrize("accelerator", ["cuda", "xpu", "mps"])
def test_stands_aside_for_an_accelerator(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine_with(accelerator, monkeypatch)
    assert cpu.activate() is None


def test_stands_aside_for_sglangs_own_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine_with(None, monkeypatch)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert cpu.activate() is None


def server_args(**given: object) -> SimpleNamespace:
    unset = dict.fromkeys(("mem_fraction_static", "max_total_tokens", "max_running_requests", "chunked_prefill_size"))
    defaults = {"attention_backend": "intel_amx", "dtype": "auto", "sleep_on_idle": False, "tp_size": 1, "dp_size": 1}
    return SimpleNamespace(**(unset | defaults | given))


def test_defaults_fill_only_what_was_not_given() -> None:
    from sglang_dflash.platforms.cpu.platform import PlainCpuPlatform

    args = server_args()
    PlainCpuPlatform().apply_server_args_defaults(args)
    assert (args.attention_backend, args.dtype) == (PLAIN_ATTENTION, "float32")
    # SGLang takes a limit on tokens for the user's and warns where the memory holds less.
    assert [name for name, value in vars(args).items() if value is None] == ["max_total_tokens"]

    given = server_args(attention_backend="torch_native", dtype="bfloat16", max_total_tokens=7)
    PlainCpuPlatform().apply_server_args_defaults(given)
    assert (given.attention_backend, given.dtype, given.max_total_tokens) == ("torch_native", "bfloat16", 7)


def test_openmp_waits_are_short_unless_the_user_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_dflash.platforms.cpu.platform import OPENMP_SPINS, PlainCpuPlatform

    monkeypatch.setattr(os, "environ", dict(os.environ))
    PlainCpuPlatform().apply_server_args_defaults(server_args())
    assert os.environ["GOMP_SPINCOUNT"] == OPENMP_SPINS

    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    PlainCpuPlatform().apply_server_args_defaults(server_args())
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("ranks", "bound"), [(2, "4,5,6|7,8,9"), (3, "4,5|6,7|8,9"), (4, "4|5|6|7"), (8, "4|5|6|7|8|9|4|5")]
)
def test_ranks_share_the_cores(ranks: int, bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_dflash.platforms.cpu.platform import PlainCpuPlatform

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {9, 4, 5, 6, 7, 8})
    PlainCpuPlatform().apply_server_args_defaults(server_args())
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ
    PlainCpuPlatform().apply_server_args_defaults(server_args(tp_size=ranks))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == bound


def test_speculation_is_dflash_on_its_own_backend() -> None:
    from sglang_dflash.platforms.cpu.platform import PlainCpuPlatform

    platform = PlainCpuPlatform()
    assert platform.supports_speculative_algorithm("DFLASH")
    assert not platform.supports_speculative_algorithm("EAGLE")
    assert platform.get_speculative_worker_cls("EAGLE") is None
    assert platform.get_default_speculative_draft_attention_backend("DFLASH") == PLAIN_ATTENTION
    assert platform.supports_speculative_draft_attention_backend("DFLASH", PLAIN_ATTENTION)
    assert not platform.supports_speculative_draft_attention_backend("DFLASH", "flashinfer")
