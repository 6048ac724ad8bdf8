"""The slots a step writes, and what a walk accepted, moved and written in the caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Pools:
    """Cache tensors of one shape [rows, heads, size] that the same slots index, such as all layers' keys and values.

    addresses [pools] int64, on their device: where each begins, for a kernel that serves all in one launch.
    rows_by_slot [slots] int64: a slot's row here, of layers that do not keep all slots; None: its number.
    """

    tensors: list[Tensor]
    addresses: Tensor
    rows_by_slot: Tensor | None = None

    @classmethod
    def of(cls, tensors: list[Tensor], rows_by_slot: Tensor | None = None) -> Pools:
        """Raises ValueError where the tensors are not contiguous or not of one shape."""
        first = tensors[0]
        if any(t.shape != first.shape or not t.is_contiguous() for t in tensors):
            raise ValueError(
                f"a KV pool's layers have shapes {[tuple(t.shape) for t in tensors]} or another layout than "
                "[slots, heads, size]: such a pool is not served"
            )
        return cls(tensors, torch.tensor([t.data_ptr() for t in tensors], device=first.device), rows_by_slot)


def assign_slots(rows: Tensor, slot_table: Tensor, begin: Tensor, end: Tensor, slots: Tensor) -> None:
    """Write slots that requests now hold into their rows of the slot table, at [begin, end).

    rows, begin, end [bs] int64; slot_table [requests, columns] int32; slots int64: all requests', one after another.
    """
    ends = (end - begin).cumsum(0)  # of each request's part of slots
    at = torch.arange(len(slots), device=slots.device)
    request = torch.searchsorted(ends, at, right=True)
    columns = end[request] - ends[request] + at
    slot_table[rows[request], columns] = slots.to(slot_table.dtype)


def open_window(
    slot_table: Tensor,
    rows: Tensor,
    prefix_lens: Tensor,
    held: Tensor,
    most: Tensor,
    bonus_tokens: Tensor,
    mask_token: int,
    w: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next w slots of each request, how far it may walk there, and the draft block that begins there.

    slot_table [requests, columns] int32: slots by position; rows [bs] int64: the batch's requests in it; prefix_lens
    [bs] int64: committed tokens; held [bs] int64, <= columns: slots that a request holds, counted from its first token;
    most [bs] int64: tokens it may ever come to, committed, bonus and coming ones; bonus_tokens [bs] int64; block <= w.

    Returns slots [bs, w], 0 (SGLang's sink) where the request holds none; how many drafted tokens it may accept [bs]:
    with them and the sample after them it comes to no more than most, and none where it holds less than w slots; the
    block's tokens (bonus_tokens, then mask_token) and positions [bs, block]. All int64.
    """
    positions = prefix_lens[:, None] + torch.arange(w, device=prefix_lens.device)
    holds = positions < held[:, None]
    slots = slot_table[rows[:, None], positions.clamp(max=slot_table.shape[1] - 1)].to(torch.int64) * holds
    deepest = torch.where(holds[:, -1], most - prefix_lens - 2, 0).clamp(min=0)
    tokens = torch.full((len(rows), block), mask_token, device=prefix_lens.device)
    tokens[:, 0] = bonus_tokens
    return slots, deepest, tokens, positions[:, :block]


def commit_rows(
    slots: Tensor, prefix_lens: Tensor, nodes: Tensor, lens: Tensor, w: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where everything that a walk accepted comes from and goes to.

    slots [bs, >= m] int64: the window's, distinct in a request; prefix_lens [bs] int64; nodes [bs, m] int64 and lens
    [bs] int32 as from `walk`; w: tokens a request in the verify pass.

    Returns five int64 [bs * m]. The first two, source and destination, are copies `cache[destination] =
    cache[source]` that put the target's cache rows of the walked nodes at the front of their window, in path order: all
    of source is read before destination is written, destination holds no slot twice, and past lens a row is copied to
    itself. The others are for the draft's context: rows of the pass's [bs * w] tokens, their positions, and their
    slots, 0 (SGLang's sink) past lens.
    """
    bs, m = nodes.shape
    depths = torch.arange(m, device=nodes.device)
    kept = depths < lens[:, None]
    to = slots[:, :m]
    source = torch.where(kept, slots.gather(1, nodes), to)
    rows = nodes + torch.arange(0, bs * w, w, device=nodes.device)[:, None]
    positions = prefix_lens[:, None] + depths
    context_slots = torch.where(kept, to, 0)
    return source.flatten(), to.flatten(), rows.flatten(), positions.flatten(), context_slots.flatten()


def move_rows(pools: Pools, source: Tensor, destination: Tensor, bs: int) -> None:
    """`cache[destination] = cache[source]` in every cache, with what `commit_rows` gave for bs requests."""
    if pools.rows_by_slot is not None:
        source, destination = pools.rows_by_slot[source], pools.rows_by_slot[destination]
    for pool in pools.tensors:
        pool[destination] = pool[source]


def write_context(
    kv: Tensor, k_norm: Tensor | None, cos_sin: Tensor, positions: Tensor, slots: Tensor, pools: Pools, eps: float
) -> None:
    """Norm and rotate the keys of committed tokens, and write keys and values of all layers into their pools.

    kv [T, 2, layers, heads, size]: keys, then values; k_norm [layers, 1, size]: RMSNorm weights, None without; cos_sin
    [positions, size], float32 on a GPU: cosines of the size / 2 pairs (i, i + size / 2), then their sines; positions
    and slots [T] int64, a row for slot 0 may be dropped; pools: all layers' keys, then all layers' values.
    """
    k, v = kv.float().unbind(1)
    if k_norm is not None:
        k = F.rms_norm(k, k.shape[-1:], eps=eps) * k_norm
    cos, sin = cos_sin[positions].float()[:, None, None].chunk(2, -1)
    one, two = k.chunk(2, -1)
    k = torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
    layers = kv.shape[2]
    for i in range(layers):
        for pool, rows in ((pools.tensors[i], k), (pools.tensors[layers + i], v)):
            pool.index_copy_(0, slots, rows[:, i].to(pool.dtype))
