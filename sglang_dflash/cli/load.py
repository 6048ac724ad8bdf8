"""Requests to a running server, and what they cost.

They go to SGLang's own `/generate`, which streams token ids.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Any

import httpx


@dataclass(frozen=True)
class Answer:
    """One request's answer. With speculation, `steps` are the prefill's token and then the verify steps'."""

    ids: list[int]  # tokens of the answer
    steps: list[int]  # how many of them each chunk of the stream brought
    ttft: float  # seconds to the first chunk
    seconds: float  # seconds to the last
    verify_steps: int  # 0 without speculation
    accepted: int  # drafted tokens that were accepted


@dataclass(frozen=True)
class Round:
    """Answers to a list of prompts, in their order, and the wall time of all."""

    answers: list[Answer]
    seconds: float

    @property
    def tok_s(self) -> float:
        """Output tokens a second of wall time, prefill included."""
        return sum(len(a.ids) for a in self.answers) / self.seconds


def accept_length(answers: list[Answer]) -> float | None:
    """Tokens emitted per verify step, the bonus token included; None without speculation."""
    steps = sum(a.verify_steps for a in answers)
    return 1 + sum(a.accepted for a in answers) / steps if steps else None


def ask(
    url: str,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    concurrency: int = 1,
) -> Round:
    """Empty the server's prefix cache, then send every prompt (token ids), at most `concurrency` at once."""
    params = {"max_new_tokens": max_tokens, "temperature": temperature}

    async def run() -> Round:
        turn = asyncio.Semaphore(concurrency)
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            (await client.post("/flush_cache")).raise_for_status()

            async def one(ids: list[int]) -> Answer:
                async with turn:
                    return await _ask_one(
                        client, {"input_ids": ids, "sampling_params": params, "stream": True}
                    )

            begin = time.perf_counter()
            answers = await asyncio.gather(*map(one, prompts))
            return Round(list(answers), time.perf_counter() - begin)

    return asyncio.run(run())


async def _ask_one(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    ids: list[int] = []
    ends, times, meta = [0], [time.perf_counter()], {}
    async with client.stream("POST", "/generate", json=body) as response:
        if response.is_error:
            await response.aread()
            raise RuntimeError(f"the server answered {response.status_code}: {response.text}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[len("data: ") :])
            if "error" in chunk:
                raise RuntimeError(f"the server answered: {chunk['error']}")
            ids, meta = chunk["output_ids"], chunk["meta_info"]  # ids since the answer's beginning
            ends.append(len(ids))
            times.append(time.perf_counter())
    return Answer(
        ids=ids,
        steps=[b - a for a, b in pairwise(ends)],
        ttft=times[1] - times[0],
        seconds=times[-1] - times[0],
        verify_steps=meta.get("spec_verify_ct", 0),
        accepted=meta.get("spec_num_correct_drafts", 0),
    )


def gsm8k(count: int) -> list[str]:
    """The first questions of the GSM8K test set that ships with the package (400 of them)."""
    lines = resources.files("sglang_dflash").joinpath("data/gsm8k.jsonl").read_text().splitlines()
    if count > len(lines):
        raise ValueError(f"{count} prompts asked for, {len(lines)} shipped: ask for fewer")
    return [json.loads(line)["question"] for line in lines[:count]]


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a one-turn chat in the model's own template, up to where its answer begins."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))
