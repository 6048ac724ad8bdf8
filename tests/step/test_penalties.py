"""Penalties at every node are SGLang's own, fed each token of the request's output and of the node's path once.

A scheduler in small runs requests with overlap or without: prefills in chunks, mixed batches, steps of trees, and
retractions, after each of which numbers change hands.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from torch import Tensor

from sglang_dflash.kernels import Emitted
from sglang_dflash.kernels.penalties import END
from sglang_dflash.step import penalties
from sglang_dflash.step.penalties import Penalised, Penalties, penalised
from sglang_dflash.tree import DraftTree

VOCAB, EOS, STOP = 12, 3, 7  # so few that paths repeat what was emitted, and themselves
WIDTH, DEPTH, TOKENS = 7, 3, 24
NUMBERS = 12  # of requests
SETTINGS: list[dict[str, Any]] = [
    {"frequency_penalty": 0.7},
    {"presence_penalty": -0.9},
    {"repetition_penalty": 1.6},
    {"min_new_tokens": 6, "stop_token_ids": {STOP, VOCAB}},
    {},
    {"frequency_penalty": 1.3, "presence_penalty": 0.4, "repetition_penalty": 0.8, "min_new_tokens": 9},
]
ALL = {
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedRepetitionPenalizer,
}


class Request(SimpleNamespace):
    """As the host knows it, and in `true` what it has really emitted; retracted: how often."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Tokenizer:
    eos_token_id, additional_stop_token_ids = EOS, None


class Batch(SimpleNamespace):
    """SGLang refers to it weakly."""


def request(prompt: int, **params: Any) -> Request:
    none = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    settings = SimpleNamespace(max_new_tokens=TOKENS, **{**none, "stop_token_ids": None, **params})
    settings.counts_nothing = not any("penalty" in name for name in params)
    tokenizer = Tokenizer()
    return Request(
        origin_input_ids=[1] * prompt, output_ids=array("q"), true=[], sampling_params=settings, tokenizer=tokenizer,
        eos_token_ids={EOS}, grammar=None, kv=SimpleNamespace(req_pool_idx=None), retracted=0, chunks=0,
    )  # fmt: skip


def said(req: Request, raw: Tensor, path: list[int]) -> Tensor:
    """Logits raw [V] as SGLang's own penalties change them when each token is fed to them as it is emitted."""
    batch = Batch(reqs=[req], device="cpu")
    counting = penaltylib.BatchedPenalizerOrchestrator(VOCAB, batch, ALL)
    for token in [*req.true, *path]:
        counting.cumulate_output_tokens(torch.tensor([token]))
    additive = torch.zeros(1, VOCAB)
    counting.accumulate_additive_penalties(additive)
    x = raw + additive[0]
    scaling = counting.accumulate_scaling_penalties()
    return x if scaling is None else torch.where(x < 0, x * scaling[0], x / scaling[0])


def a_tree(roots: list[int], rng: random.Random) -> DraftTree:
    """Random trees below these roots, as deep as DEPTH; a node's children have distinct tokens."""
    bs = len(roots)
    tokens, parents, depths = (torch.zeros(bs, WIDTH, dtype=torch.int64) for _ in range(3))
    mask = torch.eye(WIDTH).bool().repeat(bs, 1, 1)
    for b, root in enumerate(roots):
        tokens[b, 0] = root
        taken = {(0, root)}
        for node in range(1, WIDTH):
            while True:
                parent, token = rng.randrange(node), rng.randrange(VOCAB)
                if depths[b, parent] < DEPTH and (parent, token) not in taken:
                    break
            taken.add((parent, token))
            tokens[b, node], parents[b, node], depths[b, node] = token, parent, depths[b, parent] + 1
            mask[b, node] |= mask[b, parent]
    return DraftTree(tokens, parents, depths, mask, torch.zeros(bs, WIDTH), DEPTH)


