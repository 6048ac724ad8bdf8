"""A request with a seed has one text: alone, in any batch, cold or after a prefix hit, and (test_lossless) under any
tree; and it is the text that a second implementation says.
"""

from __future__ import annotations

from typing import Any

from client import Body, generate
from seeded_reference import differs_at


def test_a_seeded_text_is_the_one_that_a_second_implementation_says(
    target_model: Any, seeded_bodies: list[Body], seeded_texts: list[list[int]]
) -> None:
    for body, text in zip(seeded_bodies, seeded_texts, strict=True):
        assert differs_at(target_model, body["input_ids"], text, body["sampling_params"]) == [], body["sampling_params"]


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
