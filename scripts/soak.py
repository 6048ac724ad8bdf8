"""Thousands of mixed requests to one server: every answer right, nothing lost, and all of its memory back at the end.

    python scripts/soak.py --requests 2000 --concurrency 32 --out soak.json
    python scripts/soak.py --server-arg --dtype --server-arg bfloat16 --tie 0.6       (on a GPU)

A server without speculation says first what every greedy answer is. Then a server with DFLASH and a small pool is asked
all kinds of requests at once, while it is paused and its cache flushed now and then. Answers may part from the truth
only where the truth's two best tokens are about as probable. Exit code 1 if anything is wrong; the server's log is then
beside the report.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import httpx
import typer
from rich.console import Console

from sglang_dflash.cli.load import LONGEST_CHUNK, chat_ids, gsm8k
from sglang_dflash.cli.models import DraftOption, Models, TargetOption
from sglang_dflash.cli.server import starting

Body = dict[str, Any]

SERVER = (
    "--enable-metrics --max-total-tokens 8192 --page-size 16 --schedule-conservativeness 0.3 "
    "--enable-streaming-session --enable-priority-scheduling --log-level info"
)
ENV = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}  # it dies of a slot that is lost
SHORT, LONG, SHARED, SESSIONS = 20, 4, 4, 6  # distinct prompts
TURNS, TURN, ADDED = 3, 12, 24  # of a session: turns, tokens of an answer, tokens a turn adds
WHOLE, SETTING, LONG_ANSWER, ENDLESS = 64, 64, 24, 400  # tokens of an answer
OPEN_SESSIONS = 4  # at once: what they keep cannot be evicted from a small pool
TRUTH_AT_ONCE = 8

_SCHEMAS = (
    {"answer": {"type": "integer", "minimum": 0, "maximum": 9999}, "unit": {"type": "string", "maxLength": 12}},
    {"yes": {"type": "boolean"}, "why": {"type": "string", "maxLength": 16}},
    {"kind": {"enum": ["sum", "product", "rate"]}, "steps": {"type": "integer", "minimum": 1, "maximum": 9}},
    {"parts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}},
)
SCHEMAS = [json.dumps({"type": "object", "properties": p, "required": list(p)}) for p in _SCHEMAS]
PENALTIES = (
    {"frequency_penalty": 1.9}, {"presence_penalty": 1.9}, {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": 0.5},
)  # fmt: skip
STOPS = (["."], ["\n"], [" eggs", " per"], [" the", "zzz"])

KINDS = {  # kind -> how often, of each other
    "greedy": 30, "sampled": 8, "seeded": 6, "two answers": 4, "penalty": 8, "schema": 8, "stop": 6, "long": 4,
    "shared prefix": 8, "chat": 4, "leaves": 6, "aborted": 6, "session": 4, "priority": 4,
    "bad temperature": 2, "too long": 2, "bad schema": 2,
}  # fmt: skip
BAD = ("bad temperature", "too long", "bad schema")


@dataclass(frozen=True)
class Prompts:
    """Token ids of what is asked. shared: prompts with the same long beginning."""

    short: list[list[int]]
    long: list[list[int]]
    shared: list[list[int]]

    @classmethod
    def of(cls, tokenizer: Any) -> Prompts:
        questions = gsm8k(SHORT + 40)
        listed = "\n".join(questions[SHORT:])
        few = "\n".join(questions[SHORT : SHORT + 6])

        def ids(text: str) -> list[int]:
            return chat_ids(tokenizer, text)

        texts = [f"Here are some problems.\n{listed}\nSolve problem {i + 1}." for i in range(LONG)]
        return cls(
            short=[ids(question) for question in questions[:SHORT]],
            long=[chat[:20] + chat[-1500:] for chat in map(ids, texts)],
            shared=[ids(f"{few}\nWhat is problem {i + 1} about?") for i in range(SHARED)],
        )


@dataclass(frozen=True)
class Server:
    """What a server is able to do."""

    model: str
    longest: int  # tokens of a prompt that is too long
    priorities: bool
    sessions: bool

    def kinds(self) -> dict[str, int]:
        left_out = {"priority": not self.priorities, "session": not self.sessions}
        return {kind: weight for kind, weight in KINDS.items() if not left_out.get(kind)}


@dataclass(frozen=True)
class Ask:
    """One request of the plan: what is sent, and what it is compared with."""

    number: int
    kind: str
    body: Body
    truth: str | None = None  # key of the truth
    path: str = "/generate"
    after: float = 0.0  # seconds until the client leaves or the request is aborted

    @property
    def most(self) -> int:
        """Tokens an answer may have."""
        body = self.body
        return int(body["sampling_params"]["max_new_tokens"] if "sampling_params" in body else body["max_tokens"])


@dataclass(frozen=True)
class Truth:
    """A greedy answer without speculation; gaps: between its two best log-probabilities, at each token."""

    ids: list[int]
    gaps: list[float]


@dataclass
class Reply:
    """What came back. status None: no answer came, and `error` says how."""

    status: int | None = None
    answers: list[Body] = field(default_factory=list)
    error: str = ""
    left: bool = False


def greedy(ids: list[int], tokens: int, **params: Any) -> Body:
    return {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": tokens, **params}}


def greedy_bodies(prompts: Prompts) -> dict[str, Body]:
    """All that is asked greedily in single requests, by key."""
    bodies = {f"short {i}": greedy(ids, WHOLE) for i, ids in enumerate(prompts.short)}
    bodies |= {f"long {i}": greedy(ids, LONG_ANSWER) for i, ids in enumerate(prompts.long)}
    bodies |= {f"shared {i}": greedy(ids, LONG_ANSWER) for i, ids in enumerate(prompts.shared)}
    for i, penalty in enumerate(PENALTIES):
        bodies[f"penalty {i}"] = greedy(prompts.short[i], SETTING, **penalty)
    for i, schema in enumerate(SCHEMAS):
        bodies[f"schema {i}"] = greedy(prompts.short[i], SETTING, json_schema=schema)
    for i, stop in enumerate(STOPS):
        bodies[f"stop {i}"] = greedy(prompts.short[i], SETTING, stop=stop)
    return bodies


def added(prompts: Prompts, session: int, turn: int) -> list[int]:
    """What a turn of a session adds to it."""
    if turn == 0:
        return prompts.short[session]
    return prompts.short[(session + turn) % len(prompts.short)][-ADDED:]


def plan(seed: int, count: int, prompts: Prompts, server: Server) -> list[Ask]:
    """The requests, in their order: the same for a seed, and at least one of every kind that the server takes."""
    rng, weights = random.Random(seed), server.kinds()
    if count < len(weights):
        raise ValueError(f"--requests is {count}, but there are {len(weights)} kinds: ask for at least as many")
    kinds = [*weights, *rng.choices(list(weights), list(weights.values()), k=count - len(weights))]
    rng.shuffle(kinds)
    bodies = greedy_bodies(prompts)
    return [_ask(number, kind, rng, prompts, bodies, server) for number, kind in enumerate(kinds)]


def _ask(
    number: int, kind: str, rng: random.Random, prompts: Prompts, bodies: dict[str, Body], server: Server
) -> Ask:
    tokens, ids, seed = rng.randint(1, WHOLE), rng.choice(prompts.short), rng.randrange(2**31)
    short = f"short {rng.randrange(len(prompts.short))}"
    sampled = {"temperature": rng.choice([0.5, 0.8, 1.0]), "top_p": rng.choice([0.9, 1.0]), "max_new_tokens": tokens}

    def known(key: str, **changes: Any) -> Ask:
        body, outer = bodies[key], {k: changes.pop(k) for k in ("priority", "stream", "rid") if k in changes}
        body = {**body, **outer, "sampling_params": {**body["sampling_params"], **changes}}
        return Ask(number, kind, body, key)

    def one_of(name: str, **changes: Any) -> Ask:
        return known(rng.choice([key for key in bodies if key.startswith(f"{name} ")]), **changes)

    match kind:
        case "greedy":
            return known(short, max_new_tokens=tokens)
        case "priority":
            return known(short, max_new_tokens=tokens, priority=rng.randrange(4))
        case "penalty" | "schema" | "stop" | "long":
            return one_of(kind)
        case "shared prefix":
            return one_of("shared")
        case "sampled":
            return Ask(number, kind, {"input_ids": ids, "sampling_params": sampled})
        case "seeded":
            return Ask(number, kind, {"input_ids": ids, "sampling_params": {**sampled, "sampling_seed": seed}})
        case "two answers":
            return Ask(number, kind, {"input_ids": ids, "sampling_params": {**sampled, "n": 2}})
        case "chat":
            chat = {"model": server.model, "messages": [{"role": "user", "content": "Tell me a story."}], "seed": seed}
            return Ask(number, kind, {**chat, "temperature": 0.8, "max_tokens": tokens}, path="/v1/chat/completions")
        case "leaves" | "aborted":
            after = rng.choice([rng.uniform(0.01, 0.2), rng.uniform(0.2, 2)])
            body = known(short, max_new_tokens=ENDLESS, stream=True, rid=f"soak-{seed}-{number}")
            return Ask(number, kind, body.body, body.truth, after=after)
        case "session":
            which = rng.randrange(SESSIONS)
            return Ask(number, kind, greedy([], TURN, ignore_eos=True), f"session {which}")
        case "bad temperature":
            return Ask(number, kind, {"input_ids": ids, "sampling_params": {**sampled, "temperature": -1}})
        case "too long":
            return Ask(number, kind, greedy([300] * server.longest, tokens))
        case "bad schema":
            return Ask(number, kind, greedy(ids, tokens, json_schema='{"type": "object", "properties": {"a":'))
    raise ValueError(f"{kind!r} is no kind of request: one of {', '.join(KINDS)}")


def judge(ask: Ask, reply: Reply, truths: dict[str, Truth], tie: float) -> tuple[str, str]:
    """What became of a request: ok, tie, refused, aborted, lost or wrong; and of the last two, why."""
    if ask.kind in BAD:
        if reply.status is not None and 400 <= reply.status < 500:
            return "refused", ""
        return ("lost", reply.error) if reply.status is None else ("wrong", f"answered {reply.status}, not 4xx")
    if ask.kind == "leaves" and reply.left:
        return _compared(ask, reply, truths, tie, "aborted")
    if reply.status is None:
        return "lost", reply.error
    if ask.kind == "aborted" and (_aborted(reply) or "abort" in reply.error.lower()):
        return _compared(ask, reply, truths, tie, "aborted")
    if reply.status != 200 or reply.error:
        return "wrong", f"answered {reply.status}: {reply.error}"
    if _aborted(reply):
        return "wrong", f"the server aborted it: {reply.answers[-1]['meta_info']['finish_reason']}"
    if why := _misshapen(ask, reply):
        return "wrong", why
    return _compared(ask, reply, truths, tie, "ok")


def _aborted(reply: Reply) -> bool:
    return any((a.get("meta_info", {}).get("finish_reason") or {}).get("type") == "abort" for a in reply.answers)


def _misshapen(ask: Ask, reply: Reply) -> str:
    wanted = {"two answers": 2, "session": TURNS}.get(ask.kind, 1)
    if len(reply.answers) != wanted:
        return f"{len(reply.answers)} answers, not {wanted}"
    for answer in reply.answers:
        if not 1 <= (count := completion_tokens(answer)) <= ask.most:
            return f"{count} tokens, not 1 to {ask.most}"
        if "output_ids" in answer and len(answer["output_ids"]) != count:
            return f"{len(answer['output_ids'])} ids of an answer of {count} tokens"
        if ask.kind == "schema" and answer["meta_info"]["finish_reason"]["type"] == "stop":
            try:
                json.loads(answer["text"])
            except ValueError as error:
                return f"not JSON: {error}"
    return ""


def completion_tokens(answer: Body) -> int:
    """Of an answer of either endpoint; 0 of one that was aborted in the queue."""
    return int((answer["usage"] if "usage" in answer else answer["meta_info"]).get("completion_tokens", 0))


def _compared(ask: Ask, reply: Reply, truths: dict[str, Truth], tie: float, fine: str) -> tuple[str, str]:
    if ask.truth is None:
        return fine, ""
    for turn, answer in enumerate(reply.answers):
        key = f"{ask.truth}.{turn}" if ask.kind == "session" else ask.truth
        got, truth = answer.get("output_ids") or [], truths[key]
        endless = ask.kind in ("leaves", "aborted")  # they go on beyond the truth
        at = parting(got, truth.ids[: ask.most], whole=not endless)
        if at is None:
            continue
        if at < len(truth.gaps) and truth.gaps[at] < tie:
            return "tie" if fine == "ok" else fine, ""  # what follows is another text
        gap = truth.gaps[at] if at < len(truth.gaps) else None
        return "wrong", f"{key}: parts at token {at}, gap {gap}; truth {truth.ids[: ask.most]}, got {got}"
    return fine, ""


def parting(got: list[int], expected: list[int], whole: bool) -> int | None:
    """Where an answer leaves the one expected, or None. whole: it must be all of it; else as far as both go."""
    for at, (a, b) in enumerate(zip(got, expected, strict=False)):
        if a != b:
            return at
    return min(len(got), len(expected)) if whole and len(got) != len(expected) else None


@dataclass
class Tally:
    """What became of the requests so far."""

    count: int
    begin: float = field(default_factory=time.perf_counter)
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[Body] = field(default_factory=list)
    side: Counter[str] = field(default_factory=Counter)
    tokens: int = 0

    def add(self, ask: Ask, reply: Reply, verdict: str, why: str) -> None:
        self.by_kind.setdefault(ask.kind, Counter())[verdict] += 1
        self.tokens += sum(completion_tokens(a) for a in reply.answers if "usage" in a or "meta_info" in a)
        if why or verdict in ("lost", "wrong"):
            self.wrong.append({"verdict": verdict, "why": why, "request": asdict(ask), "reply": asdict(reply)})

    @property
    def verdicts(self) -> Counter[str]:
        return sum(self.by_kind.values(), Counter())

    def summary(self) -> Body:
        seconds, verdicts = time.perf_counter() - self.begin, self.verdicts
        return {
            "requests": self.count,
            "answered": sum(verdicts.values()),
            "verdicts": dict(verdicts),
            "by_kind": {kind: dict(counts) for kind, counts in sorted(self.by_kind.items())},
            "side": dict(self.side),
            "ties": verdicts["tie"],
            "seconds": round(seconds, 1),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / seconds, 1),
            "wrong": len(self.wrong),
            "first_wrong": self.wrong[:5],
        }


class Client:
    """Sends requests; what goes wrong on the way is in the reply, not raised."""

    def __init__(self, http: aiohttp.ClientSession, prompts: Prompts) -> None:
        self.http, self.prompts = http, prompts
        self.sessions = 0  # open ones
        self.turn = asyncio.Semaphore(OPEN_SESSIONS)

    async def send(self, ask: Ask) -> Reply:
        try:
            match ask.kind:
                case "leaves":
                    return await self._leave(ask)
                case "aborted":
                    return await self._abort(ask)
                case "session":
                    return await self._session(ask)
            return await self.post(ask.path, ask.body)
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as error:
            return Reply(error=f"{type(error).__name__}: {error}")

    async def post(self, path: str, body: Body) -> Reply:
        async with self.http.post(path, json=body) as response:
            if response.status != 200:
                return Reply(response.status, error=(await response.text())[:2000])
            answer = await response.json()
            return Reply(200, answer if isinstance(answer, list) else [answer])

    async def _read(self, body: Body, reply: Reply) -> None:
        """A stream into `reply`, which keeps what came if this is left."""
        async with self.http.post("/generate", json=body) as response:
            reply.status = response.status
            if response.status != 200:
                reply.error = (await response.text())[:2000]
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[len(b"data: ") :])
                    if "error" in chunk:
                        reply.error = str(chunk["error"])
                    else:
                        reply.answers = [chunk]

    async def _leave(self, ask: Ask) -> Reply:
        reply = Reply()
        try:
            async with asyncio.timeout(ask.after):
                await self._read(ask.body, reply)
        except TimeoutError:
            reply.left = True
        return reply

    async def _abort(self, ask: Ask) -> Reply:
        reply = Reply()
        reading = asyncio.create_task(self._read(ask.body, reply))
        await asyncio.wait([reading], timeout=ask.after)
        async with self.http.post("/abort_request", json={"rid": ask.body["rid"]}) as response:
            if response.status != 200:
                reply.error = f"/abort_request answered {response.status}"
        await reading
        return reply

    async def _session(self, ask: Ask) -> Reply:
        """Its turns, one after the other; fewer answers where one is refused."""
        async with self.turn:
            self.sessions += 1
            try:
                return await self._turns(ask)
            finally:
                self.sessions -= 1

    async def _turns(self, ask: Ask) -> Reply:
        opened = await self.post("/open_session", {"capacity_of_str_len": 4096, "streaming": True})
        if opened.status != 200:
            return opened
        reply, (session,) = Reply(200), opened.answers
        for turn in range(TURNS):
            ids = added(self.prompts, int(str(ask.truth).split()[1]), turn)
            got = await self.post("/generate", {**ask.body, "input_ids": ids, "session_params": {"id": session}})
            reply.answers += got.answers
            if got.status != 200:
                reply.status, reply.error = got.status, f"turn {turn}: {got.error}"
                break
        async with self.http.post("/close_session", json={"session_id": session}) as response:
            if response.status != 200:
                reply.error += f" /close_session answered {response.status}"
        return reply


@contextmanager
def served(url: str | None, title: str, args: list[str]) -> Iterator[tuple[str, Path | None]]:
    """The URL of a server, and its log if it was started here."""
    if url:
        yield url.rstrip("/"), None
        return
    with starting(title, args, ENV) as server:
        yield server.ready(Console(stderr=True)), server.log


def _http(url: str, limit: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=limit),
        read_bufsize=LONGEST_CHUNK,
    )  # fmt: skip


async def find_truth(url: str, prompts: Prompts, limit: float) -> dict[str, Truth]:
    """Every greedy answer, by key; a session's turns as single requests, and those with penalties one at a time: this
    server counts tokens by the step.
    """
    room, truths = asyncio.Semaphore(TRUTH_AT_ONCE), {}

    async def one(key: str, body: Body) -> None:
        async with room:
            reply = await client.post("/generate", {**body, "return_logprob": True, "top_logprobs_num": 2})
        if reply.status != 200:
            raise RuntimeError(f"the server without speculation answered {reply.status} to {key}: {reply.error}")
        (answer,) = reply.answers
        truths[key] = Truth(answer["output_ids"], [_gap(top) for top in answer["meta_info"]["output_top_logprobs"]])

    async with _http(url, limit) as http:
        client = Client(http, prompts)
        bodies = greedy_bodies(prompts)
        alone = [key for key in bodies if key.startswith("penalty ")]
        await asyncio.gather(*(one(key, body) for key, body in bodies.items() if key not in alone))
        for key in alone:
            await one(key, bodies[key])
        said: list[list[int]] = [[] for _ in range(SESSIONS)]
        for turn in range(TURNS):
            said = [ids + added(prompts, i, turn) for i, ids in enumerate(said)]
            bodies = {f"session {i}.{turn}": greedy(ids, TURN, ignore_eos=True) for i, ids in enumerate(said)}
            await asyncio.gather(*(one(key, body) for key, body in bodies.items()))
            said = [ids + truths[f"session {i}.{turn}"].ids for i, ids in enumerate(said)]
    return truths


def _gap(top: list[Any] | None) -> float:
    """Between the two best; infinite where a grammar leaves only one."""
    values = [entry[0] for entry in top or [] if entry[0] is not None]
    return values[0] - values[1] if len(values) > 1 else float("inf")


def probe(url: str, model: str) -> Server:
    """What this server takes."""
    info = httpx.get(f"{url}/server_info", timeout=60).raise_for_status().json()
    opened = httpx.post(f"{url}/open_session", json={"capacity_of_str_len": 4096, "streaming": True}, timeout=60)
    if opened.is_success:
        httpx.post(f"{url}/close_session", json={"session_id": opened.json()}, timeout=60).raise_for_status()
    names = httpx.get(f"{url}/v1/models", timeout=60).raise_for_status().json()["data"]
    return Server(
        model=names[0]["id"] if names else model,
        longest=info["max_req_input_len"] + 64,
        priorities=bool(info.get("enable_priority_scheduling")),
        sessions=opened.is_success,
    )


async def soak(
    url: str, asks: list[Ask], truths: dict[str, Truth], prompts: Prompts, tally: Tally, *,
    concurrency: int, seed: int, tie: float, limit: float, out: Path, head: Body,
) -> None:  # fmt: skip
    """Send them all, and interfere meanwhile. A request that never ends keeps the rest from being sent."""
    room, stuck = asyncio.Semaphore(concurrency), False
    async with _http(url, limit) as http:
        client = Client(http, prompts)

        async def one(ask: Ask) -> None:
            nonlocal stuck
            async with room:
                reply = Reply(error="not sent: another got no answer") if stuck else await client.send(ask)
            stuck = stuck or "Timeout" in reply.error
            tally.add(ask, reply, *judge(ask, reply, truths, tie))

        aside = [
            asyncio.create_task(task)
            for task in (interfere(client, tally, seed, concurrency), tell(tally, out, head))
        ]
        try:
            await asyncio.gather(*map(one, asks))
        finally:
            for task in aside:
                task.cancel()
            await asyncio.gather(*aside, return_exceptions=True)
            await command(client, tally, "/continue_generation", {})  # wherever the pause was cut off


async def interfere(client: Client, tally: Tally, seed: int, concurrency: int) -> None:
    """Pause the server and flush its cache now and then. Not the cache behind an open session: its turns live there.

    Every few answers, however fast the machine, and as often in a request's life however many there are at once: a
    retraction undoes the work of all, and a slow server paused by the clock would not get on.
    """
    rng, due = random.Random(seed + 1), 0
    while True:
        due += rng.randint(2, 16) * max(1, concurrency // 32)
        while sum(tally.verdicts.values()) < due:
            await asyncio.sleep(0.1)
        if rng.random() < 0.5:
            mode = rng.choice(["in_place", "retract"])
            await command(client, tally, "/pause_generation", {"mode": mode})
            await asyncio.sleep(rng.uniform(0.1, 1))
            if mode == "retract" and not client.sessions:
                await command(client, tally, "/flush_cache", {}, may_refuse=True)
            await command(client, tally, "/continue_generation", {})
        elif not client.sessions:
            await command(client, tally, "/flush_cache", {}, may_refuse=True)


async def command(client: Client, tally: Tally, path: str, body: Body, may_refuse: bool = False) -> None:
    try:
        async with client.http.post(path, json=body) as response:
            status: int | str = response.status
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        status = f"{type(error).__name__}: {error}"
    refused = may_refuse and status == 400
    tally.side[f"{path}{' refused' if refused else ''}"] += 1
    if status != 200 and not refused:
        tally.wrong.append({"verdict": "wrong", "why": f"{path} {body} answered {status}"})


async def tell(tally: Tally, out: Path, head: Body) -> None:
    """A line every 10 seconds; what is known so far stays in the file if the run is cut off."""
    while True:
        await asyncio.sleep(10)
        told = tally.summary()
        out.write_text(json.dumps({"complete": False, **head, **told}, indent=1))
        print(
            f"{told['seconds']:6.0f} s  {told['answered']} of {tally.count}, {told['verdicts']}, "
            f"{len(tally.wrong)} wrong, {told['tokens_per_second']} tokens/s, {told['side']}",
            flush=True,
        )


def settled(url: str, limit: float) -> list[str]:
    """What is not as it should be after all requests: idle, empty, its whole pool free, and healthy."""
    deadline = time.monotonic() + 120
    names = ("sglang:num_running_reqs", "sglang:num_queue_reqs")
    try:
        while busy := sum(metric(url, name) for name in names):
            if time.monotonic() > deadline:
                return [f"{busy:.0f} requests still run or wait 120 s after the last answer"]
            time.sleep(1)
        flushed = httpx.post(f"{url}/flush_cache", params={"timeout": 30}, timeout=60)
        wrong = [] if flushed.is_success else [f"/flush_cache answered {flushed.status_code}: {flushed.text}"]
        wrong += _fill(url, limit)
        health = httpx.get(f"{url}/health", timeout=60).status_code
        return wrong + ([] if health == 200 else [f"/health answered {health}"])
    except httpx.HTTPError as error:
        return [f"after the last answer the server is gone: {type(error).__name__}: {error}"]


def _fill(url: str, limit: float) -> list[str]:
    """A request that needs all of the pool, but for what a step's tree and its pages take, or all of the context."""
    info = httpx.get(f"{url}/server_info", timeout=60).raise_for_status().json()
    step = (info.get("speculative_num_draft_tokens") or 0) + (info.get("page_size") or 1)
    length, tokens = min(info["max_total_num_tokens"], info["max_req_input_len"]) - 2 * step - 64, 8
    answer = httpx.post(f"{url}/generate", json=greedy([300] * length, tokens, ignore_eos=True), timeout=limit)
    if not answer.is_success:
        return [f"a prompt of {length} tokens was answered {answer.status_code}: {answer.text[:500]}"]
    meta = answer.json()["meta_info"]
    if (meta["finish_reason"]["type"], meta["completion_tokens"]) != ("length", tokens):
        return [f"a prompt of {length} tokens was answered by {meta['completion_tokens']}: {meta['finish_reason']}"]
    return []


