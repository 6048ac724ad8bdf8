"""Window passes beside SGLang's FlashAttention-4 backend, on Hopper and Blackwell.

FlashAttention-4 could attend to long prefixes as FlashAttention-3 does (`fa3.py`); that has not been tried.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention import flashattention_backend

from sglang_dflash.platforms.cuda.slots import SlotWindows


class FlashAttention4Windows(SlotWindows, flashattention_backend.FlashAttentionBackend):
    """SGLang's FlashAttention backend in its fourth version, with window passes."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner, fa_impl_ver=4)
