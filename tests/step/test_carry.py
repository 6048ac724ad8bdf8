"""Slots: what is reserved, what is asked of the pool beforehand, and what a step takes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject

from sglang_dflash.step import carry

CONTEXT = 96


class Pool:
    """A paged pool, seen from outside: how many slots are free."""

    def __init__(self, slots: int, page_size: int) -> None:
        self.page_size, self.free = page_size, slots // page_size * page_size

    def available_size(self) -> int:
        return self.free


def make(prompt: int, max_new_tokens: int, processor: str | None = None) -> Any:
    return SimpleNamespace(
        origin_input_ids=[5] * prompt,
        sampling_params=SimpleNamespace(max_new_tokens=max_new_tokens),
        kv=SimpleNamespace(kv_allocated_len=prompt, kv_committed_len=prompt),
        grammar=None,
        custom_logit_processor=processor,
        decode_batch_idx=0,
    )


def batch_of(reqs: list[Any], pool: Pool, columns: int) -> Any:
    return SimpleNamespace(
        reqs=reqs,
        device="cpu",
        token_to_kv_pool_allocator=pool,
        tree_cache=SimpleNamespace(supports_swa=lambda: False, evictable_size=lambda: 0),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(len(reqs), columns)),
        req_pool_indices=torch.arange(len(reqs)),
        maybe_evict_swa=lambda: None,
    )


def draft(monkeypatch: pytest.MonkeyPatch, window: int, path: int) -> None:
    """SGLang's settings where a window is so wide, and the bonus token and the drafts behind it so many."""
    spec = SimpleNamespace(speculative_num_draft_tokens=window, speculative_dflash_block_size=path)
    monkeypatch.setattr(carry, "get_spec", lambda: spec)


def prepare(monkeypatch: pytest.MonkeyPatch, batch: Any, window: int, path: int | None = None) -> carry.Carry:
    """Prepare a step on this batch, with an allocator that only keeps the books. path: of a chain unless told."""
    pool = batch.token_to_kv_pool_allocator

    def alloc(*args: Any, reqs: list[Any], nxt_kv_lens_cpu: torch.Tensor, **more: Any) -> None:
        for req, end in zip(reqs, nxt_kv_lens_cpu.tolist(), strict=True):
            pool.free -= carry._pages(end, pool.page_size) - carry._pages(req.kv.kv_allocated_len, pool.page_size)
            req.kv.kv_allocated_len = end
        assert pool.free >= 0

    monkeypatch.setattr(carry, "alloc_for_spec_decode", alloc)
    draft(monkeypatch, window, path or window)
    made = carry.Carry.of(torch.zeros(len(batch.reqs)), torch.zeros(len(batch.reqs)))
    made.prepare_for_decode(batch)
    return made


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("window", "path"), [(1, 1), (4, 4), (16, 11), (64, 16)])
def test_what_is_taken_was_asked_for_and_stays_in_its_row(
    monkeypatch: pytest.MonkeyPatch, window: int, path: int, page_size: int
) -> None:
    """Requests run to the context's end in a large pool; the host lags a step behind, as under overlap."""
    rng = random.Random(window * page_size)
    columns = CONTEXT + 4 + window if page_size == 1 else CONTEXT + 2 * window + page_size - 1  # SGLang's own
    reqs = [make(prompt, CONTEXT - 2 - prompt) for prompt in (1, 30, 90)]
    true = [len(r.origin_input_ids) for r in reqs]
    batch = batch_of(reqs, Pool(10_000, page_size), columns)
    while any(t < CONTEXT - 3 for t in true):
        draft(monkeypatch, window, path)
        asked, before = carry.new_tokens_required(None, batch, reqs, page_size), batch.token_to_kv_pool_allocator.free
        made = prepare(monkeypatch, batch, window, path)
        assert before - batch.token_to_kv_pool_allocator.free <= asked
        for i, req in enumerate(reqs):
            held, most = made.bounds[:, i].tolist()
            assert held == req.kv.kv_allocated_len <= columns
            assert true[i] + window <= held, "every window has room"
            req.kv.kv_committed_len = true[i]  # the host learns of the step before
            if true[i] < most - 1:  # else it has ended, and overlap runs a pass more
                true[i] += min(rng.choice((1, path)), most - true[i] - 2 + 1)
            assert true[i] < most == CONTEXT - 2


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_last_request_fills_the_pool(monkeypatch: pytest.MonkeyPatch, page_size: int) -> None:
    window, slots = 16, 64
    req = make(40, slots - 2 - 40)
    pool = Pool(slots, page_size)
    pool.free -= carry._pages(40, page_size)
    batch = batch_of([req], pool, 500)
    draft(monkeypatch, window, window)
    assert carry.new_tokens_required(None, batch, [req], page_size) <= pool.free
    held, most = prepare(monkeypatch, batch, window).bounds[:, 0].tolist()
    assert most == 62 <= held <= slots


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("room", [0, 2, 20, 60])
@pytest.mark.parametrize("slides", [False, True])
def test_the_last_request_goes_on_as_long_as_plain_decoding_would(
    monkeypatch: pytest.MonkeyPatch, page_size: int, room: int, slides: bool
) -> None:
    """In a pool that holds it to its end and room more; or room beside what slides out of its window and comes back.

    The host lags a step behind.
    """
    window, path, prompt, most = 16, 11, 32, 200
    req, rng = make(prompt, most - prompt), random.Random(page_size + room)
    pool = Pool((2 * page_size if slides else most - prompt + page_size) + room, page_size)
    batch, true, gone, walks = batch_of([req], pool, 500), prompt, 0, 0
    draft(monkeypatch, window, path)
    while true < most - 1:
        while slides and gone + page_size <= req.kv.kv_committed_len - prompt:
            gone, pool.free = gone + page_size, pool.free + page_size
        assert carry.new_tokens_required(None, batch, [req], page_size) <= pool.free
        made = prepare(monkeypatch, batch, window, path)
        held, bound = made.bounds[:, 0].tolist()
        assert true < held, "the root has a slot"
        req.kv.kv_committed_len = true
        walked = min(rng.randint(1, path), bound - true - 1) if bound and true + window <= held else 1
        true, walks = min(true + walked, most - 1), walks + (walked > 1)
    assert walks > 0 or (slides and room < window + path + 1)


