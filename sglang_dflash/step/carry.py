"""What a request carries from step to step, its bonus token and its length; and the slots that its next step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocation import alloc_for_spec_decode
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.dflash_info_v2 import DFlashDraftInputV2
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.step.grammar import depends_on_history


class Carry(DFlashDraftInputV2):
    """The running batch's speculative state, in the shape SGLang's scheduler relays, filters and merges.

    drafting [bs]: who may accept drafts, on the host. bounds [2, bs] int64: of each request, the slots it holds, and
    the most tokens it may ever come to, prompt included; 0 where it is to take one token a step. Both are made for the
    next step alone.
    """

    drafting: list[bool]
    bounds: Tensor

    @classmethod
    def of(cls, bonus_tokens: Tensor, new_seq_lens: Tensor) -> Carry:
        """The state after a step: bonus_tokens [bs], the last sample, not yet in the cache; new_seq_lens [bs]."""
        carry = cls.awaited(len(new_seq_lens), new_seq_lens.device)
        carry.fill(bonus_tokens, new_seq_lens)
        return carry

    @classmethod
    def awaited(cls, requests: int, device: Any) -> Carry:
        """The state after a step that still runs, of so many requests; `fill` says it."""
        nothing = torch.empty(requests, 0, device=device)
        return cls(nothing, nothing, bonus_tokens=nothing, new_seq_lens=nothing, hidden_states=nothing)

    def fill(self, bonus_tokens: Tensor, new_seq_lens: Tensor) -> None:
        """As in `of`."""
        self.bonus_tokens, self.new_seq_lens = bonus_tokens.to(torch.int64), new_seq_lens.to(torch.int64)

    def prepare_for_decode(self, batch: Any) -> None:
        """Allocate the next window."""
        reqs = batch.reqs
        if not reqs:
            return
        batch.maybe_evict_swa()
        held, committed = _lengths(reqs)
        ends, scarce = _slots_after(batch, reqs, held, committed)
        self.drafting = [not (scarce or depends_on_history(req)) for req in reqs]
        most = [_most_tokens(req) if drafts else 0 for req, drafts in zip(reqs, self.drafting, strict=True)]
        on_host = torch.empty(3, len(reqs), dtype=torch.int64, pin_memory=str(batch.device).startswith("cuda"))
        on_host.numpy()[:] = held, ends, most  # a quarter of the time that torch takes over lists
        on_device = on_host.to(batch.device, non_blocking=True)
        self.bounds = on_device[1:]
        self.nxt_kv_lens_cpu = on_host[1]
        self.nxt_kv_lens_sum = int(ends.sum())
        alloc_for_spec_decode(
            batch.tree_cache,
            batch.req_to_token_pool,
            reqs=reqs,
            req_pool_indices=batch.req_pool_indices,
            cur_kv_lens=on_device[0],
            cur_kv_lens_cpu=on_host[0],
            nxt_kv_lens=on_device[1],
            nxt_kv_lens_cpu=on_host[1],
            num_needed_tokens=int((ends - held).sum()),
            batch=batch,
        )
        for req in reqs:
            req.decode_batch_idx += 1
        batch.seq_lens_cpu = torch.from_numpy(committed)  # what overlap knows better replaces it
        batch.seq_lens_sum = int(committed.sum())


def assign_slots(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, slots: Tensor, requests: int
) -> None:
    """In place of SGLang's, which Triton compiles while requests wait: anew for each power of two of them, and for how
    the arguments lie in memory.
    """
    kernels.assign_slots(req_pool_indices, req_to_token, start, end, slots)


def new_tokens_required(original: Any, batch: Any, requests: Sequence[Any], page_size: int) -> int:
    """Around SGLang's count of the slots that the next step of these requests takes from the pool."""
    held, committed = _lengths(requests)
    wanted = _least(requests[0], page_size) if len(requests) == 1 else _wanted(batch, held, committed)
    return int((_pages(wanted, page_size) - _pages(held, page_size)).sum())


def _lengths(reqs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Slots that requests hold, and tokens that the host knows to be committed, [bs] int64."""
    kvs = [req.kv for req in reqs]
    lengths = [kv.kv_allocated_len for kv in kvs], [kv.kv_committed_len for kv in kvs]
    held, committed = np.array(lengths, dtype=np.int64)
    return held, committed


def _slots_after(batch: Any, reqs: Sequence[Any], held: np.ndarray, committed: np.ndarray) -> tuple[np.ndarray, bool]:
    """How many slots each request holds once its next step is prepared; and whether they are scarce.

    The last request in a full pool gets what it may ever need, where a window that has no room is walked at its root.
    If even that is not there (the pool of sliding layers gets slots back on the way), it goes on as in plain decoding.
    """
    wanted = _wanted(batch, held, committed)
    if len(reqs) > 1:
        return wanted, False
    page_size = batch.token_to_kv_pool_allocator.page_size
    there = _pages(held, page_size) + _room(batch)
    for end in (wanted, np.maximum(held, _pages(_most_tokens(reqs[0]), page_size))):
        if _pages(end, page_size) <= there:
            return end, False
    return np.array([_least(reqs[0], page_size)]), True


def _room(batch: Any) -> int:
    """Slots that the pool can still give: of two pools, one of sliding layers, those that both can."""
    allocator, cache = batch.token_to_kv_pool_allocator, batch.tree_cache
    if not cache.supports_swa():
        return int(allocator.available_size() + cache.evictable_size())
    full = allocator.full_available_size() + cache.full_evictable_size()
    return int(min(full, allocator.swa_available_size() + cache.swa_evictable_size()))


def _wanted(batch: Any, held: np.ndarray, committed: np.ndarray) -> np.ndarray:
    """Of each request, a window behind the committed prefix and behind the longest path of the step whose result the
    host has not seen; and a slot for the root behind both.

    No more than the slot table has columns: a row's end is the next request's beginning. Columns reach a window beyond
    the longest request, so the table cuts off only what the host's lag would take.
    """
    page_size = batch.token_to_kv_pool_allocator.page_size
    room = batch.req_to_token_pool.req_to_token.shape[1] // page_size * page_size
    spec = get_spec()
    ahead = int(spec.speculative_num_draft_tokens) + int(spec.speculative_dflash_block_size) + 1
    return np.maximum(held, np.minimum(_pages(committed + ahead, page_size), room))


def _least(req: Any, page_size: int) -> int:
    """Slots for the next step's root, none beyond the request's end.

    Of the step before, whose result the host has not seen, this knows that it took one token, if slots were scarce; if
    not, whatever it took, what was wanted for it holds the next root too.
    """
    return max(req.kv.kv_allocated_len, _pages(min(req.kv.kv_committed_len + 2, _most_tokens(req)), page_size))


def _most_tokens(req: Any) -> int:
    return len(req.origin_input_ids) + int(req.sampling_params.max_new_tokens)


def _pages(tokens: Any, page_size: int) -> Any:
    """Slots of the whole pages that hold so many tokens."""
    return tokens if page_size == 1 else -(-tokens // page_size) * page_size
