"""Whatever is drafted, the text is what plain decoding says: token for token, in float32."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from client import Body, accept_length, generate, metric
from conftest import ON_GPU, Plain, Serve, planted
from penalised_reference import differs_at
from prompts import CONTEXT
from turns import kit_of_cache_hits, kit_of_kl, kit_of_sessions

from sglang_dflash import embedded
from sglang_dflash.kernels.lattice import LIKELIEST

# Two tokens whose log-probabilities differ by less are tied: passes of different width round differently.
TIE = 1e-4
OFFLINE = Path(__file__).parents[2] / "scripts" / "accept_length.py"
OFFLINE_ANSWERS = 8


@dataclass(frozen=True)
class Case:
    """A server and how it is asked. kind: its nodes (None: a chain) and depth, and window: how far its draft sees where
    that is not the draft's own, for the offline computation. plant: what is put into it.
    """

    args: str
    concurrency: int
    short: int = 24
    long: int = 4
    kind: tuple[int | None, int] | None = None
    plant: str = ""
    window: int | None = None


CASES = {
    "tree 15": Case(
        "--speculative-num-draft-tokens 15 --speculative-num-steps 8 --enable-metrics", 8, kind=(15, 8),
        plant="prompts beside one",
    ),
    "tree 3, paged, no overlap": Case(
        "--speculative-num-draft-tokens 3 --speculative-num-steps 3 --page-size 16 --disable-overlap-schedule "
        "--enable-streaming-session --enable-metrics",
        8, kind=(3, 3), plant="prompts beside one",
    ),
    "tree 63, no radix": Case(
        "--speculative-num-draft-tokens 63 --speculative-num-steps 11 --disable-radix-cache "
        f"--context-length {CONTEXT}",
        8, short=16, long=2,
    ),
    "chain, alone, paged, no radix": Case(
        "--speculative-num-draft-tokens 7 --speculative-num-steps 7 --speculative-eagle-topk 1 --page-size 16 "
        "--disable-radix-cache",
        1, short=8, long=2, kind=(None, 7),
    ),
    "any shape, mixed chunks, three ranks": Case(
        "--speculative-num-draft-tokens 7 --chunked-prefill-size 256 --enable-mixed-chunk --tp-size 3", 32, short=12,
        long=2,
        plant="any shape",
    ),
    "tree 7, a short window, mixed chunks, paged": Case(
        "--speculative-num-draft-tokens 7 --speculative-num-steps 7 --chunked-prefill-size 256 --enable-mixed-chunk "
        "--page-size 16 --speculative-draft-window-size 24 --enable-streaming-session",
        16, kind=(7, 7), window=24,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def server(case: Case, serve: Serve) -> Iterator[str]:
    env = planted(case.plant) if case.plant else None
    with serve("--speculative-algorithm", "DFLASH", *case.args.split(), env=env) as url:
        yield url


@pytest.fixture(scope="module")
def answers(case: Case, server: str, short_bodies: list[Body], long_bodies: list[Body]) -> list[Body]:
    return generate(server, short_bodies[: case.short] + long_bodies[: case.long], case.concurrency)


@pytest.fixture(scope="module")
def seeded_answers(case: Case, server: str, seeded_bodies: list[Body]) -> list[Body]:
    return generate(server, seeded_bodies[: case.short // 2], case.concurrency)


@pytest.fixture(scope="session")
def offline(pair: embedded.Pair) -> Callable[..., float]:
    """Tokens a step, computed from transformers: of(kind, window, rows as text).

    A CPU's server gives noise to the likeliest tokens alone.
    """
    read = runpy.run_path(str(OFFLINE))

    @cache
    def of(kind: tuple[int | None, int], window: int | None, rows: str) -> float:
        args = pair.target, pair.draft, json.loads(rows), {"": kind}, window, 0 if ON_GPU else LIKELIEST
        return read["accept_lengths"](*args)[""]  # type: ignore[no-any-return]

    return of


def test_text_is_that_of_plain_decoding(case: Case, answers: list[Body], plain: Plain) -> None:
    expected = plain.short[: case.short] + plain.long[: case.long]
    ties = [same_or_tied(answer, truth) for answer, truth in zip(answers, expected, strict=True)]
    assert sum(ties) <= 1, f"{sum(ties)} answers leave plain decoding's at a tie; one in 40 is chance"
    assert accept_length(answers[: case.short]) > (1.5 if case.plant == "any shape" else 2.0)


def test_prompts_were_read_beside_trees(case: Case, server: str, answers: list[Body]) -> None:
    """Those that came alone or in twos: too many at once have a pass of their own."""
    if case.plant == "prompts beside one":
        assert metric(server, "sglang:dflash_prompts_beside_total") >= 5


def test_seeded_text_is_the_same_under_any_tree(seeded_answers: list[Body], seeded_texts: list[list[int]]) -> None:
    assert [answer["output_ids"] for answer in seeded_answers] == seeded_texts[: len(seeded_answers)]
    assert accept_length(seeded_answers) > 1.2


def test_penalties_count_each_request_s_own_tokens(
    server: str, penalised_bodies: list[Body], target_model: Any
) -> None:
    answers = generate(server, penalised_bodies, len(penalised_bodies))
    for body, answer in zip(penalised_bodies, answers, strict=True):
        assert differs_at(target_model, body, answer["output_ids"]) == [], body["sampling_params"]
    assert accept_length(answers[1:]) > 1.2  # the first has none


def test_accept_length_is_what_transformers_say(
    case: Case,
    server: str,
    answers: list[Body],
    short_bodies: list[Body],
    known_answers: Path,
    offline: Callable[..., float],
) -> None:
    if case.kind is None:
        return
    if "mixed" in case.args:  # beside a prefill a request takes one token unverified: here none is beside it
        answers = generate(server, short_bodies[:OFFLINE_ANSWERS], 1)
    rows = json.loads(known_answers.read_text())[:OFFLINE_ANSWERS]
    want = offline(case.kind, case.window, json.dumps(rows))
    assert tokens_a_step(answers[:OFFLINE_ANSWERS]) == pytest.approx(want, rel=0.03)


def test_sampled_answers_are_drafted_by_the_noise_of_their_samples(
    case: Case, seeded_bodies: list[Body], seeded_answers: list[Body], offline: Callable[..., float]
) -> None:
    """Without the noise it is less by a sixth, with another position's less than that."""
    if case.kind is None or "mixed" in case.args:
        return
    rows = []
    for body, answer in list(zip(seeded_bodies, seeded_answers, strict=False))[:OFFLINE_ANSWERS]:
        params = body["sampling_params"]
        row = {"prompt": body["input_ids"], "answer": answer["output_ids"]}
        rows.append({**row, "seed": params["sampling_seed"], "temperature": params["temperature"]})
    want = offline(case.kind, case.window, json.dumps(rows))
    assert tokens_a_step(seeded_answers[: len(rows)]) == pytest.approx(want, rel=0.05)


