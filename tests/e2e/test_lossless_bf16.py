"""In bfloat16, on a GPU: the text is plain decoding's, up to what plain decoding itself changes with its batch size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import torch
from client import Body, accept_length, generate
from conftest import ON_GPU, Serve, planted

pytestmark = pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_capability()[0] not in (8, 9),
    reason="needs a GPU with FlashAttention-3: compute capability 8 or 9",
)

PROMPTS, TOKENS = 32, 96
# A pass over a tree rounds in other places than a pass over a batch does: at most twice as much may come of it.
FACTOR = 2.0
BF16 = ("--dtype", "bfloat16")

TopTwo = list[tuple[float, int, str | None]]
"""(log-probability, token, text) of the two likeliest tokens."""


@dataclass(frozen=True)
class Case:
    """A tree server's arguments and its nodes."""

    args: str
    nodes: int


CASES = {
    "tree 63": Case("--speculative-num-draft-tokens 63 --speculative-num-steps 15", 63),
    "tree 15, pages of 16": Case("--speculative-num-draft-tokens 15 --speculative-num-steps 8 --page-size 16", 15),
    "tree 2, pages of 64": Case("--speculative-num-draft-tokens 2 --speculative-num-steps 2 --page-size 64", 2),
}


@dataclass(frozen=True)
class Truth:
    """Plain decoding's answers to one prompt at a time, and how far the width of its passes moves the gap of its two
    likeliest tokens, at most."""

    answers: list[Body]
    noise: float


@pytest.fixture(scope="module")
def bodies(short_bodies: list[Body]) -> list[Body]:
    params = {"temperature": 0, "max_new_tokens": TOKENS}
    return [{"input_ids": body["input_ids"], "sampling_params": params} for body in short_bodies[:PROMPTS]]


@pytest.fixture(scope="module")
def truth(serve: Serve, bodies: list[Body]) -> Truth:
    asked = [{**body, "return_logprob": True, "top_logprobs_num": 2} for body in bodies]
    with serve(*BF16) as url:
        alone = generate(url, asked, 1)
        httpx.post(f"{url}/flush_cache").raise_for_status()
        together = generate(url, asked, PROMPTS)
        read = generate(url, [whole(body, answer) for body, answer in zip(asked, alone, strict=True)], 1)
    return Truth(alone, max(*map(moved, alone, together), *map(moved, alone, read)))


def whole(body: Body, answer: Body) -> Body:
    """Asks for what one wide pass says of an answer."""
    ids, tokens = body["input_ids"], answer["output_ids"]
    one = {"temperature": 0, "max_new_tokens": 1}
    return {**body, "input_ids": ids + tokens, "logprob_start_len": len(ids) - 1, "sampling_params": one}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def server(case: Case, serve: Serve, truth: Truth) -> Iterator[str]:
    with serve(*BF16, "--speculative-algorithm", "DFLASH", "--enable-metrics", *case.args.split()) as url:
        yield url


def test_noise_is_small_beside_what_a_token_is_decided_by(truth: Truth) -> None:
    """Else the tests here could not fail."""
    gaps = torch.tensor([gap(answer, at) for answer in truth.answers for at in range(length(answer))])
    assert truth.noise > 0
    assert (gaps < FACTOR * truth.noise).float().mean() < 0.5, f"noise {truth.noise:.3f}"


def test_answers_to_other_prompts_are_told_apart(truth: Truth) -> None:
    shifted = truth.answers[1:] + truth.answers[:1]
    assert len(beyond_noise(shifted, truth)) > PROMPTS / 4


def test_a_walk_that_prefers_the_draft_is_told_apart(serve: Serve, bodies: list[Body], truth: Truth) -> None:
    args = ("--speculative-algorithm", "DFLASH", "--speculative-num-draft-tokens", "15")
    with serve(*BF16, *args, env=planted("prefer the draft")) as url:
        answers = generate(url, bodies, PROMPTS)
    assert beyond_noise(answers, truth) != []


@pytest.mark.parametrize("concurrency", [1, PROMPTS])
def test_text_is_plain_decodings_up_to_its_own_noise(
    case: Case, concurrency: int, server: str, bodies: list[Body], truth: Truth
) -> None:
    answers = generate(server, bodies, concurrency)
    assert tree_nodes(server) == case.nodes
    assert beyond_noise(answers, truth) == []
    assert accept_length(answers) > 2.0


def tree_nodes(url: str) -> float:
    """Drafted nodes of a tree, as the server's metrics tell them; SGLang's own DFLASH worker tells none."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    (line,) = [line for line in lines if line.startswith("sglang:dflash_tree_nodes{")]
    return float(line.rsplit(" ", 1)[1])


def beyond_noise(answers: list[Body], truth: Truth) -> list[str]:
    """Answers that leave plain decoding's where it was sure, in words."""
    wrong = []
    for i, (answer, plain) in enumerate(zip(answers, truth.answers, strict=True)):
        got, want = answer["output_ids"], plain["output_ids"]
        at = parting(answer, plain)
        if got == want:
            continue
        if at == min(len(got), len(want)):
            wrong.append(f"answer {i} has {len(got)} tokens, plain decoding's {len(want)}")
        elif gap(plain, at) >= FACTOR * truth.noise:
            wrong.append(
                f"answer {i}: token {at} is {got[at]}, plain decoding says {want[at]} by {gap(plain, at):.3f}, "
                f"and its noise is {truth.noise:.3f}"
            )
    return wrong


def top_twos(answer: Body) -> list[TopTwo]:
    """The two likeliest tokens at each place of an answer, or of one that was read."""
    meta = answer["meta_info"]
    read = [place[:2] for place in meta.get("input_top_logprobs") or [] if place]
    return read or [place[:2] for place in meta["output_top_logprobs"]]


def moved(alone: Body, other: Body) -> float:
    """How far the gap of alone's two likeliest tokens moves, at most, where the same two are the likeliest."""
    furthest = 0.0
    for (one, two), (first, second) in zip(top_twos(alone), top_twos(other), strict=False):
        logprobs = {token: logprob for logprob, token, _ in (first, second)}
        if {one[1], two[1]} == logprobs.keys():
            furthest = max(furthest, abs(one[0] - two[0] - (logprobs[one[1]] - logprobs[two[1]])))
        if first[1] != one[1]:
            break  # what follows may follow another token
    return furthest


def parting(one: Body, other: Body) -> int:
    """The first place where two answers differ, or the length of the shorter."""
    pairs = list(zip(one["output_ids"], other["output_ids"], strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def length(answer: Body) -> int:
    return len(answer["output_ids"])


def gap(answer: Body, at: int) -> float:
    (first, *_), (second, *_) = top_twos(answer)[at]
    return first - second
