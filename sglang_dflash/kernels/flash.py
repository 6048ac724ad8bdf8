"""`tree_attention` as one Triton kernel: what a window token sees of the prefix and of the window, in one pass.

Query heads that share a key head are rows of the same tile, as in FlashAttention's packed grouped queries. Where a
batch has fewer tiles than the GPU has multiprocessors, a tile's keys are split over several programs (Flash-Decoding),
and the last of them to end joins their parts, so that nothing is launched for it. How many take part is decided on the
device, by the request's length: keys of a short context are not split, and need no joining.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_dflash.kernels.attention import rounded

WORTH = 256  # keys that a program is started for
MOST_SPLITS = 16
PROGRAMS = {16: 4, 32: 2, 64: 1}  # by a tile's rows: that a multiprocessor runs side by side
WARPS = 4  # of a program; as all of this the fastest of those timed on an H200
# Bytes of shared memory with which five loads are on their way, of pages and then of what they hold, so that keys come
# two tiles ahead, in place of three, one ahead; and with which heads of 256 have tiles of 64 rows.
DEEP, ROOMY = 160_000, 98_304


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    prefix_lens: Tensor,
    pages: Tensor,
    page_size: int,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor | None,
    scale: float,
    softcap: float,
    reach: int = 0,
    first_keys: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    bs, w, _ = mask.shape
    (_, heads, size), kv_heads = q.shape, k.shape[1]
    if scaled := key_cache.dtype != k.dtype:
        # Not in the kernel: tiles that it rounds itself and then multiplies come out wrong on Hopper GPUs.
        k, v = rounded(k, k_scale, key_cache), rounded(v, v_scale, value_cache)
    queries, units = w * (heads // kv_heads), multiprocessors(q.device)
    room = shared_memory(q.device)
    rows = max(16, min(64 if size <= 128 or room >= ROOMY else 32, triton.next_power_of_2(queries)))
    if rows == 64 and bs * triton.cdiv(queries, rows) * kv_heads * MOST_SPLITS <= units:
        rows = 32  # as many programs as share its keys leave multiprocessors idle: they share its rows too
    keys = 64 if rows > 16 and size <= 128 else 32
    tiles, programs = triton.cdiv(queries, rows) * kv_heads, units * PROGRAMS[rows]
    worth = triton.cdiv(reach + w, WORTH) if reach else MOST_SPLITS  # a reach is all that is ever read
    splits = max(1, min(MOST_SPLITS, programs // (bs * tiles), worth))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    split_tiles = bs * tiles * splits if splits > 1 else 0
    parts = torch.empty(split_tiles, rows, size, dtype=torch.float32, device=q.device)
    sums = torch.empty(split_tiles, rows, 2, dtype=torch.float32, device=q.device)
    kernel: Any = tree_attention_kernel
    kernel[(tiles, splits, bs)](
        q, k, v, mask.view(torch.uint8), prefix_lens, pages, key_cache, value_cache, slots, out, parts, sums,
        counters(q.device), first_keys, sinks, q.stride(0), k.stride(0), v.stride(0), pages.stride(0), scale, k_scale,
        v_scale, splits, reach,
        W=w, GROUP=heads // kv_heads, KV_HEADS=kv_heads, SIZE=size, PAGE=page_size, ROWS=rows,
        KEYS=keys, WINDOW=max(16, min(keys, triton.next_power_of_2(w))),
        WORTH=WORTH, SPLIT=splits > 1, WRITE=slots is not None, REACH=reach > 0, FIRST=first_keys is not None,
        SINK=sinks is not None, SCALED=scaled, SOFTCAP=softcap,
        num_warps=WARPS, num_stages=5 if room >= DEEP else 3,
    )  # fmt: skip
    return out


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have at most."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def counters(device: torch.device) -> Tensor:
    """Of programs that have ended, by tile; the last one leaves a zero. Tiles are split only where there are few."""
    return torch.zeros(max(PROGRAMS.values()) * multiprocessors(device), dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["splits", "reach"])
def tree_attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lens_ptr, pages_ptr, key_cache, value_cache, slots_ptr, out_ptr, parts_ptr,
    sums_ptr, counters_ptr, first_ptr, sinks_ptr, q_stride, k_stride, v_stride, pages_stride, scale, k_scale, v_scale,
    splits, reach,
    W: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr, WORTH: tl.constexpr, SPLIT: tl.constexpr,
    WRITE: tl.constexpr, REACH: tl.constexpr, FIRST: tl.constexpr, SINK: tl.constexpr, SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    tile, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head, first_row = tile % KV_HEADS, tile // KV_HEADS * ROWS
    prefix = tl.load(lens_ptr + request)
    before = 0  # the first key
    if REACH:
        before = tl.maximum(prefix - reach, 0)
    used = tl.minimum(tl.cdiv(prefix - before + W, WORTH), splits)
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
    if SCALED:  # keys and values are attended to as the caches hold them
        scale = scale * k_scale
    if FIRST:
        first_key = tl.load(first_ptr + token, mask=there, other=0)
    if SINK:  # noqa: SIM102  # decided when the kernel is compiled, unlike the next
        if split == used - 1:  # once: in the last of the programs that share these rows
            top = tl.load(sinks_ptr + head, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
            total = tl.full([ROWS], 1.0, tl.float32)

    share = tl.cdiv(tl.cdiv(prefix - before + W, used), KEYS) * KEYS
    end = tl.minimum(before + (split + 1) * share, prefix)
    for first in range(before + split * share, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        inside = keys < end
        page = tl.load(pages_ptr + request * pages_stride + keys // PAGE, mask=inside, other=0).to(tl.int64)
        cell = ((page * PAGE + keys % PAGE) * KV_HEADS + kv_head)[:, None] * SIZE + dims
        k = tl.load(key_cache + cell, mask=inside[:, None], other=0.0).to(q.dtype)
        v = tl.load(value_cache + cell, mask=inside[:, None], other=0.0).to(q.dtype)
        seen = inside[None, :]
        if FIRST:
            seen = seen & (keys[None, :] >= first_key[:, None])
        top, total, acc = _attend(q, k, v, seen, top, total, acc, scale, SOFTCAP)

    if split == used - 1:
        for column in tl.static_range(0, W, WINDOW):
            nodes = column + tl.arange(0, WINDOW)
            real = nodes < W
            own = request * W + nodes
            node_k = tl.load(k_ptr + own[:, None] * k_stride + kv_head * SIZE + dims, mask=real[:, None], other=0.0)
            node_v = tl.load(v_ptr + own[:, None] * v_stride + kv_head * SIZE + dims, mask=real[:, None], other=0.0)
            pairs = there[:, None] & real[None, :]
            seen = tl.load(mask_ptr + token[:, None] * W + nodes[None, :], mask=pairs, other=0) != 0
            top, total, acc = _attend(
                q, node_k.to(q.dtype), node_v.to(q.dtype), seen, top, total, acc, scale, SOFTCAP
            )
            if WRITE:
                writes = real & (first_row == 0)  # one tile of several
                slot = tl.load(slots_ptr + own, mask=writes, other=0)
                own_cell = (slot * KV_HEADS + kv_head)[:, None] * SIZE + dims
                tl.store(key_cache + own_cell, node_k, mask=writes[:, None])
                tl.store(value_cache + own_cell, node_v, mask=writes[:, None])

    last = True
    if SPLIT:  # noqa: SIM102  # decided when the kernel is compiled, unlike the next
        if used > 1:
            unit = request * tl.num_programs(0) + tile
            lanes = (unit * splits + split) * ROWS + tl.arange(0, ROWS)
            tl.store(parts_ptr + lanes[:, None] * SIZE + dims, acc)
            tl.store(sums_ptr + lanes * 2, top)
            tl.store(sums_ptr + lanes * 2 + 1, total)
            tl.debug_barrier()  # every thread's part is written before this program counts as ended
            last = tl.atomic_add(counters_ptr + unit, 1, sem="acq_rel") == used - 1
            if last:
                tl.store(counters_ptr + unit, 0)
                top, total, acc = _join(parts_ptr, sums_ptr, unit * splits, used, ROWS, SIZE)
    if last:
        if SCALED:
            acc = acc * v_scale
        to = out_ptr + (token * (KV_HEADS * GROUP) + head)[:, None] * SIZE + dims
        tl.store(to, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def _attend(q, k, v, seen, top, total, acc, scale, softcap: tl.constexpr):
    """Take a tile of keys into the running softmax: each row's highest score, base 2, its sum and weighted values."""
    score = tl.dot(q, tl.trans(k)) * scale
    if softcap > 0:
        score = (2 * tl.sigmoid(2 * score / softcap) - 1) * softcap  # tanh
    score = tl.where(seen, score * 1.4426950408889634, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing yet
    keep, weight = tl.exp2(top - base), tl.exp2(score - base[:, None])
    return higher, total * keep + tl.sum(weight, 1), tl.dot(weight.to(v.dtype), v, acc * keep[:, None])


@triton.jit
def _join(parts_ptr, sums_ptr, first, count, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """What `_attend` would have come to with the keys of all parts, which other programs have just written."""
    dims = tl.arange(0, SIZE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, SIZE], tl.float32)
    for i in range(count):
        lanes = (first + i) * ROWS + tl.arange(0, ROWS)
        part_top = tl.load(sums_ptr + lanes * 2, cache_modifier=".cg")  # not from a cache of this multiprocessor's own
        higher = tl.maximum(top, part_top)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        keep, add = tl.exp2(top - base), tl.exp2(part_top - base)
        total = total * keep + tl.load(sums_ptr + lanes * 2 + 1, cache_modifier=".cg") * add
        part = tl.load(parts_ptr + lanes[:, None] * SIZE + dims, cache_modifier=".cg")
        acc = acc * keep[:, None] + part * add[:, None]
        top = higher
    return top, total, acc
