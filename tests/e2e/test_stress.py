"""A small pool, many kinds of requests, clients that leave: every answer right, and not a slot lost."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx
import pytest
from client import Body, metric
from conftest import ON_GPU, Plain, Serve, planted
from penalised_reference import differs_at

REQUESTS = 72
PENALISED = 8  # answers with penalties that are read again, the most retracted ones
POOL = 2048  # tokens; the requests running at once want more
RETRACT = {"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "20"}  # where the pool alone forces none
PATIENCE = (0.1, 0.3) if ON_GPU else (0.5, 2.0)  # seconds that a client which leaves waits, at least and beyond that


@pytest.mark.parametrize("beside", ["mixed chunks", "prompts beside one"])
def test_mixed_requests_in_a_small_pool(
    serve: Serve, plain: Plain, short_bodies: list[Body], target_model: Any, beside: str
) -> None:
    truths = [answer["output_ids"] for answer in plain.short]
    with serve(
        "--speculative-algorithm", "DFLASH", "--speculative-num-draft-tokens", "3", "--page-size", "16",
        "--max-total-tokens", str(POOL), "--max-running-requests", "24", "--schedule-conservativeness", "0.01",
        "--chunked-prefill-size", "256", "--enable-metrics",
        *(["--enable-mixed-chunk"] if beside == "mixed chunks" else []), env=planted("prompts beside one") | RETRACT,
    ) as url:  # fmt: skip
        wrong, left, penalised = asyncio.run(_load(url, truths, short_bodies))
        assert not wrong
        penalised.sort(key=lambda pair: pair[1]["meta_info"]["num_retractions"], reverse=True)
        for body, answer in penalised[:PENALISED]:
            assert differs_at(target_model, body, answer["output_ids"]) == []
        assert left > 5
        _wait_until_idle(url)
        assert metric(url, "sglang:num_retracted_requests_total") > 0
        read = metric(url, "sglang:dflash_prompts_beside_total")
        assert read == 0 if beside == "mixed chunks" else read > REQUESTS / 4
        httpx.post(f"{url}/flush_cache").raise_for_status()
        # The whole pool is free again: an answer that fills it ends there, with as many tokens as plain decoding's.
        left = 64
        params = {"temperature": 0, "max_new_tokens": 2 * POOL, "ignore_eos": True}
        long = {"input_ids": [300] * (POOL - left), "sampling_params": params}
        answer = httpx.post(f"{url}/generate", json=long, timeout=600).json()["meta_info"]
        assert (answer["finish_reason"]["type"], answer["completion_tokens"]) == ("length", left - 17)
        assert metric(url, "sglang:num_used_tokens") <= POOL


async def _load(
    url: str, truths: list[list[int]], short_bodies: list[Body]
) -> tuple[list[Any], int, list[tuple[Body, Body]]]:
    """Send the requests; gives what was answered wrongly, how many clients left early, and penalised answers."""
    rng = random.Random(0)
    turn = asyncio.Semaphore(48)
    wrong: list[Any] = []
    left, penalised = 0, []

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal left
        i = rng.randrange(len(short_bodies))
        tokens, kind = rng.randint(1, 64), rng.choice(["greedy"] * 4 + ["sampled", "penalty", "leaves"])
        params = {"temperature": 1.0 if kind == "sampled" else 0, "max_new_tokens": tokens}
        if kind == "penalty":
            params["frequency_penalty"] = 0.5
        patience = PATIENCE[0] + PATIENCE[1] * rng.random() if kind == "leaves" else 600
        body = {"input_ids": short_bodies[i]["input_ids"], "sampling_params": params}
        async with turn:
            try:
                answer = (await client.post("/generate", json=body, timeout=patience)).json()
            except httpx.ReadTimeout:
                left += 1
                return
        expected = truths[i][:tokens]
        if kind in ("greedy", "leaves") and answer["output_ids"] != expected:
            wrong.append((i, tokens, answer["output_ids"], expected))
        if kind == "penalty":
            penalised.append((body, answer))
        if not 1 <= len(answer["output_ids"]) <= tokens:
            wrong.append((i, tokens, answer))

    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(one(client) for _ in range(REQUESTS)))
    return wrong, left, penalised


def _wait_until_idle(url: str) -> None:
    """SGLang checks its pools for leaks whenever it falls idle, and dies of one."""
    deadline = time.monotonic() + 120
    while metric(url, "sglang:num_running_reqs") + metric(url, "sglang:num_queue_reqs") > 0:
        assert time.monotonic() < deadline, "requests still running after all answers"
        time.sleep(1)
