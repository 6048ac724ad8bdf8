"""Rotary embedding for a CPU, where a small tensor op costs its call and not its arithmetic.

All layers of a pass rotate at the same positions, so the angles are looked up once a pass, and a rotation is
three calls: `x * cos + swap(x) * sin`, with the sign of the swapped half in `sin`.
"""

from __future__ import annotations

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding


def register_rope(dispatch_key: str) -> None:
    """Make SGLang's rotary embeddings run here on the platform of that dispatch key.

    Subclasses that only fill the table of angles in another way are included; those that rotate in another way
    keep their own.
    """
    for rope in (RotaryEmbedding, *_all_subclasses(RotaryEmbedding)):
        if rope.forward_native is RotaryEmbedding.forward_native:
            BaseFusedOp.register_oot_forward(rope, rotate, dispatch_key)


def rotate(
    self: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: object | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key [tokens, heads*head_size], rotated at positions [tokens] int64. `self` is the module."""
    halves_of_the_head = self.is_neox_style and self.rotary_dim == self.head_size
    if not halves_of_the_head or offsets is not None or fused_set_kv_buffer_arg is not None:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    cos, sin = _angles(self, positions, query.dtype)
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _angles(rope: RotaryEmbedding, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, 1, head_size] in dtype, kept on the module until other positions are asked for."""
    last = getattr(rope, "_last_angles", None)
    if last is not None and last[1].dtype == dtype and torch.equal(last[0], positions):
        return last[1], last[2]
    cos, sin = rope.cos_sin_cache.index_select(0, positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    rope._last_angles = (positions.clone(), cos, sin)
    return cos, sin


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    heads = x.reshape(x.shape[0], -1, cos.shape[-1])
    swapped = heads.roll(cos.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cos, swapped, sin).view(x.shape)


def _all_subclasses(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    return direct + [deeper for sub in direct for deeper in _all_subclasses(sub)]
