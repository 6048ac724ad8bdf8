"""Window passes beside SGLang's FlashInfer backend, on any GPU.

FlashInfer packs a tree's mask anew every step, and plans on the host with lengths that the host does not have.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention import flashinfer_backend

from sglang_dflash.platforms.cuda.slots import SlotWindows


class FlashInferWindows(SlotWindows, flashinfer_backend.FlashInferAttnBackend):
    """SGLang's FlashInfer backend, with window passes."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner, init_new_workspace=runner.init_new_workspace)
        self.device = runner.device
