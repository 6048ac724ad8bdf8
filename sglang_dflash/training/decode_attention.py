"""Attention of one new token a slot over its cached past, for making data."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, lens_ptr, out_ptr, scale, width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program a slot and key head, its query heads as the rows of one small matrix (padded to GROUP).
    slot, kv = tl.program_id(0), tl.program_id(1)
    rep: tl.constexpr = HEADS // KV_HEADS
    g, d, n = tl.arange(0, GROUP), tl.arange(0, D), tl.arange(0, BLOCK)
    rows = (slot * HEADS + kv * rep + g[:, None]) * D + d[None, :]
    q = tl.load(q_ptr + rows, mask=g[:, None] < rep, other=0.0)
    length = tl.load(lens_ptr + slot)
    base = (slot.to(tl.int64) * width * KV_HEADS + kv) * D
    best = tl.full((GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, D), tl.float32)
    for start in range(0, length, BLOCK):
        at = start + n
        there = at[:, None] < length
        cells = base + at[:, None] * (KV_HEADS * D) + d[None, :]
        k = tl.load(k_ptr + cells, mask=there, other=0.0)
        v = tl.load(v_ptr + cells, mask=there, other=0.0)
        score = tl.where((at < length)[None, :], tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        p = tl.exp(score - new_best[:, None])
        shrink = tl.exp(best - new_best)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        best = new_best
    tl.store(out_ptr + rows, (acc / total[:, None]).to(q.dtype), mask=g[:, None] < rep)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
    """q [S, heads, head_dim], caches k, v [S, width, kv_heads, head_dim], lens [S] -> [S, heads, head_dim].

    A slot's query sees the first lens (>= 1) rows of its cache. The compiled form reads no more than these.
    """
    if not q.is_cuda:
        there = torch.arange(k.shape[1], device=q.device) < lens[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), there[:, None, None], enable_gqa=True
        )
        return out[:, :, 0]
    q = q.contiguous()
    slots, heads, d = q.shape
    kv_heads, out = k.shape[2], torch.empty_like(q)
    group = max(16, triton.next_power_of_2(heads // kv_heads))
    _kernel[(slots, kv_heads)](q, k, v, lens, out, d**-0.5, k.shape[1], heads, kv_heads, d, group, 64, num_warps=4)
    return out
