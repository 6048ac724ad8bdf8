"""What SGLang's layers let window passes see, as every platform asks."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.radix_attention import AttentionType

from sglang_dflash.kernels.attention import Sight


def sight_of(layer: Any, reach: int = 0) -> Sight:
    """What a layer, a RadixAttention, lets the rows of a window pass see; reach: of the pass."""
    return Sight(reach, max(layer.sliding_window_size, 0), layer.attn_type != AttentionType.ENCODER_ONLY)
