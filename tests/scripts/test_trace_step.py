"""What is read out of a trace: of two steps made up to the microsecond."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from loading import load
from typer.testing import CliRunner

BATCH = 2
STEP = 200.0  # µs


trace_step = load("scripts/trace_step.py")
launches = count(1)


def op(name: str, start: float, us: float, launch: int | None = None, **args: Any) -> dict[str, Any]:
    category = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
    where = {"stream": 7, "correlation": launch or next(launches), **args}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": us, "args": where}


def graph(names: list[str], start: float, us: float) -> list[dict[str, Any]]:
    launch = next(launches)
    return [op(name, start + i * us, us, launch) for i, name in enumerate(names)]


def step(begin: float, batch: int = BATCH) -> Iterator[dict[str, Any]]:
    """200 µs: 10 of a draft pass from 20, 100 of a verify pass from 90, then 10 of sampling and walking.

    While the verify pass runs, a copy of 50 µs on another stream, which adds nothing to what is busy.
    """
    yield from graph(["draft_gemm"] * 9 + ["dflash::(anonymous namespace)::grow_kernel(long*)"], begin + 20, 1)
    yield from [op("void fill", begin + 40 + 5 * i, 5) for i in range(2)]
    yield op("Memcpy HtoD (Pinned -> Device)", begin + 60, 10)
    yield from graph(["verify_gemm", "attention"] * 10, begin + 90, 5)
    yield op("Memcpy DtoH (Device -> Pinned)", begin + 100, 50, stream=20)
    yield op("argmax", begin + 192, 3)
    yield op("dflash::(anonymous namespace)::walk_kernel(long*)", begin + 195, 5, grid=[batch, 1, 1])


def call(name: str, start: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "cuda_runtime", "name": name, "ts": start, "dur": 9.0, "args": {"cbid": 1}}


def trace(steps: int, batch: int = BATCH) -> dict[str, Any]:
    host = call("cudaGraphLaunch", 3.0)
    events = [e for i in range(steps) for e in step(i * STEP, batch)]
    events = [e for e in events if e["ts"] > 150]  # of the first step, its end alone
    return {"deviceProperties": [{"name": "a GPU"}], "traceEvents": [host, {"ph": "M", "name": "x"}, *events]}


def test_a_step_and_what_runs_in_it() -> None:
    # Of nine walks, eight pairs; three steps are left out.
    report = trace_step.analyse(trace(9), BATCH)
    assert report["steps"] == 5 and report["profiled_step_ms"] == 0.2
    # 10 us of drafting, 20 between the passes, 100 of verifying, 8 behind it.
    assert report["busy_ms"] == 0.138
    assert report["busy"] == pytest.approx(138 / 200) and report["idle"] == pytest.approx(62 / 200)
    assert report["parts"] == [
        {"part": "after verify", "us": 30.0, "idle_us": 22.0, "ops": 2},
        {"part": "draft", "us": 10.0, "idle_us": 0.0, "ops": 10},
        {"part": "after draft", "us": 60.0, "idle_us": 40.0, "ops": 3},
        {"part": "verify", "us": 100.0, "idle_us": 0.0, "ops": 21},
    ]
    assert report["launches"] == {"graphs": 2, "in_graphs": 30, "others": 6}


def test_where_the_host_waits() -> None:
    quiet = trace(9)
    assert trace_step.analyse(quiet, BATCH)["host_waits"] == {}
    results = [call("cudaEventSynchronize", i * STEP + 10) for i in range(9)]
    copies = [call("cudaMemcpy", 1000.0), call("cudaMemcpyAsync", 1010.0), call("cudaStreamSynchronize", 1020.0)]
    before = [call("cudaDeviceSynchronize", 150.0)]  # a profiler begins
    events = [*quiet["traceEvents"], *results, *copies, *before]
    waits = trace_step.analyse({**quiet, "traceEvents": events}, BATCH)["host_waits"]
    assert waits == {"cudaEventSynchronize": 1.0, "cudaMemcpy": 0.2, "cudaStreamSynchronize": 0.2}


def test_what_runs_between_the_passes_in_order() -> None:
    between = trace_step.analyse(trace(9), BATCH)["between"]
    assert between["after verify"] == [
        {"name": "argmax", "count": 1, "us": 3.0, "gap_us": 2.0},
        {"name": "dflash::walk_kernel(long*)", "count": 1, "us": 5.0, "gap_us": 0.0},
        {"name": "the next graph begins", "count": 0, "us": 0.0, "gap_us": 20.0},
    ]
    assert between["after draft"] == [
        {"name": "fill", "count": 2, "us": 10.0, "gap_us": 10.0},
        {"name": "Memcpy HtoD (Pinned -> Device)", "count": 1, "us": 10.0, "gap_us": 10.0},
        {"name": "the next graph begins", "count": 0, "us": 0.0, "gap_us": 20.0},
    ]


def test_kernels_by_what_they_take_of_a_step() -> None:
    kernels = trace_step.analyse(trace(9), BATCH)["kernels"]
    gemm, attention = sorted(kernels[:3], key=lambda row: row["name"])[2], kernels[1]
    assert gemm == {"part": "verify", "name": "verify_gemm", "share": 0.25, "a_step": 10, "us_each": 5}
    assert attention["share"] == 0.25
    draft = next(row for row in kernels if row["name"] == "draft_gemm")
    assert draft == {"part": "draft", "name": "draft_gemm", "share": 0.045, "a_step": 9, "us_each": 1}


def test_a_batch_that_was_not_whole_is_left_out() -> None:
    events = [e for i in range(20) for e in step(i * STEP, BATCH if i < 12 else BATCH - 1)]
    assert trace_step.analyse({"traceEvents": events}, BATCH)["steps"] == 11 - trace_step.SKIPPED


@pytest.mark.parametrize(
    "events, message",
    [
        ([], "0 CUDA graphs and 0 walks"),
        (trace(6)["traceEvents"], "2 steps of 2 requests are too few"),
        (trace(9, batch=1)["traceEvents"], "0 steps of 2 requests are too few"),
        ([e for e in trace(9)["traceEvents"] if e.get("dur") != 1], "0 draft passes between two verify passes"),
        (
            [e for e in trace(9)["traceEvents"] if e["name"] not in ("verify_gemm", "attention")],
            "the verify pass was not captured",
        ),
    ],
)
def test_steps_that_are_none_of_ours(events: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_step.analyse({"traceEvents": events}, BATCH)


def test_kept_traces_are_read_again(tmp_path: Path) -> None:
    with gzip.open(trace_step.trace_file(tmp_path, BATCH), "wt") as file:
        json.dump(trace(9), file)
    out = tmp_path / "trace.json"
    result = CliRunner().invoke(
        trace_step.app, ["--reuse", "--traces", str(tmp_path), "--batch", str(BATCH), "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["device"] == "a GPU" and report["traces"][0]["steps"] == 5
    assert "idle 31.0%" in result.output and "draft_gemm" in result.output


def test_a_step_s_length_from_what_streams_saw_while_all_decoded() -> None:
    async def streams() -> list[Any]:
        # The second comes late and in chunks of two steps: only what both saw in common counts.
        return [
            trace_step.Stream([0, 1, 2, 3, 5.0, 5.01, 5.02, 5.03, 6], [0, 1, 2, 3, 4, 5, 6, 7, 9]),
            trace_step.Stream([4, 4.1, 4.2, 5.0, 5.02, 5.04], [0, 1, 2, 3, 5, 7]),
        ]

    assert trace_step.step_ms(asyncio.run(streams())) == pytest.approx(10)


def test_a_stream_without_a_step_in_common_time_tells_nothing() -> None:
    async def streams(*last: float) -> list[Any]:
        return [
            trace_step.Stream([0, 1, 2, 3, 3.5, *last], [0, 1, 2, 3, 4, *(5 for _ in last)]),
            trace_step.Stream([0, 1, 2, 3.25, 9], [0, 9, 18, 27, 36]),  # a slow one, whose next chunk comes too late
        ]

    assert trace_step.step_ms(asyncio.run(streams(4.0))) == pytest.approx(500)
    with pytest.raises(RuntimeError, match="some had ended before others began"):
        trace_step.step_ms(asyncio.run(streams()))
