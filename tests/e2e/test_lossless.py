"""Whatever is drafted, the text is what plain decoding says: token for token, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from client import Body, accept_length, generate
from conftest import Plain, Serve

# Two tokens whose log-probabilities differ by less than this are tied: passes of different width round differently.
TIE = 1e-4


@dataclass(frozen=True)
class Case:
    """A server and how it is asked. accepts: accept length on GSM8K that it must at least reach."""

    args: str
    concurrency: int
    accepts: float
    short: int = 64
    long: int = 16


CASES = {
    "tree 15": Case("--speculative-num-draft-tokens 15", 16, 3.2),
    "tree 3, paged, no overlap": Case(
        "--speculative-num-draft-tokens 3 --page-size 16 --disable-overlap-schedule", 32, 2.2
    ),
    "tree 63, no radix": Case(
        "--speculative-num-draft-tokens 63 --disable-radix-cache", 8, 3.8, short=24, long=4
    ),
    "chain, paged, no radix": Case(
        "--speculative-num-draft-tokens 7 --speculative-eagle-topk 1 --page-size 16 --disable-radix-cache",
        4,
        2.5,
        short=32,
        long=8,
    ),
    "nothing drafted, mixed chunks": Case(
        "--speculative-num-draft-tokens 0 --chunked-prefill-size 256 --enable-mixed-chunk", 32, 1.0
    ),
    "tree 7, mixed chunks, paged": Case(
        "--speculative-num-draft-tokens 7 --chunked-prefill-size 256 --enable-mixed-chunk --page-size 16",
        16,
        2.8,
    ),
    "tree 31, alone": Case("--speculative-num-draft-tokens 31", 1, 3.6, short=8, long=2),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def server(case: Case, serve: Serve, plain: Plain) -> Iterator[str]:
    with serve("--speculative-algorithm", "DFLASH", *case.args.split()) as url:
        yield url


def test_text_is_that_of_plain_decoding(
    case: Case, server: str, plain: Plain, short_bodies: list[Body], long_bodies: list[Body]
) -> None:
    bodies = short_bodies[: case.short] + long_bodies[: case.long]
    expected = plain.short[: case.short] + plain.long[: case.long]
    answers = generate(server, bodies, case.concurrency)
    ties = [same_or_tied(answer, truth) for answer, truth in zip(answers, expected, strict=True)]
    assert sum(ties) <= 1, f"{sum(ties)} answers leave plain decoding's at a tie; one in 80 is chance"
    if "tokens 0" not in case.args:
        assert accept_length(answers[: case.short]) >= case.accepts


def test_a_prefix_hit_accepts_as_the_cold_prompt_does(
    case: Case, server: str, long_bodies: list[Body]
) -> None:
    if "tokens 0" in case.args or "disable-radix" in case.args:
        return  # nothing drafted, or nothing hit
    body = {
        **long_bodies[-1],
        "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True},
    }
    httpx.post(f"{server}/flush_cache").raise_for_status()
    cold, hit = (generate(server, [body], 1)[0] for _ in range(2))
    assert cold["meta_info"]["cached_tokens"] == 0
    assert hit["meta_info"]["cached_tokens"] > 1400
    assert hit["output_ids"] == cold["output_ids"]
    assert accept_length([hit]) == pytest.approx(accept_length([cold]), rel=0.02)


def same_or_tied(answer: Body, truth: Body) -> bool:
    """False where the answers are the same; True where they part at a tie. Anything else fails."""
    got, want = answer["output_ids"], truth["output_ids"]
    if got == want:
        return False
    at = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
    first, second = (entry[0] for entry in truth["meta_info"]["output_top_logprobs"][at][:2])
    assert first - second < TIE, (
        f"token {at} is {got[at]}, plain decoding says {want[at]} by {first - second:.4f}"
    )
    return True
