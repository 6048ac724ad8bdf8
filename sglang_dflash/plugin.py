"""What SGLang loads: puts this package's DFLASH in place of SGLang's own.

SGLang calls `register` in every process it starts, before it reads its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_dflash import options
from sglang_dflash.platforms import cpu, register_plain_attention


def register() -> None:
    """Register the plain attention backend, and hook where SGLang decides about DFLASH: names, arguments, worker."""
    register_plain_attention()
    if cpu.activate():
        from sglang_dflash.platforms.cpu import hooks

        hooks.register()
    HookRegistry.register(
        "sglang.srt.server_args.ServerArgs.resolve_once", options.fill_in_embedded_pair, HookType.BEFORE
    )
    HookRegistry.register(
        "sglang.srt.arg_groups.speculative_hook._handle_dflash", options.settle_arguments, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker", _create_worker, HookType.AROUND
    )


def _create_worker(original: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
    if not algorithm.is_dflash() or options.reason_to_hand_over(server_args):
        return original(algorithm, server_args)
    from sglang_dflash.worker import DFlashWorker

    return DFlashWorker
