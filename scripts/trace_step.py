"""Trace a server's steps on this GPU: how much of a step it is idle, and what runs between its passes.

    python scripts/trace_step.py --model DIR --draft DIR --tree 63:15 --out docs/results/trace.json [-- server options]

A server is asked to decode as many requests as --batch says. Once all of them decode, SGLang's /start_profile records
what the GPU does in the next steps, and the trace is read here. A step is what lies between the ends of two verify
passes. Passes are found by our kernels: `walk` runs once a step, behind the verify pass, and a draft pass ends with
`grow`; both passes must be CUDA graphs, whose operations share the correlation id of the graph's launch.

A profiler costs time: a step's length is also measured without it, from when the chunks of a stream arrive.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import aiohttp
import orjson
import typer
from rich.console import Console
from rich.table import Table

from sglang_dflash import embedded
from sglang_dflash.cli import results
from sglang_dflash.cli.bench import prompt_ids, tree_args
from sglang_dflash.cli.load import LONGEST_CHUNK
from sglang_dflash.cli.models import DraftOption, Models, TargetOption
from sglang_dflash.cli.server import serving

LIMIT = 180  # seconds that all answers of a batch may take, the writing of a trace included
SETTLED = 4  # chunks after which an answer decodes: the prefill's and a few steps'
WARM_UP_TOKENS = 64
SKIPPED = 3  # steps at a trace's beginning: it cuts the first, and the server has just stood still for seconds
LEAST_STEPS = 3
GRAPH_OPS = 8  # a pass has more
LISTED = 25
NAME_LENGTH = 160
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cuda_runtime", "cuda_driver")
# Calls in which the host waits for the GPU; a copy of this name is one to or from memory that is not pinned.
WAITS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuEventSynchronize", "cuCtxSynchronize",
)  # fmt: skip
WALK, GROWS = "walk_kernel", ("grow_kernel", "grow_chain_kernel")
PARTS = ("after verify", "draft", "after draft", "verify")

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


# -- a server's steps --------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """An answer as it comes: at each chunk the time, s, and the verify steps taken until then."""

    times: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, meta: dict[str, Any]) -> None:
        self.times.append(time.perf_counter())
        self.steps.append(meta.get("spec_verify_ct", 0))
        if len(self.times) == SETTLED:
            self.settled.set()


async def decode(
    url: str, prompts: list[list[int]], tokens: int, profile: dict[str, Any] | None = None
) -> list[Stream]:
    """Ask all prompts at once for `tokens` tokens each. profile: /start_profile's, sent once all of them decode.

    The profiler writes its trace between two steps: it is there, and whole, when the answers have come.
    """
    streams = [Stream() for _ in prompts]
    async with (
        aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=LIMIT),
            read_bufsize=LONGEST_CHUNK,
            raise_for_status=True,
        ) as client,
        asyncio.TaskGroup() as tasks,
    ):
        # The more answers, the longer their chunks: those that queue up on the host tell no step's time. But a slow
        # answer must bring several while the fastest one lasts.
        interval = max(1, len(prompts) // 2)
        for ids, stream in zip(prompts, streams, strict=True):
            tasks.create_task(_answer(client, ids, tokens, interval, stream))
        if profile:
            tasks.create_task(_profile(client, profile, streams))
    return streams


async def _answer(client: aiohttp.ClientSession, ids: list[int], tokens: int, interval: int, stream: Stream) -> None:
    """interval: tokens of a chunk."""
    params = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream_interval": interval}
    body = {"input_ids": ids, "sampling_params": params, "stream": True}
    async with client.post("/generate", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = orjson.loads(line[len(b"data: ") :])
                if "error" in chunk:
                    raise RuntimeError(f"the server answered: {chunk['error']}")
                stream.add(chunk["meta_info"])


async def _profile(client: aiohttp.ClientSession, profile: dict[str, Any], streams: list[Stream]) -> None:
    for stream in streams:
        await stream.settled.wait()
    async with client.post("/start_profile", json=profile):
        pass


def step_ms(streams: list[Stream]) -> float:
    """A step's length where no request begins or ends: the median of what each stream saw of at least one step."""
    begin, end = max(s.times[SETTLED - 1] for s in streams), min(s.times[-1] for s in streams)
    lengths = []
    for stream in streams:
        within = [(t, n) for t, n in zip(stream.times, stream.steps, strict=True) if begin <= t <= end]
        if within and (taken := within[-1][1] - within[0][1]):
            lengths.append(1000 * (within[-1][0] - within[0][0]) / taken)
    if not lengths:
        raise RuntimeError(f"of {len(streams)} requests some had ended before others began: give more KV cache")
    return round(median(lengths), 3)