def test_a_prefix_hit_accepts_as_the_cold_prompt_does(case: Case, server: str, long_bodies: list[Body]) -> None:
    if "disable-radix" in case.args:
        return  # nothing is hit
    body = {**long_bodies[-1], "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}}
    httpx.post(f"{server}/flush_cache").raise_for_status()
    cold, hit = (generate(server, [body], 1)[0] for _ in range(2))
    assert cold["meta_info"]["cached_tokens"] == 0
    assert hit["meta_info"]["cached_tokens"] > 1400
    assert hit["output_ids"] == cold["output_ids"]
    assert accept_length([hit]) == pytest.approx(accept_length([cold]), rel=0.3 if case.plant == "any shape" else 0.02)


def test_the_end_of_the_context_ends_an_answer_alone(
    case: Case, server: str, plain: Plain, to_the_end: list[Body]
) -> None:
    """In a pool larger than the context: a step that reached further would write into another request's slots."""
    if "context-length" not in case.args:
        return
    short = {"input_ids": [300] * 40, "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
    *answers, beside = generate(server, [*to_the_end, short], 4)
    for answer, body, truth in zip(answers, to_the_end, plain.to_the_end, strict=True):
        assert not same_or_tied(answer, truth)
        assert answer["meta_info"]["finish_reason"]["type"] == "length"
        assert len(answer["output_ids"]) == CONTEXT - 2 - len(body["input_ids"])  # as many as plain decoding gives
    assert generate(server, [short], 1)[0]["output_ids"] == beside["output_ids"]


def tokens_a_step(answers: list[Body]) -> float:
    """Without the first token of each answer, a prefill's."""
    metas = [answer["meta_info"] for answer in answers]
    return sum(meta["completion_tokens"] - 1 for meta in metas) / sum(meta["spec_verify_ct"] for meta in metas)  # type: ignore[no-any-return]


def test_sessions_and_hits_on_pages(
    case: Case, server: str, pair: embedded.Pair, tokenizer: Any, short_bodies: list[Body], tmp_path: Path
) -> None:
    """SGLang's kits, whose page-1 half is in test_kits."""
    if "streaming-session" not in case.args:
        return
    for prompts in ("short", "long"):
        kit_of_sessions(server, tokenizer, prompts)
    kit_of_kl(server, str(pair.target), short_bodies[:3], "decode")
    kit_of_cache_hits(server, str(pair.target), tmp_path)


def same_or_tied(answer: Body, truth: Body) -> bool:
    """False where the answers are the same; True where they part at a tie. Anything else fails."""
    got, want = answer["output_ids"], truth["output_ids"]
    if got == want:
        return False
    at = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
    first, second = (entry[0] for entry in truth["meta_info"]["output_top_logprobs"][at][:2])
    assert first - second < TIE, f"token {at} is {got[at]}, plain decoding says {want[at]} by {first - second:.4f}"
    return True
