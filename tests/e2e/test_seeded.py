"""A request with a seed has one text: alone, in any batch, cold or after a prefix hit, and (test_lossless) under any
tree; and it is the text that a second implementation says.
"""

from __future__ import annotations

from typing import Any

import torch
from client import Body, generate
from seeded_reference import differs_at

WATCHED = [28, 30]  # tokens whose log-probabilities are asked for


def test_a_seeded_text_is_the_one_that_a_second_implementation_says(
    target_model: Any, seeded_bodies: list[Body], seeded_texts: list[list[int]]
) -> None:
    for body, text in zip(seeded_bodies, seeded_texts, strict=True):
        assert differs_at(target_model, body["input_ids"], text, body["sampling_params"]) == [], body["sampling_params"]


def test_log_probabilities_are_those_at_each_request_s_temperature(
    target_model: Any, default_server: str, seeded_bodies: list[Body], seeded_texts: list[list[int]]
) -> None:
    """Of the chosen token, the likeliest and those asked for, in one batch of many settings; no filter changes them."""
    asked = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": WATCHED}
    some = slice(0, None, 2)
    bodies, texts = seeded_bodies[some], seeded_texts[some]
    answers = generate(default_server, [{**body, **asked} for body in bodies], len(bodies))
    for body, text, answer in zip(bodies, texts, answers, strict=True):
        assert answer["output_ids"] == text
        with torch.inference_mode():
            logits = target_model(torch.tensor([body["input_ids"] + text])).logits[0, len(body["input_ids"]) - 1 : -1]
        exact = (logits / (body["sampling_params"]["temperature"] or 1.0)).log_softmax(-1)
        meta, rows = answer["meta_info"], torch.arange(len(text))
        for name, expected in (
            ("output_token_logprobs", exact[rows, text][:, None]),
            ("output_top_logprobs", exact.topk(3).values),
            ("output_token_ids_logprobs", exact[:, WATCHED]),
        ):
            got = meta[name] if name != "output_token_logprobs" else [[entry] for entry in meta[name]]
            values = torch.tensor([[entry[0] for entry in entries] for entries in got])
            torch.testing.assert_close(values, expected, atol=2e-3, rtol=0)


def test_a_seeded_text_is_the_same_alone_and_after_a_prefix_hit(
    default_server: str, seeded_bodies: list[Body], seeded_texts: list[list[int]]
) -> None:
    some = slice(0, None, 3)
    alone = generate(default_server, seeded_bodies[some], 1)
    assert [answer["output_ids"] for answer in alone] == seeded_texts[some]
    assert all(answer["meta_info"]["cached_tokens"] > 0 for answer in alone)


def test_samples_of_one_request_have_the_seeds_that_follow(default_server: str, seeded_bodies: list[Body]) -> None:
    params = seeded_bodies[0]["sampling_params"]
    (samples,) = generate(default_server, [{**seeded_bodies[0], "sampling_params": {**params, "n": 3}}], 1)
    each = [{**seeded_bodies[0], "sampling_params": {**params, "sampling_seed": 1000 + i}} for i in range(3)]
    assert [s["output_ids"] for s in samples] == [a["output_ids"] for a in generate(default_server, each, 3)]


def test_without_a_seed_each_request_has_its_own(default_server: str, seeded_bodies: list[Body]) -> None:
    body = {**seeded_bodies[0], "sampling_params": {"temperature": 1.0, "max_new_tokens": 16}}
    assert len({tuple(a["output_ids"]) for a in generate(default_server, [body] * 4, 4)}) == 4
