"""The soak's plan holds every kind and its checks find what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from loading import load


@pytest.fixture(scope="module")
def soak() -> Any:
    return load("scripts/soak.py")


def planned(soak: Any, seed: int, *, able: bool = True) -> list[Any]:
    prompts = soak.Prompts(*([[i, n] * 20 for n in range(20)] for i in range(3)))
    return soak.plan(seed, 60, prompts, soak.Server("m", 8000, able, able))


def answer(ids: list[int], kind: str = "length", text: str = "") -> dict[str, Any]:
    meta = {"completion_tokens": len(ids), "finish_reason": {"type": kind}}
    return {"output_ids": ids, "text": text, "meta_info": meta}


def judged(soak: Any, kind: str, reply: Any, tokens: int = 4) -> str:
    truths = {"short 0": soak.Truth([1, 2, 3, 4, 5], [1.0, 1.0, 1e-5, 1.0, 1.0])}
    ask = soak.Ask(0, kind, soak.greedy([7], tokens), "short 0")
    return soak.judge(ask, reply, truths, 1e-4)[0]


def test_plan_is_the_same_for_a_seed_and_holds_every_kind(soak: Any) -> None:
    assert planned(soak, 3) == planned(soak, 3) != planned(soak, 4)
    assert {ask.kind for ask in planned(soak, 3)} == set(soak.KINDS)
    assert {ask.kind for ask in planned(soak, 3, able=False)} == set(soak.KINDS) - {"priority", "session"}


def test_what_is_compared_is_greedy_with_penalties_too(soak: Any) -> None:
    compared = [ask.body["sampling_params"] for ask in planned(soak, 3) if ask.truth]
    assert all(params["temperature"] == 0 for params in compared)
    assert any("penalty" in name for params in compared for name in params)


@pytest.mark.parametrize(
    ("ids", "verdict"),
    [([1, 2, 3, 4], "ok"), ([1, 9, 3, 4], "wrong"), ([1, 2, 9, 9], "tie"), ([1, 2, 3], "wrong"), ([], "wrong")],
)
def test_greedy_answers_are_held_to_the_truth(soak: Any, ids: list[int], verdict: str) -> None:
    assert judged(soak, "greedy", soak.Reply(200, [answer(ids)])) == verdict


def test_lost_refused_and_aborted_requests(soak: Any) -> None:
    gone = soak.Reply(error="TimeoutError: ")
    assert judged(soak, "greedy", gone) == judged(soak, "too long", gone) == "lost"
    assert judged(soak, "too long", soak.Reply(400, error="too long")) == "refused"
    assert judged(soak, "too long", soak.Reply(200, [answer([1])])) == "wrong"
    assert judged(soak, "greedy", soak.Reply(400, error="too long")) == "wrong"
    ended = soak.Reply(200, [answer([1, 2], "abort")])
    assert judged(soak, "greedy", ended) == "wrong"
    assert judged(soak, "aborted", ended) == "aborted"
    assert judged(soak, "leaves", soak.Reply(200, [answer([1, 2])], left=True)) == "aborted"
    assert judged(soak, "leaves", soak.Reply(200, [answer([1, 9])], left=True)) == "wrong"
    beyond = soak.Reply(200, [answer([1, 2, 3, 4, 5, 6, 7])])
    assert judged(soak, "leaves", beyond, 400) == "ok"  # its end came before the client left


def test_finished_schema_answers_parse(soak: Any) -> None:
    ids = [1, 2, 3, 4]
    assert judged(soak, "schema", soak.Reply(200, [answer(ids, "stop", '{"a": 1}')])) == "ok"
    assert judged(soak, "schema", soak.Reply(200, [answer(ids, "stop", '{"a": ')])) == "wrong"
    assert judged(soak, "schema", soak.Reply(200, [answer(ids, "length", '{"a": ')])) == "ok"


def test_tally_counts_and_keeps_what_is_wrong(soak: Any) -> None:
    tally = soak.Tally(2)
    ask = soak.Ask(0, "greedy", soak.greedy([7], 4), "short 0")
    tally.add(ask, soak.Reply(200, [answer([1, 2])]), "ok", "")
    tally.add(ask, soak.Reply(error="gone"), "lost", "gone")
    told = tally.summary()
    assert (told["answered"], told["tokens"], told["wrong"]) == (2, 2, 1)
    assert told["by_kind"] == {"greedy": {"ok": 1, "lost": 1}}


def test_the_server_without_speculation_takes_the_other_arguments(soak: Any) -> None:
    args = ["--dtype", "bfloat16", "--speculative-num-steps", "4", "--page-size", "16"]
    assert soak.without_speculation(args) == ["--dtype", "bfloat16", "--page-size", "16"]
