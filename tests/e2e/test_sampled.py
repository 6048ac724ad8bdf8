"""Sampled text has the target's own distribution, by a chi-square test against its exact probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from client import Body, accept_length, generate
from conftest import Serve, planted
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sglang_dflash import embedded
from sglang_dflash.cli.load import chat_ids

SAMPLES, FEW_SAMPLES, LENGTH = 1600, 1000, 4
OF_A_BUG = 480  # samples that show it
AT_ONCE = 40  # samples of one request
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


@pytest.mark.parametrize(
    ("args", "buggy", "samples"),
    [(TREE, False, SAMPLES), (CHAIN, False, FEW_SAMPLES), (TREE, True, OF_A_BUG)],
    ids=["tree", "chain", "planted bug"],
)
def test_first_tokens_are_distributed_as_the_target_says(
    args: str, buggy: bool, samples: int, serve: Serve, prompt: list[int], exact: Paths
) -> None:
    assert len(exact) >= 16
    assert sum(exact.values()) > 0.5
    env = planted("prefer the draft") if buggy else None
    params = {"temperature": 1.0, "max_new_tokens": LENGTH, "ignore_eos": True, "n": AT_ONCE}
    body = {"input_ids": prompt, "sampling_params": params}
    with serve("--speculative-algorithm", "DFLASH", *args.split(), env=env) as url:
        answers = [answer for many in generate(url, [body] * (samples // AT_ONCE), 2) for answer in many]
    assert len(answers) == samples
    assert accept_length(answers) > 1.15  # drafts were accepted, so they had their chance to be wrong
    p = p_value(answers, exact)
    assert p < 1e-6 if buggy else p > 0.001, f"p = {p:.2g}"


def p_value(answers: list[Body], exact: Paths) -> float:
    counts = dict.fromkeys(exact, 0)
    for answer in answers:
        path = tuple(answer["output_ids"])
        if path in counts:
            counts[path] += 1
    observed = [*counts.values(), len(answers) - sum(counts.values())]
    expected = [len(answers) * p for p in exact.values()]
    return float(chisquare(observed, [*expected, len(answers) - sum(expected)]).pvalue)


@pytest.mark.parametrize("buggy", [False, True], ids=["as served", "planted bug"])
def test_neighbours_of_two_temperatures_are_each_distributed_as_the_target_says(
    buggy: bool, serve: Serve, prompt: list[int], model: Any, exact: Paths
) -> None:
    cold = expected_paths(model, prompt, COLD)
    params = {"max_new_tokens": LENGTH, "ignore_eos": True, "n": AT_ONCE}
    samples = OF_A_BUG if buggy else FEW_SAMPLES
    settings = [{"temperature": 1.0, **params}, {"temperature": COLD, "top_k": 1 << 20, **params}]
    bodies = [{"input_ids": prompt, "sampling_params": setting} for setting in settings]
    env = planted("a neighbour's settings") if buggy else None
    with serve("--speculative-algorithm", "DFLASH", *TREE.split(), env=env) as url:
        many = generate(url, bodies * (samples // AT_ONCE), 2)  # one of either temperature at a time
    for half, paths in ((many[::2], exact), (many[1::2], cold)):
        p = p_value([answer for answers in half for answer in answers], paths)
        assert p < 1e-6 if buggy else p > 0.001, f"p = {p:.2g}"


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
