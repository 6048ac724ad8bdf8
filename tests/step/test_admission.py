"""Requests that are refused before they are queued, and those that go on to SGLang's own rule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.speculative.dflash_utils import validate_dflash_request

from sglang_dflash.step.admission import refusal


def ask(*, overlap: bool, seed: object = None, **asked: object) -> str | None:
    params = SimpleNamespace(sampling_seed=seed)
    asked = {"return_hidden_states": False, "return_sampling_mask": False, "sampling_params": params, **asked}
    req = SimpleNamespace(**asked)
    return refusal(validate_dflash_request, req, overlap)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "asked", [{"return_hidden_states": True}, {"return_hidden_states": "last"}, {"return_sampling_mask": True}]
)
def test_what_no_step_gives_is_refused_with_its_name(asked: dict[str, object], overlap: bool) -> None:
    (name,), (value,) = asked, asked.values()
    message = ask(overlap=overlap, **asked)
    assert message is not None
    assert f"{name} is {value!r}" in message


@pytest.mark.parametrize(
    ("seed", "served"),
    [(0, True), (-(2**63), True), (2**63 - 1, True), (2**63, False), (-(2**63) - 1, False), ("7", False), (1.5, False)],
)
def test_a_seed_is_a_number_of_64_bits(seed: object, served: bool) -> None:
    message = ask(overlap=True, seed=seed)
    assert (message is None) is served
    assert served or f"the seed is {seed!r}" in str(message)


@pytest.mark.parametrize("overlap", [True, False])
def test_any_other_request_is_admitted(overlap: bool) -> None:
    assert ask(overlap=overlap) is None


def test_sglangs_own_rule_is_asked_too() -> None:
    params = SimpleNamespace(sampling_seed=None)
    req = SimpleNamespace(return_hidden_states=False, return_sampling_mask=False, sampling_params=params)
    assert refusal(lambda req, overlap: f"no, {overlap}", req, True) == "no, True"
