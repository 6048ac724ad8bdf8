"""A request with a seed has one text: alone, in any batch, cold or after a prefix hit; and it is the text that a second
implementation says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from client import Body, accept_length, generate
from seeded_reference import differs_at
from transformers import AutoModelForCausalLM

from sglang_dflash import embedded

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 0},
]
TOKENS = 24


def seeded(prompts: list[Body]) -> list[Body]:
    """Two prompts in every setting."""
    several = [(setting, prompt) for setting in SETTINGS for prompt in prompts[:2]]
    return [
        {
            "input_ids": prompt["input_ids"],
            "sampling_params": {**setting, "sampling_seed": 1000 + i, "max_new_tokens": TOKENS, "ignore_eos": True},
        }
        for i, (setting, prompt) in enumerate(several)
    ]


@pytest.fixture(scope="module")
def bodies(short_bodies: list[Body]) -> list[Body]:
    return seeded(short_bodies)


@pytest.fixture(scope="module")
def texts(default_server: str, bodies: list[Body]) -> list[list[int]]:
    answers = generate(default_server, bodies, len(bodies))
    assert accept_length(answers) > 1.05  # it drafts, as far as that pays
    return [answer["output_ids"] for answer in answers]


def test_a_seeded_text_is_the_one_that_a_second_implementation_says(
    pair: embedded.Pair, bodies: list[Body], texts: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()
    for body, text in zip(bodies, texts, strict=True):
        assert differs_at(model, body["input_ids"], text, body["sampling_params"]) == [], body["sampling_params"]


def test_a_seeded_text_is_the_same_alone_and_after_a_prefix_hit(
    default_server: str, bodies: list[Body], texts: list[list[int]]
) -> None:
    some = slice(0, None, 3)
    alone = generate(default_server, bodies[some], 1)
    assert [answer["output_ids"] for answer in alone] == texts[some]
    assert all(answer["meta_info"]["cached_tokens"] > 0 for answer in alone)


def test_samples_of_one_request_have_the_seeds_that_follow(default_server: str, bodies: list[Body]) -> None:
    params = bodies[0]["sampling_params"]
    (samples,) = generate(default_server, [{**bodies[0], "sampling_params": {**params, "n": 3}}], 1)
    each = [{**bodies[0], "sampling_params": {**params, "sampling_seed": 1000 + i}} for i in range(3)]
    assert [s["output_ids"] for s in samples] == [a["output_ids"] for a in generate(default_server, each, 3)]


def test_without_a_seed_each_request_has_its_own(default_server: str, bodies: list[Body]) -> None:
    body = {**bodies[0], "sampling_params": {"temperature": 1.0, "max_new_tokens": 16}}
    assert len({tuple(a["output_ids"]) for a in generate(default_server, [body] * 4, 4)}) == 4
