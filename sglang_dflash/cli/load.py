"""Requests to a running server, and what they cost.

They go to SGLang's own `/generate`, which streams token ids. SGLang's load generator (`sglang.benchmark.serving`) is
not used: it keeps an answer's text but neither its ids nor its verify steps, so whether the text is the same and what
a round's accept length is could not be told from it.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Any

import aiohttp
import httpx
import orjson

FLUSH_LIMIT = 30  # seconds
GSM8K = 1319  # questions of the test set
LONGEST_CHUNK = 10 * 2**20  # bytes of a line of the stream; aiohttp refuses longer ones


@dataclass(frozen=True)
class Answer:
    """One request's answer. With speculation, `steps` are the prefill's token and then the verify steps'."""

    ids: list[int]  # tokens of the answer
    steps: list[int]  # how many of them each chunk of the stream brought
    ttft: float  # seconds to the first chunk
    seconds: float  # seconds to the last
    verify_steps: int  # 0 without speculation
    accepted: int  # drafted tokens that were accepted

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first chunk; None where that was all."""
        rest = len(self.ids) - self.steps[0]
        return (self.seconds - self.ttft) / rest if rest else None


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
    stream_interval: int = 1,
) -> Round:
    """Empty the server's prefix cache, then send every prompt (token ids), at most `concurrency` at once.

    stream_interval: how many tokens a chunk of the stream brings at least, after the first chunk. 1: every step is a
    chunk, with all ids so far. `max_tokens`: two chunks, the first tokens and the whole answer.
    """
    params = {"max_new_tokens": max_tokens, "temperature": temperature, "stream_interval": stream_interval}
    bodies = [orjson.dumps({"input_ids": ids, "sampling_params": params, "stream": True}) for ids in prompts]

    async def run() -> Round:
        turn = asyncio.Semaphore(concurrency)
        async with aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(limit=0),  # the semaphore is the limit
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=LONGEST_CHUNK,
        ) as client:
            # SGLang flushes only when idle, and its scheduler may still be ending what came before.
            async with client.post("/flush_cache", params={"timeout": FLUSH_LIMIT}) as response:
                await _check(response)

            async def one(body: bytes) -> Answer:
                async with turn:
                    return await _ask_one(client, body)

            begin = time.perf_counter()
            answers = await asyncio.gather(*map(one, bodies))
            return Round(list(answers), time.perf_counter() - begin)

    return asyncio.run(run())


async def _ask_one(client: aiohttp.ClientSession, body: bytes) -> Answer:
    ids: list[int] = []
    ends, times, meta = [0], [time.perf_counter()], {}
    async with client.post("/generate", data=body, headers={"Content-Type": "application/json"}) as response:
        await _check(response)
        async for line in response.content:
            if not line.startswith(b"data: {"):  # an empty line, or the end: data: [DONE]
                continue
            times.append(time.perf_counter())
            chunk = orjson.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(f"the server answered: {chunk['error']}")
            ids, meta = chunk["output_ids"], chunk["meta_info"]  # ids since the answer's beginning
            ends.append(len(ids))
    if len(ids) != meta.get("completion_tokens"):
        raise RuntimeError(
            f"{len(ids)} ids came of an answer of {meta.get('completion_tokens')} tokens: a server under test must "
            "stream all ids so far, leave out --incremental-streaming-output"
        )
    return Answer(
        ids=ids,
        steps=[b - a for a, b in pairwise(ends)],
        ttft=times[1] - times[0],
        seconds=times[-1] - times[0],
        verify_steps=meta.get("spec_verify_ct", 0),
        accepted=meta.get("spec_num_correct_drafts", 0),
    )


async def _check(response: aiohttp.ClientResponse) -> None:
    if not response.ok:
        raise RuntimeError(f"the server answered {response.status}: {await response.text()}")


def memory_gb(url: str) -> dict[str, float] | None:
    """Memory of its device that a server says it took; None where it tells nothing.

    The target's weights and KV cache, and the captured graphs of target and draft: SGLang does not count a draft's
    weights and KV cache.
    """
    states = httpx.get(f"{url}/server_info", timeout=60).raise_for_status().json().get("internal_states")
    used = states[0].get("memory_usage") if states else None
    if used is None:
        return None
    graphs = round(sum(used["graph"].values()), 3)
    return {"weights": used["weight"], "kv_cache": used["kvcache"], "graphs": graphs}


def questions(benchmark: str, count: int) -> list[str]:
    """The first prompts of a benchmark that ships with the package. Raises ValueError if it has fewer."""
    lines = resources.files("sglang_dflash").joinpath(f"data/{benchmark}.jsonl").read_text().splitlines()
    if count > len(lines):
        raise ValueError(
            f"{count} prompts are wanted, but {benchmark} has {len(lines)}: ask for fewer (--prompts, --per-slot, "
            "--concurrency)"
        )
    return [next(iter(json.loads(line).values())) for line in lines[:count]]


def gsm8k(count: int) -> list[str]:
    """The first questions of the GSM8K test set."""
    return questions("gsm8k", count)


def long_chats(tokenizer: Any, problems: list[str], tokens: int, count: int) -> list[list[int]]:
    """Token ids of `count` chats of at most so many tokens, as near to it as whole problems come: each a list of
    problems, and one of them to solve. Every list begins with another problem, so none is a prefix of another.

    Raises ValueError where even two problems are longer.
    """
    sizes = [len(ids) for ids in tokenizer([f"{n}. {p}\n" for n, p in enumerate(problems, 1)])["input_ids"]]
    chats = []
    for first in range(count):
        around = [(first + i) % len(problems) for i in range(len(problems))]
        most = next((n for n in range(1, len(problems)) if sum(sizes[i] for i in around[:n]) > tokens), len(problems))
        ids = next(
            (
                ids
                for n in range(most, 1, -1)
                if len(ids := listed_ids(tokenizer, [problems[i] for i in around[:n]], first % n)) <= tokens
            ),
            None,
        )
        if ids is None:
            raise ValueError(f"a prompt of {tokens} tokens has no room for two problems: ask for 300 or more")
        chats.append(ids)
    return chats


def listed_ids(tokenizer: Any, problems: list[str], which: int) -> list[int]:
    """Token ids of a chat: a numbered list of problems, and number `which`, from 0, to solve."""
    numbered = "\n".join(f"{n}. {problem}" for n, problem in enumerate(problems, start=1))
    return chat_ids(tokenizer, f"Here are some problems.\n{numbered}\nSolve problem {which + 1}.")


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a one-turn chat in the model's own template, up to where its answer begins."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))
