"""The planner between SGLang's batches and the budget: who drafts, who is new, and which interval is a step's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_dflash.budget import Shape
from sglang_dflash.options import Options
from sglang_dflash.step import plan
from sglang_dflash.step.plan import Planner

SHAPES = (Shape(0, 0, 1, 99), Shape(2, 2, 3, 99), Shape(7, 7, 8, 4))


class Req(SimpleNamespace):
    """SGLang's are told apart by identity."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def request(number: int, grammar: Any = None, **params: Any) -> Any:
    sampling = SamplingParams(**{"temperature": 0.0, **params})
    sampling.normalize(None)
    return Req(
        kv=SimpleNamespace(req_pool_idx=number),
        sampling_params=sampling,
        origin_input_ids=[1] * 9,
        output_ids=[2],
        grammar=grammar,
    )


def batch(*reqs: Any, decoding: list[Any] | None = None, drafting: list[bool] | None = None) -> Any:
    carry = SimpleNamespace(drafting=drafting or [True] * len(reqs))
    has_grammar = any(req.grammar for req in reqs)
    return SimpleNamespace(reqs=list(reqs), decoding_reqs=decoding, spec_info=carry, has_grammar=has_grammar)


@pytest.fixture
def planner() -> Planner:
    return planner_for(8)


def planner_for(requests: int) -> Planner:
    options = Options(None, SHAPES, chain=False, top_k=16)  # type: ignore[arg-type]
    return Planner(options, requests + 1, on_gpu=False, metrics=None)


def come_to(planner: Planner, step: Any, lens: list[int]) -> None:
    depths = np.arange(step.shape.depth + 1)
    nodes = torch.from_numpy(np.minimum(depths, np.array(lens)[:, None] - 1).clip(0))
    planner.learn(step, nodes, torch.tensor(lens), [request(1)] * len(lens))


def test_who_drafts_and_of_which_kind(planner: Planner) -> None:
    requests = request(3), request(5, temperature=0.8), request(4, grammar="json", frequency_penalty=0.5)
    step = planner.plan(batch(*requests, drafting=[True, True, False]))
    assert step.choice.requests.tolist() == [3, 5, 4]
    assert step.choice.kinds.tolist() == [0, 1, 2]
    assert step.choice.drafting.tolist() == [True, True, False]


