"""What steps take, and what memory a request takes, in targets of gated delta nets of published sizes: random weights.

    python scripts/time_states.py docs/results/gpu/states.json                 # 9B, 4B and 27B, on a GPU of 141 GB
    python scripts/time_states.py out.json tiny -- --dtype float32             # on a CPU, to try this script
    python scripts/time_states.py docs/results/gpu/states.json --table         # what is there, as Markdown

Three servers a size: plain decoding without DFLASH, chains of 7, and trees of 7 nodes (7 deep) and 15 (10 deep). Those
of DFLASH take their shapes, and drafting nothing, in turn. A row is a median; what plain decoding takes is a token's
time behind the first. Nothing of what is drafted comes true by design, and a step's time does not ask.

Sizes are those of Qwen3.5-4B, 9B and 27B as text models: hidden and inner sizes, layers, heads. 9B's are transformers'
defaults for this model; 4B's and 27B's were given to this script and not read from a checkpoint. Assumed of all: an
embedding apart from the head, states in float32, and a draft like z-lab's first: five layers, 32 heads of 128 over 8,
all tokens of a block of 16 seen by all, the target's inner size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import statistics
import struct
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import time_shapes
from rich.console import Console

from sglang_dflash.cli import load
from sglang_dflash.cli.bench import device_name
from sglang_dflash.cli.server import ServerError, Starting, starting
from sglang_dflash.draft.checkpoint import expected_shapes
from sglang_dflash.draft.config import DraftConfig

HEAD_DIM, STATE_DIM, EVERY, BLOCK = 256, 128, 4, 16
LADDER = ((0, 0), (7, 7), (15, 10))
PROMPT, STEPS = 256, 60  # tokens; of each shape and load, about, where nothing is accepted
AT_ONCE = 1, 4, 16
PARTS = "draft", "verify", "other"
# By name: a server's own arguments; the shapes that it takes in turn follow from them and the ladder.
SERVERS: dict[str, list[str]] = {
    "none": [],
    "chains": ["--speculative-eagle-topk", "1", "--speculative-num-steps", "7"],
    "trees": ["--speculative-num-draft-tokens", "15"],
}
SIZED = re.compile(r"(\w+) size: ([\d.]+)GB")


@dataclass(frozen=True)
class Size:
    """A target's. value_heads: of a delta net, which has as many heads of keys as key_heads says; together: how many of
    its servers a GPU of 141 GB holds at once.
    """

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    value_heads: int
    key_heads: int = 16
    vocab: int = 248_320
    together: int = 3

    def target(self) -> dict[str, Any]:
        """Its config.json."""
        from transformers import Qwen3_5TextConfig

        config = Qwen3_5TextConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=HEAD_DIM,
            linear_num_key_heads=self.key_heads, linear_num_value_heads=self.value_heads,
            linear_key_head_dim=STATE_DIM, linear_value_head_dim=STATE_DIM, dtype="bfloat16",
            rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        )  # fmt: skip
        more = {"architectures": ["Qwen3_5ForCausalLM"], "full_attention_interval": EVERY, "mamba_ssm_dtype": "float32"}
        return {**config.to_dict(), **more}

    def draft(self) -> dict[str, Any]:
        return {
            "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "dtype": "bfloat16", "num_hidden_layers": 5,
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_theta": 1e7, "max_position_embeddings": 32768, "block_size": BLOCK, "num_target_layers": self.layers,
            "dflash_config": {"mask_token_id": self.vocab - 1},
        }  # fmt: skip


SIZES = {
    "9B": Size(hidden=4096, layers=32, inner=12288, heads=16, kv_heads=4, value_heads=32),
    "4B": Size(hidden=2560, layers=32, inner=9216, heads=16, kv_heads=4, value_heads=32),
    "27B": Size(hidden=5120, layers=64, inner=17408, heads=24, kv_heads=4, value_heads=48, together=1),
    "tiny": Size(hidden=256, layers=8, inner=256, heads=2, kv_heads=1, value_heads=2, key_heads=1, vocab=512),
}
PUBLISHED = ("9B", "4B", "27B")


def register() -> None:
    """Entry point of the plug-in that this script is in a server."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_dflash import arguments

    arguments.LADDER = LADDER  # type: ignore[assignment]
    HookRegistry.register("sglang_dflash.budget.choice.Budget.choose", time_shapes.in_turn, HookType.AROUND)
    HookRegistry.register("sglang_dflash.step.plan.Planner.learn", written, HookType.AROUND)


