"""Sampled text has the target's own distribution, by a chi-square test against its exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from client import Body, accept_length, generate
from conftest import Serve, planted
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sglang_dflash import embedded
from sglang_dflash.cli.load import chat_ids

SAMPLES, FEW_SAMPLES, LENGTH = 1200, 1000, 4
OF_NEIGHBOURS = 720  # samples at either temperature
AT_ONCE = 40  # samples of one request
BESIDE = 24  # of either neighbour: both run at once, where 48 requests may
COLD = 0.6  # the temperature of a neighbour
QUESTION = "Tom has 3 boxes with 12 pencils each. How many pencils does he have?"

TREE = "--speculative-num-draft-tokens 3 --speculative-num-steps 3 --random-seed 1"
CHAIN = TREE.replace("3", "2") + " --speculative-eagle-topk 1 --page-size 16"


@pytest.fixture(scope="module")
def prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return chat_ids(tokenizer, QUESTION)


@pytest.fixture(scope="module")
def model(pair: embedded.Pair) -> Any:
    return AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()


Paths = dict[tuple[int, ...], float]


def expected_paths(model: Any, prompt: list[int], temperature: float) -> Paths:
    """Probability of every first-4-tokens continuation that is expected 8 times or more; the rest is one cell."""
    beams: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(LENGTH):
        grown = {}
        for batch in _chunks(list(beams), 64):
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + list(path) for path in batch])).logits[:, -1]
            for path, logp in zip(batch, (logits / temperature).log_softmax(-1), strict=True):
                likely = (logp + beams[path] > math.log(8 / SAMPLES)).nonzero()[:, 0].tolist()
                grown.update({(*path, token): beams[path] + float(logp[token]) for token in likely})
        beams = grown
    return {path: math.exp(logp) for path, logp in beams.items()}


@pytest.fixture(scope="module")
def exact(model: Any, prompt: list[int]) -> Paths:
    return expected_paths(model, prompt, 1.0)


@pytest.fixture(scope="module")
def tree(serve: Serve) -> Iterator[str]:
    with serve("--speculative-algorithm", "DFLASH", *TREE.split()) as url:
        yield url


def samples_of(url: str, prompt: list[int], samples: int) -> list[Body]:
    params = {"temperature": 1.0, "max_new_tokens": LENGTH, "ignore_eos": True, "n": AT_ONCE}
    body = {"input_ids": prompt, "sampling_params": params}
    answers = [answer for many in generate(url, [body] * (samples // AT_ONCE), 2) for answer in many]
    assert len(answers) == samples
    assert accept_length(answers) > 1.15  # drafts were accepted, so they had their chance to be wrong
    return answers


def test_first_tokens_are_distributed_as_the_target_says(tree: str, prompt: list[int], exact: Paths) -> None:
    assert len(exact) >= 16
    assert sum(exact.values()) > 0.5
    assert (p := p_value(samples_of(tree, prompt, SAMPLES), exact)) > 0.001, f"p = {p:.2g}"


def test_neighbours_of_two_temperatures_are_each_distributed_as_the_target_says(
    tree: str, prompt: list[int], model: Any, exact: Paths
) -> None:
    warm, cold = p_values_of_neighbours(tree, prompt, exact, expected_paths(model, prompt, COLD))
    assert min(warm, cold) > 0.001, f"p = {warm:.2g}, {cold:.2g}"


@pytest.mark.parametrize("bug", ["prefer the draft", "a neighbour's settings"])
def test_a_planted_bug_is_seen(bug: str, serve: Serve, prompt: list[int], model: Any, exact: Paths) -> None:
    with serve("--speculative-algorithm", "DFLASH", *TREE.split(), env=planted(bug)) as url:
        if bug == "prefer the draft":
            p = p_value(samples_of(url, prompt, FEW_SAMPLES), exact)
            assert p < 1e-4, f"p = {p:.2g}"  # the noise that it knows makes a draft nearly right
        else:
            cold = expected_paths(model, prompt, COLD)
            assert max(p_values_of_neighbours(url, prompt, exact, cold)) < 1e-6


def test_first_tokens_of_a_chain_are_distributed_as_the_target_says(
    serve: Serve, prompt: list[int], exact: Paths
) -> None:
    with serve("--speculative-algorithm", "DFLASH", *CHAIN.split()) as url:
        assert (p := p_value(samples_of(url, prompt, FEW_SAMPLES), exact)) > 0.001, f"p = {p:.2g}"


def p_values_of_neighbours(url: str, prompt: list[int], warm: Paths, cold: Paths) -> tuple[float, float]:
    """Of samples at temperature 1 and of those at COLD that ran beside them."""
    params = {"max_new_tokens": LENGTH, "ignore_eos": True, "n": BESIDE}
    settings = [{"temperature": 1.0, **params}, {"temperature": COLD, "top_k": 1 << 20, **params}]
    bodies = [{"input_ids": prompt, "sampling_params": setting} for setting in settings]
    many = generate(url, bodies * (OF_NEIGHBOURS // BESIDE), 2)  # one of either temperature at a time
    halves = [[answer for answers in many[first::2] for answer in answers] for first in (0, 1)]
    return p_value(halves[0], warm), p_value(halves[1], cold)


def p_value(answers: list[Body], exact: Paths) -> float:
    counts = dict.fromkeys(exact, 0)
    for answer in answers:
        path = tuple(answer["output_ids"])
        if path in counts:
            counts[path] += 1
    observed = [*counts.values(), len(answers) - sum(counts.values())]
    expected = [len(answers) * p for p in exact.values()]
    return float(chisquare(observed, [*expected, len(answers) - sum(expected)]).pvalue)


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
