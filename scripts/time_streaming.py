"""Tokens of streamed answers that a server tells clients a second: as SGLang is by itself, and as it is with DFLASH.

python scripts/time_streaming.py streaming.json

SGLang's own client asks servers whose steps are no model's: any tokens, as soon as the step's time is over. So what
remains is the host's work from the scheduler to the client. The servers come in turn, one at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import time_shapes
import torch
import typer
from rich.console import Console
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_dflash import embedded, streaming
from sglang_dflash.cli.server import starting

STEP, TURNS = "TIME_STREAMING_STEP", "TIME_STREAMING_TURNS"  # a step's seconds; whether clients are told as ours
# Without the 0.3 s of a collection of all that it has imported, which now and then stand in the midst of a round.
CLIENT = "import gc; from sglang.benchmark import serving; gc.collect(); gc.freeze(); serving.cli_main()"
ANSWER, PROMPT = 128, 64  # tokens


def main(
    out: Path,
    step_ms: Annotated[float, typer.Option(help="what a step takes")] = 11.0,
    at_once: Annotated[int, typer.Option(help="requests")] = 256,
    requests: Annotated[int, typer.Option(help="a round")] = 1024,
    rounds: Annotated[int, typer.Option()] = 2,
) -> None:
    """Write OUT: a row a round, tokens a second and the server process's CPU time for one."""
    rows = []
    for _ in range(rounds):
        for server in ("SGLang's", "ours"):
            rows.append({"server": server, **_round(server == "ours", step_ms / 1e3, at_once, requests)})
            print(rows[-1])
    about = {"step_ms": step_ms, "at_once": at_once, "device": f"{os.cpu_count()} CPU cores"}
    versions = {name: version(name) for name in ("sglang", "uvloop", "uvicorn")}
    out.write_text(json.dumps({**about, "versions": versions, "rows": rows}, indent=1) + "\n")


def _round(ours: bool, step: float, at_once: int, requests: int) -> dict[str, Any]:
    model = str(embedded.target_path())
    args = ["--model-path", model, "--max-running-requests", str(at_once), "--log-level", "warning"]
    with time_shapes.plugged_in("time_streaming") as (file, env):
        env |= {STEP: str(step), TURNS: "yes" if ours else ""}
        with starting("server", args, env) as server:
            url = server.ready(Console())
            before = _cpu_seconds(server.process.pid)
            result = _ask(url, model, at_once, requests, file)
            used = _cpu_seconds(server.process.pid) - before
    tokens = result["total_output_tokens"]
    seconds = {"tok_s": round(tokens / result["duration"]), "cpu_ms_per_token": round(1e3 * used / tokens, 4)}
    return seconds | {name: round(result[name], 1) for name in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms")}


def _ask(url: str, model: str, at_once: int, requests: int, file: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-c", CLIENT, "--backend", "sglang", "--base-url", url, "--model", model,
        "--dataset-name", "random-ids", "--random-input-len", PROMPT, "--random-output-len", ANSWER,
        "--random-range-ratio", 1, "--num-prompts", requests, "--max-concurrency", at_once, "--disable-tqdm",
        "--output-file", file,
    ]  # fmt: skip
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def register() -> None:
    """The plug-in in those servers."""
    forward = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"
    HookRegistry.register(forward, _Steps(float(os.environ[STEP])).step, HookType.REPLACE)
    if os.environ[TURNS]:
        told = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output"
        HookRegistry.register(told, streaming.Teller().tell, HookType.AROUND)


class _Steps:
    """Steps that take their time, whatever is in them."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    def step(self, worker: Any, batch: Any, *_: Any, **__: Any) -> Any:
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        time.sleep(max(self._next - time.monotonic(), 0))
        self._next = time.monotonic() + self._seconds
        tokens = torch.randint(1000, 3000, (len(batch.reqs),))
        return GenerationBatchResult(LogitsProcessorOutput(next_token_logits=None), next_token_ids=tokens)


if __name__ == "__main__":
    typer.run(main)