def written(learn: Any, planner: Any, step: Any, *results: Any) -> None:
    """What a step's parts took, and the whole of the one before it, to this one's start."""
    lines = [(step.choice, part, seconds) for part, seconds in zip(PARTS, step.clock.parts(), strict=True)]
    if step.before is not None:
        choice, start, _ = step.before
        lines.append((choice, "whole", step.clock.since(start)))
    with open(os.environ[time_shapes.FILE], "a") as file:
        for choice, part, seconds in lines:
            nodes = planner.budget.shapes[choice.shape].nodes
            file.write(json.dumps([len(choice.requests), nodes, part, seconds]) + "\n")
    learn(planner, step, *results)


def medians(file: Path, at_once: int) -> list[dict[str, Any]]:
    """Of what was written of steps of so many requests, in milliseconds; a row a shape."""
    seconds: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in file.read_text().splitlines():
        requests, nodes, part, took = json.loads(line)
        if requests == at_once:
            seconds[nodes][part].append(took)
    return [
        {"nodes": nodes, "step_ms": _ms(of["whole"]), **{f"{part}_ms": _ms(of[part]) for part in PARTS},
         "steps": len(of["whole"])}
        for nodes, of in sorted(seconds.items())
    ]  # fmt: skip


def _ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 3)


@dataclass
class Server:
    """One of a size's servers, as it is started, or why it was not."""

    size: str
    name: str
    steps: Path
    starting: Starting
    ready: Future[str] | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Ask it at each load, once to warm it up."""
        assert self.ready is not None
        url = self.ready.result()
        said = {"size": self.size, "server": self.name}
        yield {**said, "memory_gb": self._memory(url)}
        shapes = {"none": 1, "chains": 2, "trees": 3}[self.name]
        random = np.random.default_rng(0)
        for at_once in AT_ONCE:
            prompts = random.integers(0, SIZES[self.size].vocab - 1, (at_once, PROMPT)).tolist()
            for tokens in (8, STEPS * shapes):
                self.steps.write_text("")
                answers = load.ask(url, prompts, max_tokens=tokens, concurrency=at_once, stream_interval=tokens).answers
            if self.name == "none":
                took = [answer.tpot for answer in answers if answer.tpot is not None]
                yield {**said, "requests": at_once, "step_ms": _ms(took), "steps": tokens - 1}
            else:
                yield from ({**said, "requests": at_once, **row} for row in medians(self.steps, at_once))

    def _memory(self, url: str) -> dict[str, Any]:
        """What it says it took: its states' parts, and how many states it keeps; then what `load.memory_gb` knows."""
        lines = [line for line in self.starting.log.read_text().splitlines() if "Mamba Cache is allocated" in line]
        states = re.search(r"max_mamba_cache_size: (\d+)", lines[0])
        assert states is not None
        sizes = {part: float(gb) for part, gb in SIZED.findall(lines[0])}
        return {"states": int(states[1]), **sizes, **(load.memory_gb(url) or {})}


def arguments(folder: Path, name: str, own: list[str]) -> list[str]:
    # With metrics, as without them nobody asks when a step's parts end.
    drafts = ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(folder / "draft")]
    speculative = ["--enable-metrics", *drafts]
    requests = max(AT_ONCE)
    return [
        "--model-path", str(folder / "target"), "--load-format", "dummy", "--skip-tokenizer-init",
        "--context-length", "4096", "--max-total-tokens", "32768", "--max-running-requests", str(requests),
        "--max-mamba-cache-size", str(5 * requests), "--mem-fraction-static", "0.9", "--disable-prefill-cuda-graph",
        "--linear-attn-prefill-backend", "triton", "--cuda-graph-max-bs-decode", str(requests),
        *([] if name == "none" else speculative), *SERVERS[name], *own,
    ]  # fmt: skip


