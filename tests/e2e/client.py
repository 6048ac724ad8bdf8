"""Talking to a server under test through SGLang's native /generate."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

Body = dict[str, Any]


def generate(url: str, bodies: list[Body], concurrency: int) -> list[Body]:
    """Post every body, at most `concurrency` at once; gives the answers in the bodies' order."""

    async def run() -> list[Body]:
        turn = asyncio.Semaphore(concurrency)
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:

            async def one(body: Body) -> Body:
                async with turn:
                    response = await client.post("/generate", json=body)
                assert response.status_code == httpx.codes.OK, response.text
                return response.json()

            return await asyncio.gather(*map(one, bodies))

    return asyncio.run(run())


def accept_length(answers: list[Body]) -> float:
    """Tokens emitted per verify step over all answers, the free one included."""
    steps = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
    return 1 + sum(a["meta_info"]["spec_num_correct_drafts"] for a in answers) / steps


def metrics(url: str) -> dict[str, float]:
    """SGLang's, and ours among them, by name and labels."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("sglang:")}


def metric(url: str, name: str) -> float:
    """What a server's metric of this name comes to, all labels together."""
    return sum(value for label, value in metrics(url).items() if label.startswith(name))
