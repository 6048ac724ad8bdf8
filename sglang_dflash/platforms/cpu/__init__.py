"""Plain CPU as an SGLang platform: laptops and CI, with no AMX kernels, no Triton and no libcuda."""

from __future__ import annotations

import os

import torch

from sglang_dflash import other_sglang
from sglang_dflash.platforms import PLAIN_ATTENTION, Backend, Need

BACKEND = Backend(PLAIN_ATTENTION, frozenset({Need.WINDOWS, Need.SINKS, Need.DELTA_NETS, Need.IMAGES}))


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`, asked at every SGLang start for a platform class.

    Returns None where torch has a usable accelerator, where the user asked for SGLang's own CPU engine, or in another
    SGLang than this package is made for.
    """
    if other_sglang():
        return None
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.accelerator.current_accelerator(check_available=True) is not None:
        return None
    return "sglang_dflash.platforms.cpu.platform.PlainCpuPlatform"
