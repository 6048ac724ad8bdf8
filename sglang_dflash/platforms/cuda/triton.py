"""Window passes beside SGLang's Triton backend, on any GPU.

Its own windows of a sliding layer count a window's rows, and so a tree's siblings as if they followed each other.
"""

from __future__ import annotations

from sglang.srt.layers.attention import triton_backend

from sglang_dflash.platforms.cuda.slots import SlotWindows


class TritonWindows(SlotWindows, triton_backend.TritonAttnBackend):
    """SGLang's Triton backend, with window passes."""