def metric(url: str, name: str) -> float:
    """Its sum over labels; 0 where the server counts none, or serves no metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def without_speculation(args: list[str]) -> list[str]:
    """The arguments that the server without speculation takes too."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if arg.startswith("--"):
            skip = arg.startswith("--speculative")
        if not skip:
            kept.append(arg)
    return kept


def device() -> str:
    import torch  # seconds to import

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def main(
    url: Annotated[str | None, typer.Option(help="A server with DFLASH; without it, one is started.")] = None,
    truth_url: Annotated[str | None, typer.Option(help="Without speculation or overlap; else one is started.")] = None,
    model: TargetOption = "smollm2-135m",
    draft: DraftOption = None,
    requests: Annotated[int, typer.Option(min=len(KINDS))] = 2000,
    concurrency: Annotated[int, typer.Option(min=1)] = 32,
    seed: int = 0,
    tie: Annotated[float, typer.Option(help="Gap of log-probabilities below which answers may part.")] = 1e-4,
    limit: Annotated[float, typer.Option(help="Seconds a request may take; one that takes longer ends the run.")] = 400,
    out: Annotated[Path, typer.Option(help="The report goes there, and what is known so far.")] = Path("soak.json"),
    server_arg: Annotated[list[str] | None, typer.Option(help="For servers started here; repeat it.")] = None,
) -> None:
    """Mixed requests to a server under stress, each checked."""
    models, args = Models.of(model, draft), server_arg or []
    prompts = Prompts.of(models.tokenizer())
    plain = [*models.plain_args(), "--max-total-tokens", "16384", "--disable-overlap-schedule"]
    plain += without_speculation(args)
    with served(truth_url, "the server without speculation", plain) as (at, _):
        truths = asyncio.run(find_truth(at, prompts, limit))
    print(f"{len(truths)} greedy answers are known", flush=True)
    with served(url, "the server with DFLASH", [*models.dflash_args(None), *SERVER.split(), *args]) as (at, log):
        server, retracted = probe(at, model), "sglang:num_retracted_requests_total"
        asks, before = plan(seed, requests, prompts, server), metric(at, retracted)
        tally = Tally(len(asks))
        head: Body = {
            "device": device(),
            "versions": {name: metadata.version(name) for name in ("sglang", "sglang-dflash", "torch")},
            "server": {**asdict(server), "model": model, "args": args},
            "seed": seed, "concurrency": concurrency, "tie": tie,
        }  # fmt: skip
        try:
            asyncio.run(
                soak(
                    at, asks, truths, prompts, tally,
                    concurrency=concurrency, seed=seed, tie=tie, limit=limit, out=out, head=head,
                )
            )  # fmt: skip
            told = tally.summary()
            failures = settled(at, limit)
            if told["answered"] != len(asks):
                failures.append(f"{told['answered']} of {len(asks)} requests are accounted for")
            gone = any("is gone" in failure for failure in failures)
            report = {
                "complete": True,
                **head,
                **told,
                "retractions": None if gone else metric(at, retracted) - before,
                "failures_at_the_end": failures,
            }
            out.write_text(json.dumps(report, indent=1))
        finally:
            if log:
                shutil.copy(log, out.with_suffix(".log"))
    print(json.dumps(report, indent=1))
    if tally.wrong or failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
