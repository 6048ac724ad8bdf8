"""Whom the scheduler tells of a step's results, by SGLang's own telling of a batch."""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_dflash import streaming


@pytest.fixture
def told() -> list[Any]:
    """What goes on its way to clients, a message a step."""
    return []


@pytest.fixture
def tell(told: list[Any]) -> Iterator[Callable[..., None]]:
    with get_context().override_server_args() as args, get_parallel().override(dp_rank=None, attn_tp_rank=0):
        streamer = SchedulerOutputStreamer(
            send_to_detokenizer=SimpleNamespace(send_output=told.append), tree_cache=None, server_args=args,
            is_generation=True, spec_algorithm=SpeculativeAlgorithm.DFLASH,
            disaggregation_mode=DisaggregationMode.NULL, enable_hicache_storage=lambda: False,
        )  # fmt: skip
        yield functools.partial(streaming.Teller().tell, SchedulerOutputStreamer.stream_output, streamer)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(streaming.time, "monotonic", lambda: clock.now)
    return clock


def request(name: str, **asked: Any) -> Req:
    params = SamplingParams(max_new_tokens=9, **asked)
    params.normalize(None)
    return Req(name, "", array("q", [1, 2]), params, stream=True, vocab_size=100)


def step(tell: Callable[..., None], reqs: list[Req], token: int = 7) -> None:
    for req in reqs:
        req.output_ids.append(token)
    tell(reqs, False)


def test_answers_that_begin_or_end_are_told_first(tell: Callable[..., None], told: list[Any], clock: Any) -> None:
    reqs = [request(name) for name in ("a", "b", "ends", "c", "begins", "begins and ends")]
    step(tell, reqs[:4])
    reqs[4].output_ids.append(7)
    reqs[5].output_ids.append(7)
    reqs[2].finished_reason = reqs[5].finished_reason = FINISH_LENGTH(2)
    clock.now += 0.01
    step(tell, reqs, 8)
    clock.now += 0.01
    tell(reqs, False)  # of what has ended nothing more
    assert [output.rids for output in told] == [
        ["a", "b", "ends", "c"],
        ["ends", "begins", "begins and ends", "a", "b", "c"],
        ["a", "b", "c", "begins"],
    ]
    assert [list(ids) for ids in told[1].output_ids] == [[8], [7, 8], [7, 8], [8], [8], [8]]


@pytest.mark.parametrize("seconds", [0.003, 0.013, 0.03])
def test_of_many_each_is_told_in_its_turn(
    tell: Callable[..., None], told: list[Any], clock: Any, seconds: float
) -> None:
    reqs, steps = [request(str(i)) for i in range(256)], 400
    for token in range(steps):
        clock.now += seconds
        step(tell, reqs, token)
    begin, again, *later = told  # whom it has told nothing for long a step tells at once
    assert len(begin.rids) == len(again.rids) == 256
    a_second = sum(len(output.rids) for output in later) / (len(later) * seconds)
    assert a_second == pytest.approx(min(streaming.A_SECOND, 256 / seconds), rel=0.05)
    assert max(len(output.rids) for output in later) < 2 * a_second * seconds  # some at each step
    turns = Counter(rid for output in later for rid in output.rids)
    assert max(turns.values()) - min(turns.values()) <= 2
    longest = max(len(ids) for output in later for ids in output.output_ids)
    assert longest <= 256 / streaming.A_SECOND / seconds + 2  # tokens, of which a step brings one
    for req in reqs:
        req.finished_reason = FINISH_LENGTH(steps)
    tell(reqs, False)
    text = {req.rid: [] for req in reqs}
    for output in told:
        for rid, ids in zip(output.rids, output.output_ids, strict=True):
            text[rid] += ids
    assert all(ids == [*range(steps)] for ids in text.values())


def test_few_are_told_of_every_step(tell: Callable[..., None], told: list[Any], clock: Any) -> None:
    reqs = [request(str(i)) for i in range(16)]
    for token in range(50):
        clock.now += 0.0033  # as small models' steps
        step(tell, reqs, token)
    assert [len(output.rids) for output in told] == [16] * 50


def test_whoever_gives_an_interval_has_it(tell: Callable[..., None], told: list[Any], clock: Any) -> None:
    reqs = [request("each", stream_interval=1), *(request(str(i)) for i in range(999))]
    for token in range(20):
        clock.now += 0.005
        step(tell, reqs, token)
    assert all("each" in output.rids for output in told) and len(told[-1].rids) < 60


def test_answers_in_one_piece_are_told_as_sglang_tells_them(clock: Any) -> None:
    reqs, seen, teller = [request(str(i)) for i in range(999)], [], streaming.Teller()
    for req in reqs:
        req.stream, req.send_token_offset = False, 1
    for _ in range(3):
        clock.now += 0.005
        teller.tell(lambda _, told: seen.append(told), None, reqs)
    assert seen == [reqs] * 3
