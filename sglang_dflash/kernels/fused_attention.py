"""`window_attention` as one Triton kernel: what a window token sees of the prefix and of the window, in one pass.

Query heads that share a key head are rows of the same tile, as in FlashAttention's packed grouped queries. Where a
batch has fewer tiles than the GPU has room for, a tile's keys are split over several programs (Flash-Decoding); the
last of them to end joins their parts, so that no second kernel is launched. How many take part is decided on the
device, by the request's length: a short context is not split, and needs no joining.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


class Tiling(NamedTuple):
    """rows and keys of a tile, warps of a program, loads in flight, and the fewest keys a split is worth."""

    rows: int
    keys: int
    warps: int
    stages: int
    least: int


@triton.jit
def _attend(q, k, v, seen, top, total, acc, scale, softcap: tl.constexpr):
    """One tile of keys into the running softmax: `top` the highest score so far, `total` the sum, in base 2."""
    score = tl.dot(q, tl.trans(k)) * scale
    if softcap > 0:
        score = (2 * tl.sigmoid(2 * score / softcap) - 1) * softcap
    score = tl.where(seen, score * 1.4426950408889634, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    keep, weight = tl.exp2(top - base), tl.exp2(score - base[:, None])
    total = total * keep + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * keep[:, None])
    return higher, total, acc


@triton.jit
def _window_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lens_ptr, pages_ptr, key_cache, value_cache, slots_ptr, out_ptr,
    parts_ptr, tops_ptr, totals_ptr, arrived_ptr, q_stride, k_stride, v_stride, pages_stride, scale, splits, least,
    W: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    WRITE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    tile, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head, first_row = tile % KV_HEADS, tile // KV_HEADS * ROWS
    prefix = tl.load(lens_ptr + request)
    used = tl.minimum(tl.cdiv(prefix + W, least), splits)
    if split >= used:
        return
    dims = tl.arange(0, SIZE)
    rows = first_row + tl.arange(0, ROWS)
    there = rows < W * GROUP
    token, head = request * W + rows // GROUP, kv_head * GROUP + rows % GROUP
    q = tl.load(q_ptr + token[:, None] * q_stride + head[:, None] * SIZE + dims, mask=there[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, SIZE], tl.float32)

    share = tl.cdiv(tl.cdiv(prefix + W, used), KEYS) * KEYS
    end = tl.minimum((split + 1) * share, prefix)
    for first in range(split * share, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        inside = keys < end
        page = tl.load(pages_ptr + request * pages_stride + keys // PAGE, mask=inside, other=0).to(tl.int64)
        at = ((page * PAGE + keys % PAGE) * KV_HEADS + kv_head)[:, None] * SIZE + dims
        k = tl.load(key_cache + at, mask=inside[:, None], other=0.0)
        v = tl.load(value_cache + at, mask=inside[:, None], other=0.0)
        top, total, acc = _attend(q, k, v, inside[None, :], top, total, acc, scale, SOFTCAP)

    if split == used - 1:
        for column in tl.static_range(0, W, WINDOW):
            nodes = column + tl.arange(0, WINDOW)
            real = nodes < W
            own = request * W + nodes
            node_k = tl.load(k_ptr + own[:, None] * k_stride + kv_head * SIZE + dims, mask=real[:, None], other=0.0)
            node_v = tl.load(v_ptr + own[:, None] * v_stride + kv_head * SIZE + dims, mask=real[:, None], other=0.0)
            pairs = there[:, None] & real[None, :]
            seen = tl.load(mask_ptr + token[:, None] * W + nodes[None, :], mask=pairs, other=0) != 0
            top, total, acc = _attend(q, node_k, node_v, seen, top, total, acc, scale, SOFTCAP)
            if WRITE:
                writes = real & (first_row == 0)
                slot = tl.load(slots_ptr + own, mask=writes, other=0)
                cell = (slot * KV_HEADS + kv_head)[:, None] * SIZE + dims
                tl.store(key_cache + cell, node_k, mask=writes[:, None])
                tl.store(value_cache + cell, node_v, mask=writes[:, None])

    to = out_ptr + (token * (KV_HEADS * GROUP) + head)[:, None] * SIZE + dims
    if not SPLIT:
        tl.store(to, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=there[:, None])
    elif used == 1:
        tl.store(to, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=there[:, None])
    else:
        unit = request * tl.num_programs(0) + tile
        lanes = tl.arange(0, ROWS)
        part = (unit * splits + split) * ROWS + lanes
        tl.store(parts_ptr + part[:, None] * SIZE + dims, acc)
        tl.store(tops_ptr + part, top)
        tl.store(totals_ptr + part, total)
        tl.debug_barrier()  # every thread's part is written before this program counts as done
        if tl.atomic_add(arrived_ptr + unit, 1, sem="acq_rel") == used - 1:
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, SIZE], tl.float32)
            for other in range(used):
                part = (unit * splits + other) * ROWS + lanes
                part_top = tl.load(tops_ptr + part, cache_modifier=".cg")
                higher = tl.maximum(top, part_top)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                keep, add = tl.exp2(top - base), tl.exp2(part_top - base)
                total = total * keep + tl.load(totals_ptr + part, cache_modifier=".cg") * add
                given = tl.load(parts_ptr + part[:, None] * SIZE + dims, cache_modifier=".cg")
                acc = acc * keep[:, None] + given * add[:, None]
                top = higher
            tl.store(to, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=there[:, None])
            tl.store(arrived_ptr + unit, 0)  # for the next launch


def splits_of(bs: int, tiles: int, programs: int) -> int:
    """Programs a tile's keys are split over, so that `programs` of them run where a batch has fewer tiles."""
    return max(1, min(16, programs // (bs * tiles)))


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix_lens: Tensor, pages: Tensor, page_size: int,
    key_cache: Tensor, value_cache: Tensor, slots: Tensor | None, arrived: Tensor, scale: float, softcap: float,
    tiling: Tiling, programs: int,
) -> Tensor:  # fmt: skip
    bs, w, _ = mask.shape
    (_, heads, size), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    tiles = triton.cdiv(w * group, tiling.rows) * kv_heads
    splits = splits_of(bs, tiles, programs)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = tops = totals = out
    if splits > 1:
        parts = torch.empty(bs * tiles * splits, tiling.rows, size, dtype=torch.float32, device=q.device)
        tops, totals = torch.empty(2, bs * tiles * splits, tiling.rows, dtype=torch.float32, device=q.device)
    kernel: Any = _window_kernel
    kernel[(tiles, splits, bs)](
        q, k, v, mask.view(torch.uint8), prefix_lens, pages, key_cache, value_cache, slots, out,
        parts, tops, totals, arrived, q.stride(0), k.stride(0), v.stride(0), pages.stride(0), scale, splits, tiling.least,
        W=w, GROUP=group, KV_HEADS=kv_heads, SIZE=size, PAGE=page_size,
        ROWS=tiling.rows, KEYS=tiling.keys, WINDOW=max(16, min(64, triton.next_power_of_2(w))), SPLIT=splits > 1,
        WRITE=slots is not None, SOFTCAP=softcap,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out