class Scheduler:
    """Runs requests as SGLang's does, and holds every logit of every pass to `said`."""

    def __init__(self, overlap: bool, seed: int) -> None:
        self.rng, self.overlap = random.Random(seed), overlap
        torch.manual_seed(seed)
        self.penalties = Penalties(NUMBERS, VOCAB, "cpu")
        self.waiting = [request(self.rng.randint(1, 5), **SETTINGS[i % len(SETTINGS)]) for i in range(12)]
        self.running: list[Request] = []
        self.in_flight: list[tuple[Request, list[int]]] = []
        self.drafted = 0

    def run(self) -> None:
        while self.waiting or self.running:
            self.retract()
            learned, self.in_flight = self.in_flight, []
            late = self.overlap and self.rng.random() < 0.8  # SGLang waits for some results
            if not late:
                self.learn(learned)
            room = self.waiting and len(self.running) < 5
            (self.prefill if room and (not self.running or self.rng.random() < 0.4) else self.step)()
            if late:
                self.learn(learned)

    def learn(self, results: list[tuple[Request, list[int]]]) -> None:
        for req, tokens in results:
            if req in self.running:
                req.output_ids.extend(tokens)
                if len(req.output_ids) >= req.sampling_params.max_new_tokens:
                    self.running.remove(req)
                    req.kv.req_pool_idx = None
                    self.in_flight = [(r, t) for r, t in self.in_flight if r is not req]

    def retract(self) -> None:
        if len(self.running) > 1 and self.rng.random() < 0.15:
            req = self.running.pop(self.rng.randrange(len(self.running)))
            self.in_flight = [(r, t) for r, t in self.in_flight if r is not req]
            req.true, req.retracted = list(req.output_ids), req.retracted + 1
            req.kv.req_pool_idx = None
            self.waiting.append(req)

    def prefill(self) -> None:
        """Some new requests, each perhaps only a part of its prompt; in a mixed batch the running ones beside them."""
        taken = {r.kv.req_pool_idx for r in [*self.running, *self.waiting]}
        free = [n for n in range(NUMBERS) if n not in taken]
        new = self.waiting[: self.rng.randint(1, 2)]
        partial = [r for r in new if r.chunks == 0 and self.rng.random() < 0.5]
        for req, number in zip(new, free, strict=False):
            if req.kv.req_pool_idx is None:
                req.kv.req_pool_idx = number
            req.chunks = int(req in partial)
        mixed = self.running if self.rng.random() < 0.5 else []
        reqs = [*new, *mixed]
        batch = batch_of(reqs, mixed)
        logits = torch.randn(len(reqs), VOCAB)
        raw = logits.clone()
        found = self.penalties.prefill(batch)
        sampler_settings(found).apply_logits_bias(logits)
        whole = [req not in partial for req in reqs]
        close(logits[whole], [said(r, x, []) for r, x, ok in zip(reqs, raw, whole, strict=True) if ok])
        tokens = torch.randint(VOCAB, (len(reqs),))
        if found is not None:
            self.penalties.emitted(batch.req_pool_indices, tokens[:, None], torch.ones(len(reqs), dtype=torch.int32))
        self.waiting = [*partial, *(r for r in self.waiting if r not in new)]
        self.running = [*self.running, *(r for r in new if r not in partial)]
        emit = [(r, [t]) for r, t, ok in zip(reqs, tokens.tolist(), whole, strict=True) if ok]
        self.emit(emit)

    def step(self) -> None:
        if not self.running:
            return
        self.rng.shuffle(self.running)
        reqs = list(self.running)
        batch = batch_of(reqs)
        tree = a_tree([req.true[-1] for req in reqs], self.rng)
        logits = torch.randn(len(reqs), WIDTH, VOCAB)
        raw, block = logits.clone(), logits[:, :DEPTH].clone()
        any_penalised = any(map(penalised, reqs))
        if any_penalised:
            at = batch.seq_lens[:, None] - 1
            self.penalties.at(batch.req_pool_indices, at + tree.depths).along(logits, tree)
            self.penalties.at(batch.req_pool_indices, at + torch.arange(DEPTH + 1)).at_depths(block)
        paths = [[path_of(tree, b, node) for node in range(WIDTH)] for b in range(len(reqs))]
        rows = zip(reqs, raw, paths, strict=True)
        close(logits, [torch.stack([said(r, x, p) for x, p in zip(xs, ps, strict=True)]) for r, xs, ps in rows])
        for depth in range(DEPTH):  # a draft knows no path, but how long it is
            known = [b for b, req in enumerate(reqs) if depth == 0 or req.sampling_params.counts_nothing]
            close(block[known, depth], [said(reqs[b], raw[b, depth], [0] * depth) for b in known])
        walked = [self.rng.randrange(WIDTH) for _ in reqs]
        runs = [[*paths[b][node], self.rng.randrange(VOCAB)] for b, node in enumerate(walked)]
        self.drafted += sum(len(run) - 1 for run in runs)
        tokens = torch.tensor([run + [0] * (DEPTH + 1 - len(run)) for run in runs])
        if any_penalised:
            lens = torch.tensor([len(run) for run in runs], dtype=torch.int32)
            self.penalties.emitted(batch.req_pool_indices, tokens, lens)
        self.emit(list(zip(reqs, runs, strict=True)))

    def emit(self, runs: list[tuple[Request, list[int]]]) -> None:
        for req, run in runs:
            req.true = req.true + run
        self.in_flight = runs