def trace_file(directory: Path, batch: int) -> Path:
    """Where SGLang's first rank writes a trace under the profile id `batch<batch>`."""
    return directory / f"batch{batch}-TP-0.trace.json.gz"


def take(
    models: Models, args: list[str], batches: list[int], tokens: int, steps: int, traces: Path, console: Console
) -> dict[int, float]:
    """Write a trace of `steps` steps for each batch size; gives a step's length without a profiler, ms, by size."""
    prompts = prompt_ids(models, "gsm8k", max(batches))
    with serving("SGLang with DFLASH", args, console) as url:
        lengths = {}
        for batch in batches:  # all before the first trace: a profiler that has run may not be gone without a trace
            asyncio.run(decode(url, prompts[:batch], WARM_UP_TOKENS))
            lengths[batch] = step_ms(asyncio.run(decode(url, prompts[:batch], tokens)))
            console.print(f"{batch} at once: a step takes {lengths[batch]} ms without the profiler")
        for batch in batches:
            profile = {
                "output_dir": str(traces.resolve()),
                "profile_id": f"batch{batch}",
                "num_steps": steps,
                "activities": ["GPU"],
                "with_stack": False,
                "record_shapes": False,
            }
            asyncio.run(decode(url, prompts[:batch], tokens, profile))
            if not trace_file(traces, batch).is_file():
                raise RuntimeError(f"answers of {tokens} tokens ended before {steps} steps did: give more --tokens")
    return lengths


# -- what a trace says -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """A kernel, a copy or a fill; times in µs."""

    name: str
    start: float
    end: float
    launch: int
    """Correlation id: all operations of a CUDA graph's replay share one, any other has its own."""
    stream: int
    blocks: int


@dataclass(frozen=True)
class Step:
    """From the end of one verify pass to the end of the next."""

    edges: tuple[float, float, float, float, float]
    """Where the PARTS begin, and the end; µs."""
    parts: tuple[list[Op], list[Op], list[Op], list[Op]]

    @property
    def us(self) -> float:
        return self.edges[-1] - self.edges[0]