def write_header(folder: Path, draft: dict[str, Any]) -> None:
    """A checkpoint's names and shapes, which are checked at start, above data that is never read: a sparse file."""
    names, end = {}, 0
    for name, shape in expected_shapes(DraftConfig.from_dict(draft)).items():
        names[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    header = json.dumps(names).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


def started(stack: ExitStack, folder: Path, size: str, names: list[str], own: list[str]) -> list[Server]:
    """Processes of these servers of a size, which import, and wait before they take memory of a GPU."""
    servers = []
    for part, config in (("target", SIZES[size].target()), ("draft", SIZES[size].draft())):
        (folder / size / part).mkdir(parents=True, exist_ok=True)
        (folder / size / part / "config.json").write_text(json.dumps(config))
    write_header(folder / size / "draft", config)
    for name in names:
        file, env = stack.enter_context(time_shapes.plugged_in("time_states"))
        process = starting(
            f"{size}, {name}", arguments(folder / size, name, own), {} if name == "none" else env, gated=True
        )
        servers.append(Server(size, name, file, stack.enter_context(process)))
    return servers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sizes", nargs="*", help=f"of: {' '.join(SIZES)}")
    parser.add_argument("--servers", nargs="*", choices=SERVERS, default=["trees", "chains", "none"])
    parser.add_argument("--table", action="store_true")
    asked, own = _split(parser)
    if asked.table:
        print(*table(json.loads(asked.out.read_text())["rows"]), sep="\n")
        return
    groups = [
        (size, asked.servers[i : i + SIZES[size].together])
        for size in asked.sizes or PUBLISHED
        for i in range(0, len(asked.servers), SIZES[size].together)
    ]
    about = {"device": device_name(), "versions": {name: version(name) for name in ("sglang", "torch")}}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as outer, ThreadPoolExecutor() as waiting:
        folder, begin = Path(name), time.monotonic()
        stacks = [outer.enter_context(ExitStack()) for _ in groups]
        following = started(stacks[0], folder, *groups[0], own)
        for i, stack in enumerate(stacks):
            servers = following
            for server in servers:
                server.ready = waiting.submit(server.starting.ready, Console(stderr=True))
            if i + 1 < len(groups):  # what they import takes nothing of a GPU
                following = started(stacks[i + 1], folder, *groups[i + 1], own)
            for server in servers:
                try:
                    for row in server.rows():
                        print(f"{time.monotonic() - begin:.0f} s", row, flush=True)
                        rows.append(row)
                        asked.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
                except ServerError as error:  # told; the others may start
                    print(error, flush=True)
            for server in servers:  # at once: SGLang takes many seconds to end, and the next ones wait for the memory
                with suppress(ProcessLookupError):  # that it did not start was told
                    os.killpg(server.starting.process.pid, signal.SIGKILL)
            stack.close()
            time.sleep(2)  # a GPU's memory comes back a little after the process is gone


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A row a size and load: milliseconds, and how many tokens a step must bring to be as fast as plain decoding."""
    took: dict[tuple[str, int], dict[tuple[str, int], float]] = defaultdict(dict)
    for row in rows:
        if "requests" in row:
            took[row["size"], row["requests"]][row["server"], row.get("nodes", 0)] = row["step_ms"]
    columns = {("none", 0): "none", ("trees", 0): "nothing drafted", ("chains", 7): "chain of 7",
               ("trees", 7): "tree of 7", ("trees", 15): "tree of 15"}  # fmt: skip
    yield f"| target | at once | {' | '.join(columns.values())} |"
    yield "|---" * (len(columns) + 2) + "|"
    for (size, at_once), of in took.items():
        plain = of.get(("none", 0))
        cells = [
            "" if column not in of else f"{of[column]:.2f}" + (f" ({of[column] / plain:.2f}x)" if plain else "")
            for column in columns
        ]
        yield f"| {size} | {at_once} | {' | '.join(cells)} |"


def _split(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """This script's own arguments, and behind -- those of every server."""
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:at]), given[at + 1 :]


if __name__ == "__main__":
    main()
