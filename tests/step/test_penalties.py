"""Penalties at every node are SGLang's own, fed each token of the request's output and of the node's path once.

A scheduler in small runs requests with overlap or without: prefills in chunks, mixed batches, steps of trees, and
retractions, after each of which slots change hands.
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

from sglang_dflash.step import penalties
from sglang_dflash.step.penalties import Penalised, Penalties
from sglang_dflash.tree import DraftTree

VOCAB, EOS, STOP = 12, 3, 7  # so few that paths repeat what was emitted, and themselves
WIDTH, DEPTH, TOKENS = 7, 3, 24
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


class Batch(SimpleNamespace):
    """SGLang refers to it weakly."""


def request(prompt: int, **params: Any) -> Request:
    none = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    settings = SimpleNamespace(max_new_tokens=TOKENS, **{**none, "stop_token_ids": None, **params})
    tokenizer = SimpleNamespace(eos_token_id=EOS, additional_stop_token_ids=None)
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
        self.penalties = Penalties()
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
                    self.in_flight = [(r, t) for r, t in self.in_flight if r is not req]

    def retract(self) -> None:
        if len(self.running) > 1 and self.rng.random() < 0.15:
            req = self.running.pop(self.rng.randrange(len(self.running)))
            self.in_flight = [(r, t) for r, t in self.in_flight if r is not req]
            req.true, req.retracted = list(req.output_ids), req.retracted + 1
            self.waiting.append(req)

    def prefill(self) -> None:
        """Some new requests, each perhaps only a part of its prompt; in a mixed batch the running ones beside them."""
        free = [n for n in range(12) if n not in {r.kv.req_pool_idx for r in self.running}]
        new = self.waiting[: self.rng.randint(1, 2)]
        partial = [r for r in new if r.chunks == 0 and self.rng.random() < 0.5]
        for req, slot in zip(new, free, strict=False):
            req.kv.req_pool_idx, req.chunks = slot, int(req in partial)
        mixed = self.running if self.rng.random() < 0.5 else []
        reqs = [*new, *mixed]
        batch, lengths = batch_of(reqs), lengths_of(reqs)
        logits = torch.randn(len(reqs), VOCAB)
        raw = logits.clone()
        found = self.penalties.of(batch, lengths, mixed)
        sampler_settings(found).apply_logits_bias(logits)
        whole = [req not in partial for req in reqs]
        close(logits[whole], [said(r, x, []) for r, x, ok in zip(reqs, raw, whole, strict=True) if ok])
        tokens = torch.randint(VOCAB, (len(reqs),), dtype=torch.int32)
        self.penalties.follow(found, lengths, tokens[:, None], torch.ones_like(tokens))
        self.waiting = [*partial, *(r for r in self.waiting if r not in new)]
        self.running = [*self.running, *(r for r in new if r not in partial)]
        emit = [(r, [t]) for r, t, ok in zip(reqs, tokens.tolist(), whole, strict=True) if ok]
        self.emit(emit)

    def step(self) -> None:
        if not self.running:
            return
        self.rng.shuffle(self.running)
        reqs = list(self.running)
        batch, lengths = batch_of(reqs), lengths_of(reqs)
        tree = a_tree([req.true[-1] for req in reqs], self.rng)
        logits = torch.randn(len(reqs), WIDTH, VOCAB)
        raw, block = logits.clone(), logits[:, :DEPTH].clone()
        found = self.penalties.of(batch, lengths, reqs)
        if found is not None:
            found.along(logits, tree)
            found.at_depths(block)
        paths = [[path_of(tree, b, node) for node in range(WIDTH)] for b in range(len(reqs))]
        rows = zip(reqs, raw, paths, strict=True)
        close(logits, [torch.stack([said(r, x, p) for x, p in zip(xs, ps, strict=True)]) for r, xs, ps in rows])
        close(block[:, 0], [said(r, x[0], []) for r, x in zip(reqs, raw, strict=True)])
        walked = [self.rng.randrange(WIDTH) for _ in reqs]
        runs = [[*paths[b][node], self.rng.randrange(VOCAB)] for b, node in enumerate(walked)]
        self.drafted += sum(len(run) - 1 for run in runs)
        tokens = torch.tensor([run + [0] * (DEPTH + 1 - len(run)) for run in runs])
        self.penalties.follow(found, lengths, tokens, torch.tensor([len(run) for run in runs], dtype=torch.int32))
        self.emit(list(zip(reqs, runs, strict=True)))

    def emit(self, runs: list[tuple[Request, list[int]]]) -> None:
        for req, run in runs:
            req.true = req.true + run
        self.in_flight = runs


def batch_of(reqs: list[Request]) -> Any:
    return Batch(reqs=reqs, sampling_info=SimpleNamespace(vocab_size=VOCAB))


def sampler_settings(found: Penalised | None) -> SamplingBatchInfo:
    """What SGLang's sampler reads behind a prefill."""
    nothing = dict.fromkeys(("temperatures", "top_ps", "top_ks", "min_ps"), torch.empty(0))
    flags = ("is_all_greedy", "is_any_greedy", "need_top_p_sampling", "need_top_k_sampling", "need_min_p_sampling")
    return SamplingBatchInfo(**nothing, **dict.fromkeys(flags, False), vocab_size=VOCAB, penalizer_orchestrator=found)


