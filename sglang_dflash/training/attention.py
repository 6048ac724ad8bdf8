"""Who sees whom, as FlexAttention masks: no dense mask at full length is ever built on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

# Compiled, these build neither dense scores nor a dense mask.
_compiled_flex = torch.compile(flex_attention, dynamic=False)
_compiled_create = torch.compile(create_block_mask, dynamic=False)


def _create(mask: Any, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    create = _compiled_create if device.type == "cuda" else create_block_mask
    return create(mask, batch, None, queries, keys, device=device)


def document_mask(starts: Tensor) -> BlockMask:
    """Causal within a document. starts [B, T]: where the document of each token begins."""
    b, t = starts.shape

    def mask(batch: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= starts[batch, q])

    return _create(mask, b, t, t, starts.device)


def draft_mask(anchors: Tensor, firsts: Tensor, width: int, block: int, causal: bool) -> BlockMask:
    """What a row's draft blocks see, keys being the row's `width` context tokens, then all blocks' own tokens.

    A block sees the context from its first token to its anchor, and itself: up to the query if causal, else whole. It
    sees nothing of its own future targets and nothing of another block. anchors, firsts [B, A]: each block's anchor in
    the row, and the first token it sees, of its own document.
    """
    b, a = anchors.shape

    def mask(batch: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine = q // block
        context = (k < anchors[batch, mine]) & (k >= firsts[batch, mine])
        own = k - width
        inside = (own >= 0) & (own // block == mine)
        if causal:
            inside = inside & (own <= q)
        return context | inside

    return _create(mask, b, a * block, width + a * block, anchors.device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """q [B, Q, heads, head_dim], k, v [B, K, kv_heads, head_dim] -> [B, Q, heads, head_dim]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_cuda:
        return _compiled_flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
    # FlexAttention has no backward on a CPU, and there only toys are trained.
    dense = create_mask(mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    return scaled_dot_product_attention(q, k, v, dense, enable_gqa=True).transpose(1, 2)