def batch_of(reqs: list[Request], decoding: list[Request] | None = None) -> Any:
    numbers = torch.tensor([req.kv.req_pool_idx for req in reqs])
    lengths = torch.tensor([len(req.origin_input_ids) + len(req.true) for req in reqs])
    return Batch(reqs=reqs, req_pool_indices=numbers, seq_lens=lengths, decoding_reqs=decoding)


def sampler_settings(found: Penalised | None) -> SamplingBatchInfo:
    """What SGLang's sampler reads behind a prefill."""
    nothing = dict.fromkeys(("temperatures", "top_ps", "top_ks", "min_ps"), torch.empty(0))
    flags = ("is_all_greedy", "is_any_greedy", "need_top_p_sampling", "need_top_k_sampling", "need_min_p_sampling")
    return SamplingBatchInfo(**nothing, **dict.fromkeys(flags, False), vocab_size=VOCAB, penalizer_orchestrator=found)


def path_of(tree: DraftTree, b: int, node: int) -> list[int]:
    path: list[int] = []
    while node:
        path.insert(0, int(tree.tokens[b, node]))
        node = int(tree.parents[b, node])
    return path


def close(got: Tensor, expected: list[Tensor]) -> None:
    if expected:
        torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("either_ops")
@pytest.mark.parametrize("overlap", [False, True])
def test_every_logit_is_what_sglang_s_penalties_say_of_its_path(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalties, "FEWEST_ROWS", 1)
    retracted = 0
    for seed in range(4):
        scheduler = Scheduler(overlap, seed)
        everyone = list(scheduler.waiting)
        scheduler.run()
        retracted += sum(req.retracted for req in everyone)
        assert scheduler.drafted > 50
        assert 2 < len(scheduler.penalties._emitted.counts) < NUMBERS
    assert retracted > 5