def lengths_of(reqs: list[Request]) -> Tensor:
    return torch.tensor([len(req.origin_input_ids) + len(req.true) for req in reqs])


def path_of(tree: DraftTree, b: int, node: int) -> list[int]:
    path: list[int] = []
    while node:
        path.insert(0, int(tree.tokens[b, node]))
        node = int(tree.parents[b, node])
    return path


def close(got: Tensor, expected: list[Tensor]) -> None:
    if expected:
        torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_every_logit_is_what_sglang_s_penalties_say_of_its_path(overlap: bool) -> None:
    retracted = 0
    for seed in range(4):
        scheduler = Scheduler(overlap, seed)
        everyone = list(scheduler.waiting)
        scheduler.run()
        retracted += sum(req.retracted for req in everyone)
        assert scheduler.drafted > 50
    assert retracted > 5


def of(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A plant in `Penalised.along`: other trees are told."""
    along = Penalised.along
    return lambda patch: patch.setattr(Penalised, "along", lambda self, x, tree: along(self, x, change(tree)))


def forgets_the_retracted(patch: pytest.MonkeyPatch) -> None:
    find = Penalties.of

    def without(self: Penalties, batch: Any, lengths: Tensor, running: Any) -> Any:
        for req in batch.reqs:
            req.kept = req.output_ids
            if req.retracted:
                req.output_ids = []
        found = find(self, batch, lengths, running)
        for req in batch.reqs:
            req.output_ids = req.kept
        return found

    patch.setattr(Penalties, "of", without)


def counts_what_the_host_knows_again(patch: pytest.MonkeyPatch) -> None:
    follow = Penalties.follow
    patch.setattr(Penalties, "follow", lambda self, found, lengths, *more: follow(self, found, lengths + 99, *more))


def counts_samples_of_unfinished_prompts(patch: pytest.MonkeyPatch) -> None:
    find = Penalties.of
    patch.setattr(Penalties, "of", lambda self, batch, lengths, running: find(self, batch, lengths, batch.reqs))


def goes_by_numbers(patch: pytest.MonkeyPatch) -> None:
    tally = penalties._Tally.of

    def of_the_number(self: Any, output: Any) -> Any:
        self._output = output
        return tally(self, output)

    patch.setattr(penalties._Tally, "of", of_the_number)


def counts_from_the_start_again(patch: pytest.MonkeyPatch) -> None:
    tally = penalties._Tally.of

    def again(self: Any, output: Any) -> Any:
        self._read = 0
        return tally(self, output)

    patch.setattr(penalties._Tally, "of", again)


PLANTS: dict[str, tuple[bool, Callable[[pytest.MonkeyPatch], None]]] = {
    "siblings are counted": (False, of(lambda tree: replace(tree, mask=torch.ones_like(tree.mask)))),
    "the node itself is not": (False, of(lambda tree: replace(tree, mask=tree.mask & ~torch.eye(WIDTH).bool()))),
    "depth is not": (False, of(lambda tree: replace(tree, depths=torch.zeros_like(tree.depths)))),
    "a retraction forgets": (False, forgets_the_retracted),
    "overlap forgets": (True, lambda patch: patch.setattr(Penalties, "follow", lambda *_: None)),
    "overlap counts twice": (True, counts_what_the_host_knows_again),
    "without overlap twice": (False, counts_what_the_host_knows_again),
    "a number's next owner inherits": (False, goes_by_numbers),
    "what was counted is counted again": (False, counts_from_the_start_again),
    "a chunk's sample is counted": (True, counts_samples_of_unfinished_prompts),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap, plant = PLANTS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(4):
            Scheduler(overlap, seed).run()


def test_batches_without_penalties_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "_numbers", None)
    told = Penalties()
    reqs = [request(3), request(3, min_new_tokens=2)]
    reqs[1].output_ids = [5, 6]  # long enough
    found = told.of(batch_of(reqs), lengths_of(reqs), reqs)
    assert found is None
    told.follow(found, lengths_of(reqs), torch.zeros(2, 1), torch.ones(2))
    assert told._last is None


def test_sglang_keeps_no_counts_of_its_own() -> None:
    info, batch = SimpleNamespace(), Batch(reqs=[request(3, frequency_penalty=1.0)], device="cpu")
    penalties.leave_uncounted(lambda *_: None, info, batch, VOCAB)
    assert not info.penalizer_orchestrator.is_required