@pytest.mark.parametrize(("full", "sliding"), [(40, 9), (9, 40), (40, 40), (9, 9)])
def test_of_two_pools_the_scarcer_one_says_what_the_last_request_gets(
    monkeypatch: pytest.MonkeyPatch, full: int, sliding: int
) -> None:
    """Free slots, and some that the prefix cache would give back."""
    req = make(30, 20)
    batch = batch_of([req], Pool(100, 1), 500)
    batch.token_to_kv_pool_allocator.full_available_size = lambda: full - 6
    batch.token_to_kv_pool_allocator.swa_available_size = lambda: sliding - 6
    batch.tree_cache = SimpleNamespace(
        supports_swa=lambda: True, full_evictable_size=lambda: 6, swa_evictable_size=lambda: 6
    )
    held, most = prepare(monkeypatch, batch, 16).bounds[:, 0].tolist()
    assert (held, most) == ((63, 50) if (full, sliding) == (40, 40) else (32, 0))


def test_two_requests_in_a_full_pool_are_not_both_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    draft(monkeypatch, 16, 11)
    reqs = [make(40, 100), make(40, 100)]
    batch = batch_of(reqs, Pool(90, 1), 500)
    batch.token_to_kv_pool_allocator.free -= 80
    assert carry.new_tokens_required(None, batch, reqs, 1) == 2 * (16 + 11 + 1) > 10


def test_a_request_whose_logits_depend_on_history_walks_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([make(8, 20), make(8, 20, "a processor")], Pool(1000, 1), 500)
    made = prepare(monkeypatch, batch, 4)
    assert made.bounds[1].tolist() == [28, 0]
    assert made.drafting == [True, False]


def test_a_request_walks_under_a_grammar_that_can_step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class StepsBack(BaseGrammarObject):
        def rollback(self, k: int) -> None: ...

    reqs = [make(8, 20), make(8, 20), make(8, 20, "a processor")]
    for req, grammar in zip(reqs, (StepsBack(), BaseGrammarObject(), StepsBack()), strict=True):
        req.grammar = grammar
    assert prepare(monkeypatch, batch_of(reqs, Pool(1000, 1), 500), 4).bounds[1].tolist() == [28, 0, 0]
