"""In bfloat16, on a GPU: the text is plain decoding's, up to what plain decoding itself changes with its batch size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import torch
from client import Body, accept_length, generate
from conftest import ON_GPU, Serve, planted
from prompts import chats_below, long_chats
from transformers import PreTrainedTokenizerBase

from sglang_dflash.cli.load import chat_ids, gsm8k
from sglang_dflash.platforms.cuda import FAST_CAPABILITIES, SHORT_PREFIX

pytestmark = pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_capability()[0] not in FAST_CAPABILITIES,
    reason="needs a GPU with FlashAttention-3: compute capability 8 or 9",
)

SHORT, GROWING, TOKENS = 128, 16, 96
BF16 = ("--dtype", "bfloat16")


@dataclass(frozen=True)
class Case:
    """A tree server's arguments and its nodes."""

    args: str
    nodes: int


CASES = {
    "tree 63": Case("--speculative-num-draft-tokens 63 --speculative-num-steps 15", 63),
    "tree 15, pages of 16": Case("--speculative-num-draft-tokens 15 --speculative-num-steps 8 --page-size 16", 15),
    "tree 15, beside FlashInfer": Case(
        "--speculative-num-draft-tokens 15 --speculative-num-steps 8 --attention-backend flashinfer", 15
    ),
    "tree 2, pages of 64": Case("--speculative-num-draft-tokens 2 --speculative-num-steps 2 --page-size 64", 2),
}


@dataclass(frozen=True)
class Truth:
    """Plain decoding's answers to one prompt at a time, and the widest gap between its two likeliest tokens at which a
    wider pass of its own decides otherwise: of all prompts at once, or one that reads a whole answer."""

    answers: list[Body]
    noise: float


@pytest.fixture(scope="module")
def bodies(tokenizer: PreTrainedTokenizerBase) -> list[Body]:
    return greedy_chats(tokenizer)


def greedy_chats(tokenizer: PreTrainedTokenizerBase) -> list[Body]:
    """Short ones, some that become long while they are answered, and long ones: wide windows are attended to in two
    ways, by that (platforms/cuda)."""
    params = {"temperature": 0, "max_new_tokens": TOKENS}
    short = [chat_ids(tokenizer, question) for question in gsm8k(SHORT)]
    growing = chats_below(tokenizer, SHORT_PREFIX, GROWING)
    assert min(map(len, growing)) > SHORT_PREFIX - TOKENS / 2
    return [{"input_ids": ids, "sampling_params": params} for ids in short + growing + long_chats(tokenizer)]


def with_gaps(bodies: list[Body]) -> list[Body]:
    """The same, their answers with what `gap` reads."""
    return [{**body, "return_logprob": True, "top_logprobs_num": 2} for body in bodies]


@pytest.fixture(scope="module")
def truth(serve: Serve, bodies: list[Body]) -> Truth:
    asked = with_gaps(bodies)
    with serve(*BF16) as url:
        alone = generate(url, asked, 1)
        httpx.post(f"{url}/flush_cache").raise_for_status()
        together = generate(url, asked, len(asked))
        read = generate(url, readings(asked, alone), 1)
    return Truth(alone, max(parted(alone, together) + misread(alone, read)))


def readings(bodies: list[Body], answers: list[Body]) -> list[Body]:
    """Ask for what one wide pass says of each answer."""
    one = {"temperature": 0, "max_new_tokens": 1}
    return [
        {
            **body,
            "input_ids": body["input_ids"] + answer["output_ids"],
            "logprob_start_len": len(body["input_ids"]) - 1,
            "sampling_params": one,
        }
        for body, answer in zip(bodies, answers, strict=True)
    ]


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
    assert (gaps <= truth.noise).float().mean() < 0.5, f"noise {truth.noise:.3f}"


def test_answers_to_other_prompts_are_told_apart(truth: Truth) -> None:
    shifted = truth.answers[1:] + truth.answers[:1]
    assert len(beyond_noise(shifted, truth)) > len(shifted) / 4


def test_a_walk_that_prefers_the_draft_is_told_apart(serve: Serve, bodies: list[Body], truth: Truth) -> None:
    args = ("--speculative-algorithm", "DFLASH", "--speculative-num-draft-tokens", "15")
    with serve(*BF16, *args, env=planted("prefer the draft")) as url:
        answers = generate(url, bodies, len(bodies))
    assert beyond_noise(answers, truth) != []


@pytest.mark.parametrize("at_once", ["one", "all"])
def test_text_is_plain_decodings_up_to_its_own_noise(
    case: Case, at_once: str, server: str, bodies: list[Body], truth: Truth
) -> None:
    answers = generate(server, bodies, 1 if at_once == "one" else len(bodies))
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
        elif gap(plain, at) > truth.noise:
            wrong.append(
                f"answer {i}: token {at} is {got[at]}, plain decoding says {want[at]} by {gap(plain, at):.3f}, "
                f"and its noise is {truth.noise:.3f}"
            )
    return wrong


def parted(alone: list[Body], together: list[Body]) -> list[float]:
    """The gaps at which answers to many prompts at once leave the answers to one at a time."""
    places = [(one, parting(one, other)) for one, other in zip(alone, together, strict=True)]
    return [gap(one, at) for one, at in places if at < length(one)]


def misread(alone: list[Body], read: list[Body]) -> list[float]:
    """The gaps at which passes that read whole answers would have decided otherwise."""
    gaps = []
    for one, other in zip(alone, read, strict=True):
        _, *places = other["meta_info"]["input_top_logprobs"]  # of the prompt's last token there is nothing to say
        decided = [place[0][1] for place in places]
        assert len(decided) == length(one)
        gaps += [gap(one, at) for at, token in enumerate(decided) if token != one["output_ids"][at]]
    return gaps


def parting(one: Body, other: Body) -> int:
    """The first place where two answers differ, or the length of the shorter."""
    pairs = list(zip(one["output_ids"], other["output_ids"], strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def length(answer: Body) -> int:
    return len(answer["output_ids"])


def gap(answer: Body, at: int) -> float:
    """Between the log-probabilities of the two likeliest tokens at a place of an answer."""
    (first, *_), (second, *_) = answer["meta_info"]["output_top_logprobs"][at][:2]
    return first - second
