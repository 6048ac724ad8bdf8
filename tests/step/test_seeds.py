"""Every request has a seed: the user's, or one drawn once; and samples of one request have seeds of their own."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_dflash.step import seeds


@pytest.fixture(autouse=True)
def a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "get_device", lambda: SimpleNamespace(random_seed=5))
    seeds._server_seeds.cache_clear()


def settle(*given: int | None) -> tuple[list[Any], list[int]]:
    """Requests with these seeds, and the seeds of their batch."""
    reqs = [SimpleNamespace(sampling_params=SamplingParams(sampling_seed=seed)) for seed in given]
    return reqs, seeds_of(reqs)


def seeds_of(reqs: list[Any]) -> list[int]:
    settings = SimpleNamespace(temperatures=torch.ones(len(reqs), 1), sampling_seed=None)
    gathered = seeds.give_seeds(lambda cls, batch, vocab: settings, None, SimpleNamespace(reqs=reqs), 9)
    return gathered.sampling_seed.tolist()


def test_the_user_s_seed_is_kept_and_others_are_drawn_once() -> None:
    reqs, first = settle(None, 42, None, -(2**63))
    assert first[1] == 42 and first[3] == -(2**63)
    assert len(set(first)) == 4
    assert seeds_of(reqs[::-1]) == first[::-1]  # as after a retraction


def test_the_same_server_seed_draws_the_same_in_order() -> None:
    _, first = settle(None, None)
    seeds._server_seeds.cache_clear()
    assert settle(None, None)[1] == first


@pytest.mark.parametrize(
    ("seed", "n", "tokens", "sent"),
    [
        (7, 3, 9, [7, 8, 9]),
        (2**63 - 1, 2, 9, [2**63 - 1, -(2**63)]),
        (None, 2, 9, [None, None]),
        (7, 1, 9, [7, 7]),
        (7, 3, 0, [7, 7]),
    ],
)
def test_samples_of_one_request_get_seeds_of_their_own(
    seed: int | None, n: int, tokens: int, sent: list[int | None]
) -> None:
    shared, got = SamplingParams(sampling_seed=seed, n=n, max_new_tokens=tokens), []

    async def send(manager: Any, request: Any) -> None:
        got.append(request.sampling_params.sampling_seed)

    async def send_all() -> None:
        for _ in sent:
            await seeds.seed_each_sample(send, None, SimpleNamespace(sampling_params=shared))

    asyncio.run(send_all())
    assert got == sent