def gpu_ops(trace: dict[str, Any]) -> list[Op]:
    """All that ran on the GPU, by start."""
    ops = [
        Op(
            name=event["name"],
            start=event["ts"],
            end=event["ts"] + event["dur"],
            launch=event["args"]["correlation"],
            stream=event["args"]["stream"],
            blocks=event["args"].get("grid", [0])[0],
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ON_GPU
    ]
    return sorted(ops, key=lambda op: op.start)


def graphs_of(ops: Iterable[Op]) -> list[list[Op]]:
    """The replays of CUDA graphs, by start: operations that were launched together; a copy in pieces is none."""
    launches: dict[int, list[Op]] = {}
    for op in ops:
        launches.setdefault(op.launch, []).append(op)
    return [launch for launch in launches.values() if len(launch) >= GRAPH_OPS]


def is_draft(graph: list[Op]) -> bool:
    return any(name in op.name for op in graph for name in GROWS)


def steps_of(ops: list[Op], batch: int) -> list[Step]:
    """The whole steps of `batch` requests; raises ValueError where passes cannot be told apart."""
    graphs = graphs_of(ops)
    walks = [op for op in ops if WALK in op.name]
    if not graphs or not walks:
        raise ValueError(
            f"{len(graphs)} CUDA graphs and {len(walks)} walks are in the trace: no steps of ours are there"
        )
    steps = []
    for walk, following in pairwise(walks[SKIPPED:]):
        if walk.blocks == following.blocks == batch:  # a block a request
            before, verify = (_verify_before(op, graphs) for op in (walk, following))
            begin = _end(before)
            drafts = [g for g in graphs if is_draft(g) and begin <= g[0].start < verify[0].start]
            if len(drafts) != 1:
                raise ValueError(f"{len(drafts)} draft passes between two verify passes: one must be a CUDA graph")
            edges = (begin, drafts[0][0].start, _end(drafts[0]), verify[0].start, _end(verify))
            steps.append(_step(edges, ops))
    if len(steps) < LEAST_STEPS:
        raise ValueError(f"{len(steps)} steps of {batch} requests are too few: give more --steps or --tokens")
    return steps


def _verify_before(walk: Op, graphs: list[list[Op]]) -> list[Op]:
    earlier = [graph for graph in graphs if graph[0].start < walk.start]
    if not earlier or is_draft(earlier[-1]):
        raise ValueError("no CUDA graph between a draft pass and the walk: the verify pass was not captured")
    return earlier[-1]


def _end(graph: list[Op]) -> float:
    return max(op.end for op in graph)


def _step(edges: tuple[float, float, float, float, float], ops: list[Op]) -> Step:
    a, b, c, d = ([op for op in ops if begin <= op.start < end] for begin, end in pairwise(edges))
    return Step(edges, (a, b, c, d))


def busy_us(ops: list[Op], begin: float, end: float) -> float:
    """How long at least one operation runs between two times; ops by start."""
    busy, reached = 0.0, begin
    for op in ops:
        busy += max(0.0, min(op.end, end) - max(op.start, reached))
        reached = max(reached, min(op.end, end))
    return busy


def analyse(trace: dict[str, Any], batch: int) -> dict[str, Any]:
    """What a trace says of the steps of `batch` requests; per step unless said otherwise."""
    ops = gpu_ops(trace)
    steps = steps_of(ops, batch)
    total = sum(step.us for step in steps)
    busy = sum(busy_us(ops, step.edges[0], step.edges[-1]) for step in steps)
    typical = min(steps, key=lambda step: abs(step.us - median(s.us for s in steps)))
    return {
        "batch": batch,
        "steps": len(steps),
        "profiled_step_ms": round(total / len(steps) / 1000, 3),
        "busy_ms": round(busy / len(steps) / 1000, 3),
        "busy": round(busy / total, 4),
        "idle": round(1 - busy / total, 4),
        "parts": [_part(i, steps, ops) for i in range(len(PARTS))],
        "launches": _launches(steps, {graph[0].launch for graph in graphs_of(ops)}),
        "host_waits": host_waits(trace, steps[0].edges[0], steps[-1].edges[-1], len(steps)),
        "between": {PARTS[i]: _listed(typical, i) for i in (0, 2)},
        "kernels": _kernels(steps, total),
    }


def host_waits(trace: dict[str, Any], begin: float, end: float, steps: int) -> dict[str, float]:
    """Calls between two times in which the host waited for the GPU, a step: for its results it does, by an event."""
    counts = Counter(
        event["name"].partition("_v")[0]
        for event in trace["traceEvents"]
        if event.get("cat") in ON_HOST and begin <= event["ts"] < end
    )
    return {name: round(counts[name] / steps, 2) for name in WAITS if counts[name]}


def _part(i: int, steps: list[Step], ops: list[Op]) -> dict[str, Any]:
    us = mean(step.edges[i + 1] - step.edges[i] for step in steps)
    busy = mean(busy_us(ops, step.edges[i], step.edges[i + 1]) for step in steps)
    count = mean(len(step.parts[i]) for step in steps)
    return {"part": PARTS[i], "us": round(us, 1), "idle_us": round(us - busy, 1), "ops": round(count, 1)}


def _launches(steps: list[Step], graphs: set[int]) -> dict[str, float]:
    """Graphs launched, operations in them, and all that was launched by itself."""
    ops = [op for step in steps for part in step.parts for op in part]
    replayed = [op for op in ops if op.launch in graphs]
    counts = {
        "graphs": len({op.launch for op in replayed}),
        "in_graphs": len(replayed),
        "others": len(ops) - len(replayed),
    }
    return {name: round(count / len(steps), 2) for name, count in counts.items()}


def _listed(step: Step, i: int) -> list[dict[str, Any]]:
    """What runs in one part of a step, in order; equal names in a row are one. gap_us: idle before it."""
    rows, reached = [], step.edges[i]
    for name, run in groupby(step.parts[i], key=lambda op: short(op.name)):
        same = list(run)
        gap = (same[-1].end - reached) - busy_us(same, reached, same[-1].end)
        us = sum(op.end - op.start for op in same)
        rows.append({"name": name, "count": len(same), "us": round(us, 2), "gap_us": round(max(0.0, gap), 2)})
        reached = max(reached, *(op.end for op in same))
    gap = max(0.0, step.edges[i + 1] - reached)
    return [*rows, {"name": "the next graph begins", "count": 0, "us": 0.0, "gap_us": round(gap, 2)}]


def _kernels(steps: list[Step], total: float) -> list[dict[str, Any]]:
    """The operations that take most of a step, by part and name. share: of the step."""
    counts, times = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for step in steps:
        for part, ops in zip(PARTS, step.parts, strict=True):
            for op in ops:
                counts[part, op.name] += 1
                times[part, op.name] += op.end - op.start  # type: ignore[assignment]  # Counter's values may be floats
    return [
        {
            "part": part,
            "name": short(name),
            "share": round(us / total, 4),
            "a_step": round(counts[part, name] / len(steps), 2),
            "us_each": round(us / counts[part, name], 2),
        }
        for (part, name), us in times.most_common(LISTED)
    ]


def short(name: str) -> str:
    """A kernel's name without what says little; templates go on for thousands of characters."""
    return name.removeprefix("void ").replace("(anonymous namespace)::", "")[:NAME_LENGTH]


# -- showing it --------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    launches = report["launches"]
    console.print(
        f"\n[bold]{report['batch']} at once[/]: {report['steps']} steps of {report['profiled_step_ms']} ms "
        f"({report['step_ms']} ms without the profiler), busy {report['busy_ms']} ms, "
        f"idle {report['idle']:.1%}; a step launches "
        f"{launches['graphs']:g} graphs of {launches['in_graphs']:g} operations and {launches['others']:g} others; "
        f"the host waits: {report['host_waits']}"
    )
    for title, rows in {"parts of a step": report["parts"], **report["between"], "kernels": report["kernels"]}.items():
        table = Table(*rows[0], title=title, title_justify="left")
        for column in table.columns:
            column.no_wrap, column.overflow = True, "ellipsis"
        for row in rows:
            table.add_row(*(str(value)[:80] for value in row.values()))
        console.print(table, markup=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="Where what was found goes.")],
    model: TargetOption = embedded.NAME,
    draft: DraftOption = None,
    tree: Annotated[str, typer.Option(metavar="N[:D]", help="Drafted nodes, and how deep; chain:D is a chain.")] = "",
    batch: Annotated[str, typer.Option(help="Requests at once, comma-separated.")] = "1,32",
    tokens: Annotated[
        int, typer.Option(min=WARM_UP_TOKENS, help="Tokens of an answer; it must not end before the trace does.")
    ] = 1024,
    steps: Annotated[int, typer.Option(min=SKIPPED + LEAST_STEPS + 1, help="Steps of a trace.")] = 24,
    traces: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the raw traces there.")] = None,
    reuse: Annotated[bool, typer.Option("--reuse", help="Read the traces that are in --traces, take none.")] = False,
) -> None:
    """Print, and write to OUT, what the GPU does in a step of DFLASH. Other options go to the server."""
    console = Console(width=140)
    batches = [int(size) for size in batch.split(",")]
    with ExitStack() as stack:
        if traces is None:
            traces = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trace-step-")))
        traces.mkdir(parents=True, exist_ok=True)
        lengths: dict[int, float] = {}
        if not reuse:
            models = Models.of(model, draft)
            args = [*models.dflash_args(None), *tree_args(tree), *context.args]
            lengths = take(models, args, batches, tokens, steps, traces, console)
        reports = []
        for size in batches:
            with gzip.open(trace_file(traces, size), "rt") as file:
                trace = json.load(file)
            reports.append({"step_ms": lengths.get(size), **analyse(trace, size)})
            show(reports[-1], console)
    about = {"tree": tree, "options": context.args, "device": trace["deviceProperties"][0]["name"]}
    out.write_text(json.dumps({**about, "versions": results.versions(), "traces": reports}, indent=1) + "\n")


if __name__ == "__main__":
    app()
