"""What a server's steps take, by requests at once and drafted nodes: costs for simulate_budget.py, measured here.

usage: time_shapes.py OUT.json [--at-once 1 4 16] [--temperature 0 1] [--steps 5] [--processor] [-- SERVER'S ARGUMENTS]

A server of the embedded pair is made to take all its shapes in turn, and writes what it tells its budget: seconds from
a step's start to the next one's, where no prefill stands between. A row is a median. --processor, for a machine that
others use: of one thread, the processor's seconds in place of the clock's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FILE, PROCESSOR = "TIME_SHAPES_FILE", "TIME_SHAPES_PROCESSOR"
PLUGIN = "[sglang.srt.plugins]\n{script} = {script}:register\n"
BRINGS = 3  # tokens a step, about, on the mean of all shapes


def register() -> None:
    """Entry point of the plug-in that this script is in the server."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang_dflash.budget.choice.Budget.choose", in_turn, HookType.AROUND)
    HookRegistry.register("sglang_dflash.budget.cost.Cost.took", written, HookType.AROUND)
    if PROCESSOR in os.environ:
        from sglang_dflash import metrics

        metrics.time = SimpleNamespace(perf_counter=time.process_time, monotonic=time.monotonic)  # type: ignore[assignment]


def in_turn(choose: Any, budget: Any, *batch: Any) -> Any:
    """Two steps of each shape that so many requests may take, one after another: the second is begun in what the first
    leaves behind.
    """
    in_turn.steps = getattr(in_turn, "steps", -1) + 1  # type: ignore[attr-defined]
    choice = choose(budget, *batch)
    shapes = [index for index, shape in enumerate(budget.shapes) if len(choice.requests) <= shape.most]
    return dataclasses.replace(choice, shape=shapes[in_turn.steps // 2 % len(shapes)])  # type: ignore[attr-defined]


def written(took: Any, cost: Any, requests: int, shape: int, seconds: float, *of_sort: Any) -> None:
    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps([requests, shape, seconds]) + "\n")
    took(cost, requests, shape, seconds, *of_sort)


@contextmanager
def plugged_in(script: str = "time_shapes") -> Iterator[tuple[Path, dict[str, str]]]:
    """A file that a server writes its steps to, and the environment in which it finds a script of this folder as a
    plug-in.
    """
    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder, f"{script}-0.dist-info")
        about.mkdir()
        about.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {script}\nVersion: 0\n")
        about.joinpath("entry_points.txt").write_text(PLUGIN.format(script=script))
        file = Path(folder, "steps.jsonl")
        path = os.pathsep.join(filter(None, [folder, str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        yield file, {"PYTHONPATH": path, FILE: str(file)}


def main() -> None:
    from rich.console import Console

    from sglang_dflash.arguments import LADDER
    from sglang_dflash.cli import load
    from sglang_dflash.cli.bench import device_name, prompt_ids
    from sglang_dflash.cli.models import Models
    from sglang_dflash.cli.server import serving

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--temperature", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, default=5, help="of each shape and load, about")
    parser.add_argument("--processor", action="store_true")
    parser.add_argument("server", nargs="*")
    args = parser.parse_args()
    models = Models.of("smollm2-135m", None)
    prompts = prompt_ids(models, "gsm8k", max(args.at_once))
    rows = []
    with plugged_in() as (file, env):
        if args.processor:
            env |= {PROCESSOR: "1", "OMP_NUM_THREADS": "1"}
        with serving("all shapes", [*models.dflash_args(None), *args.server], Console(stderr=True), env) as url:
            for temperature in args.temperature:
                for at_once in args.at_once:
                    file.write_text("")
                    tokens = args.steps * len(LADDER) * BRINGS
                    load.ask(url, prompts[:at_once], max_tokens=tokens, temperature=temperature,
                             concurrency=at_once, stream_interval=tokens)  # fmt: skip
                    found = _rows(file, at_once, temperature, [nodes for nodes, _ in LADDER])
                    print(*found, sep="\n", flush=True)
                    rows += found
    clock = "one thread's processor seconds" if args.processor else "seconds"
    args.out.write_text(json.dumps({"device": device_name(), "clock": clock, "steps": rows}, indent=1) + "\n")


def _rows(file: Path, at_once: int, temperature: int, nodes: list[int]) -> list[dict[str, Any]]:
    """Medians of what was written of steps of so many requests."""
    seconds = defaultdict(list)
    for line in file.read_text().splitlines():
        requests, shape, took = json.loads(line)
        if requests == at_once:
            seconds[shape].append(took)
    return [
        {"requests": at_once, "temperature": temperature, "nodes": nodes[shape],
         "seconds": round(statistics.median(of), 5), "steps": len(of)}
        for shape, of in sorted(seconds.items())
    ]  # fmt: skip


if __name__ == "__main__":
    main()