def of(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A plant in `Penalised.along`: other trees are told."""
    along = Penalised.along
    return lambda patch: patch.setattr(Penalised, "along", lambda self, x, tree: along(self, x, change(tree)))


def on_prefill(change: Callable[[Request], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A plant in `Penalties.begin`: retracted requests have other outputs."""
    begin = Penalties.begin

    def begin_with_others(self: Penalties, reqs: list[Request]) -> None:
        kept = [req.output_ids for req in reqs]
        for req in reqs:
            req.output_ids = change(req) if req.retracted else req.output_ids
        begin(self, reqs)
        for req, output in zip(reqs, kept, strict=True):
            req.output_ids = output

    return lambda patch: patch.setattr(Penalties, "begin", begin_with_others)


def once_written(change: Callable[[Emitted, Emitted, list[int]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """A plant behind `Penalties._write`: what is there then is changed, given what was there and all numbers."""
    write = Penalties._write

    def write_and_change(self: Penalties, reqs: list[Request]) -> None:
        before = replace(self._emitted, counts=self._emitted.counts.clone())
        write(self, reqs)
        change(self._emitted, before, [*self._rows])

    return lambda patch: patch.setattr(Penalties, "_write", write_and_change)


def inherit(now: Emitted, before: Emitted, _: list[int]) -> None:
    now.counts += torch.where(now.counts == before.counts, 0, before.counts % END)


def swap_settings(now: Emitted, _: Emitted, numbers: list[int]) -> None:
    now.settings[numbers] = now.settings[numbers].roll(1, 0)


def of_emitted(change: Callable[..., tuple[Any, ...]]) -> Callable[[pytest.MonkeyPatch], None]:
    """A plant in `Penalties.emitted`."""
    emitted = Penalties.emitted
    return lambda patch: patch.setattr(Penalties, "emitted", lambda self, *told: emitted(self, *change(*told)))


def counts_twice(patch: pytest.MonkeyPatch) -> None:
    emitted = Penalties.emitted

    def twice(self: Penalties, *told: Any) -> None:
        emitted(self, *told)
        emitted(self, *told)

    patch.setattr(Penalties, "emitted", twice)


def stands_still(patch: pytest.MonkeyPatch) -> None:
    at = Penalties.at

    def of_roots(self: Penalties, requests: Tensor, positions: Tensor) -> Penalised:
        positions = positions.view(len(requests), -1)
        return at(self, requests, positions[:, :1].expand_as(positions).contiguous())

    patch.setattr(Penalties, "at", of_roots)


def begins_once(patch: pytest.MonkeyPatch) -> None:
    begin = Penalties.begin

    def of_the_unknown(self: Penalties, reqs: list[Request]) -> None:
        known = [req for _, req in self._rows.values()]
        begin(self, [req for req in reqs if req not in known])

    patch.setattr(Penalties, "begin", of_the_unknown)


def begins_all_anew(patch: pytest.MonkeyPatch) -> None:
    prefill = Penalties.prefill

    def without_decoding(self: Penalties, batch: Any) -> Penalised | None:
        batch.decoding_reqs = None
        return prefill(self, batch)

    patch.setattr(Penalties, "prefill", without_decoding)


def leaves_places(patch: pytest.MonkeyPatch) -> None:
    let_go = Penalties._let_go

    def and_say_none(self: Penalties, numbers: set[int]) -> list[int]:
        let_go(self, numbers)
        return []

    patch.setattr(Penalties, "_let_go", and_say_none)


PLANTS: dict[str, tuple[bool, Callable[[pytest.MonkeyPatch], None]]] = {
    "siblings are counted": (False, of(lambda tree: replace(tree, mask=torch.ones_like(tree.mask)))),
    "the node itself is not": (False, of(lambda tree: replace(tree, mask=tree.mask & ~torch.eye(WIDTH).bool()))),
    "depth is not": (False, stands_still),
    "a retraction forgets": (False, on_prefill(lambda req: [])),
    "a retraction counts twice": (False, on_prefill(lambda req: [*req.output_ids, *req.output_ids])),
    "a pass is forgotten": (True, lambda patch: patch.setattr(Penalties, "emitted", lambda *_: None)),
    "a pass counts twice": (True, counts_twice),
    "a pass counts for neighbours": (True, of_emitted(lambda reqs, *more: (reqs.roll(1), *more))),
    "what was not walked is counted": (False, of_emitted(lambda r, tokens, lens: (r, tokens, lens.clamp(min=2)))),
    "a number's next owner inherits": (False, once_written(inherit)),
    "settings are a neighbour's": (False, once_written(swap_settings)),
    "places are left behind": (False, leaves_places),
    "a chunk's sample is counted": (False, begins_once),
    "mixed batches begin anew": (True, begins_all_anew),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap, plant = PLANTS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(4):
            Scheduler(overlap, seed).run()


def numbered(reqs: list[Request]) -> list[Request]:
    for number, req in enumerate(reqs):
        req.kv.req_pool_idx = number
    return reqs


def test_batches_without_penalties_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "upload_numbers", None)
    told = Penalties(NUMBERS, VOCAB, "cpu")
    reqs = numbered([request(3), request(3, min_new_tokens=2)])
    reqs[1].output_ids = array("q", [5, 6])  # long enough
    assert told.prefill(batch_of(reqs)) is None
    assert len(told._emitted.counts) == 0


def test_counts_take_the_room_of_those_who_run_at_once() -> None:
    """SGLang gives its numbers in turn, so that each comes to be one with penalties."""
    told = Penalties(NUMBERS, VOCAB, "cpu")
    for turn in range(3 * NUMBERS):
        req = request(3, frequency_penalty=1.0)
        req.kv.req_pool_idx = turn % NUMBERS
        told.prefill(batch_of([req]))
        assert told._emitted.places.tolist().count(-1) == NUMBERS - 1
        req.kv.req_pool_idx = None
    assert len(told._emitted.counts) == penalties.FEWEST_ROWS
    told.prefill(batch_of(numbered([request(3, presence_penalty=1.0) for _ in range(NUMBERS)])))
    assert sorted(told._emitted.places.tolist()) == list(range(NUMBERS)) == list(range(len(told._emitted.counts)))


def test_sglang_keeps_no_counts_of_its_own() -> None:
    info, batch = SimpleNamespace(), Batch(reqs=[request(3, frequency_penalty=1.0)], device="cpu")
    penalties.leave_uncounted(lambda *_: None, info, batch, VOCAB)
    assert not info.penalizer_orchestrator.is_required