def test_what_stands_between_two_steps_is_no_steps_cost(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("sglang_dflash.metrics.time.perf_counter", lambda: now[0])
    told: list[tuple[int, float]] = []
    took = lambda requests, shape, seconds, *_: told.append((requests, seconds))  # noqa: E731
    monkeypatch.setattr(planner.budget.cost, "took", took)
    one, steps = batch(request(1)), []
    for seconds in (2.0, 3.0, 50.0, 1.0):
        steps.append(planner.plan(one))
        now[0] += seconds
        if seconds == 50.0:  # a prompt came in
            planner.prefill(batch(request(2)))
    for step in steps:
        step.clock.done()
        come_to(planner, step, [1])
    assert told == [(1, 2.0), (1, 3.0)]


def test_a_step_is_priced_by_what_its_batch_asks_of_the_host(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(planner.budget.cost, "took", lambda *args: told.append(args[3]))
    masked, penalised = {"grammar": "json"}, {"presence_penalty": 1.0}
    for asked in ({}, masked, penalised, {**masked, **penalised}):
        planner.prefill(batch(request(2)))
        for _ in range(2):
            step = planner.plan(batch(request(1), request(2, **asked)))
            step.clock.done()
            come_to(planner, step, [1, 1])
    assert told == [0, 1, 2, 3]


def test_checks_of_grammars_are_told_apart_from_the_step_that_made_them(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three requests the last two have a grammar."""
    told: list[Any] = []
    monkeypatch.setattr(planner.budget.cost, "took", lambda *args: told.append(args[3:]))
    monkeypatch.setattr(planner.budget.cost, "checks_took", lambda *args: told.append(args))
    some = batch(request(1), request(2, grammar="json"), request(3, grammar="json"))
    steps = []
    for _ in range(2):
        steps.append(planner.plan(some))
        planner.checked(SimpleNamespace(rows=[1, 2], seconds=0.25))  # type: ignore[arg-type]
        steps[-1].clock.done()
        come_to(planner, steps[-1], [1, 1, 1])
    (numbers, seconds), _, of_step = told
    assert (numbers.tolist(), seconds, of_step) == ([2, 3], 0.25, (1, 0.25))


def test_a_new_request_inherits_nothing_of_its_numbers_last_owner(planner: Planner) -> None:
    first, other = request(1), request(2)
    for _ in range(60):
        come_to(planner, planner.plan(batch(first)), [1])  # accepts nothing
    gone = planner.budget.gain.expected(np.array([1]))[0, 1]
    planner.prefill(batch(other, first, decoding=[first]))  # a mixed batch: the first runs on
    assert planner.budget.gain.expected(np.array([1]))[0, 1] == gone
    planner.prefill(batch(request(1)))
    assert planner.budget.gain.expected(np.array([1]))[0, 1] > gone


def test_a_request_that_has_ended_teaches_nothing(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[list[int]] = []
    monkeypatch.setattr(
        planner.budget.gain, "learn", lambda requests, kinds, shape, nodes, lens: learned.append(requests.tolist())
    )
    come_to(planner, planner.plan(batch(request(1), request(2))), [0, 1])
    assert learned == [[2]]


def test_results_wait_until_the_step_behind_the_one_in_flight_is_launched(planner: Planner) -> None:
    """The GPU has nothing to do then, if the host is late; and of the last step nothing is left."""
    known = []
    planner.budget.learn = lambda choice, nodes, lens: known.append(lens.tolist())  # type: ignore[method-assign]
    running = batch(request(1))
    steps = [planner.plan(running), planner.plan(running)]
    come_to(planner, steps[0], [1])
    assert known == []
    steps.append(planner.plan(running))
    planner.catch_up()
    assert known == [[1]]
    come_to(planner, steps[1], [2])
    come_to(planner, steps[2], [3])
    assert known == [[1], [2], [3]]


def test_results_that_wait_teach_nothing_of_a_new_request(planner: Planner) -> None:
    usual = planner.budget.gain.expected(np.array([1]))
    steps = [planner.plan(batch(request(1))) for _ in range(2)]
    come_to(planner, steps[0], [1])
    planner.prefill(batch(request(1)))
    planner.catch_up()
    assert planner.budget.gain.expected(np.array([1])) == pytest.approx(usual, rel=0.05)


def test_the_log_says_what_was_chosen(
    planner: Planner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sglang_dflash")
    monkeypatch.setattr(plan.StepLog, "EVERY", 0.0)
    come_to(planner, planner.plan(batch(request(1), request(2))), [3, 1])
    assert caplog.messages[0].startswith("DFLASH: 1 steps of 2.0 requests, 0.0 ms each; 2.00 tokens a request (")
    assert caplog.messages[0].endswith("expected); 100% of 7 nodes.")


def test_contexts_are_gathered_where_metrics_want_them(planner: Planner) -> None:
    told: list[list[int]] = []
    planner._metrics = SimpleNamespace(step_done=lambda clock, shape, lens, contexts, _: told.append(contexts))  # type: ignore[assignment]
    come_to(planner, planner.plan(batch(request(1), request(2))), [1, 1])
    assert told == [[10, 10]]


def test_a_step_that_reads_prompts_is_no_example_and_nor_are_drafts_of_first_tokens(
    planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(planner.budget.cost, "took", lambda requests, *_: told.append(requests))
    new, hit, running = request(2), request(3), batch(request(1))
    steps = [planner.plan(running)]
    joined = batch(*running.reqs, new, hit)
    steps.append(planner.plan(joined, {new: [7] * 5, hit: []}))
    assert steps[-1].choice.drafting.tolist() == [True, False, False] and steps[-1].prompts == 2
    steps += [planner.plan(joined, {hit: []}), planner.plan(joined)]
    for step in steps:
        step.clock.done()
        come_to(planner, step, [1] * len(step.choice.requests))
    assert told == [1, 3]  # not the one that read five tokens


def test_prompts_are_read_where_a_pass_has_room_for_their_windows_beside_many() -> None:
    planner = planner_for(100)
    planner.plan(batch(*[request(n + 1) for n in range(40)]))
    assert planner.has_room(40, [512])  # 171 windows of the tree of two nodes
    assert not planner.has_room(40, [900]) and not planner.has_room(31, [3]) and not planner.has_room(100, [3])


def test_a_shape_without_room_for_what_is_to_be_read_is_not_chosen(planner: Planner) -> None:
    few, many = ([request(n + 1) for n in range(count)] for count in (3, 8))
    planner.budget.gain._mean[:, 2] = 99.0  # the largest tree would pay
    assert planner.plan(batch(*few), {few[0]: [5] * 400}).shape.nodes == 7
    assert planner.plan(batch(*few), {few[0]: [5] * 525}).shape.nodes == 2
    assert planner.plan(batch(*many), {many[0]: [5] * 9}).shape.nodes == 2
    assert planner.plan(batch(*many), {many[0]: [5] * 900}).shape.nodes == 2  # nobody was to join it; it is read
