"""Time the linear layers of a target and its draft on this GPU: the roof of a step, which nothing beside them can lift.

    python scripts/time_roof.py TARGET DRAFT --out docs/results/roof.json

Of both directories only config.json is read: weights are random, every layer its own, so that none is found in a cache.
All layers run one after the other in a CUDA graph, with nothing between them: no attention, norms or activations. The
draft has the target's LM head, as it does in a server. Not included: its projection of features to context (`fc`, and
keys and values of what was accepted), a selector, and the convolutions of DFlash2. Needs torch, typer and rich alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from sglang_dflash.draft.config import DraftConfig

WIDTHS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
WARM_UP, ROUNDS, REPLAYS = 3, 7, 10
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What the linear layers of a Llama- or Qwen3-shaped model are sized by."""

    layers: int
    hidden: int
    query: int
    key: int
    mlp: int

    @classmethod
    def of_target(cls, config: dict[str, Any]) -> Shape:
        """From a config.json's content."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size, kv_heads = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads") or heads
        return cls(config["num_hidden_layers"], hidden, heads * size, kv_heads * size, config["intermediate_size"])

    @classmethod
    def of_draft(cls, config: DraftConfig) -> Shape:
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return cls(config.num_layers, config.hidden_size, query, key, config.intermediate_size)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of q, k and v merged, o, gate and up merged, and down."""
        return [
            (self.query + 2 * self.key, self.hidden),
            (self.hidden, self.query),
            (2 * self.mlp, self.hidden),
            (self.hidden, self.mlp),
        ]


class Model:
    """The linear layers of all layers, and the LM head [vocab, hidden] after them; bf16, random."""

    def __init__(self, shape: Shape, head: Tensor) -> None:
        self.shape, self.head = shape, head
        self.layers = [[weight(*linear, head.device) for linear in shape.linears] for _ in range(shape.layers)]

    def input(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.shape.hidden, dtype=self.head.dtype, device=self.head.device)

    def run(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] through all layers: logits. Where layers are merged, their first outputs go on."""
        for qkv, o, gate_up, down in self.layers:
            x = F.linear(F.linear(x, qkv)[:, : self.shape.query], o)
            x = F.linear(F.linear(x, gate_up)[:, : self.shape.mlp], down)
        return F.linear(x, self.head)


def weight(outputs: int, inputs: int, device: torch.device | str) -> Tensor:
    """Random, and of a scale that keeps what goes through it in range however many layers there are."""
    return torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device).normal_(0, inputs**-0.5)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of `run`, as a function that replays it."""
    run()  # libraries make their handles and workspaces now
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Of one call: the median of rounds of calls in a row. On a GPU a call is a replay of its CUDA graph."""
    on_gpu = device == "cuda"
    call = captured(run) if on_gpu else run
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    for _ in range(WARM_UP):
        call()
    rounds = []
    for _ in range(ROUNDS):
        wait()
        begin = time.perf_counter()
        for _ in range(REPLAYS):
            call()
        wait()
        rounds.append((time.perf_counter() - begin) * 1000 / REPLAYS)
    return round(median(rounds), 4)


def time_width(tokens: int, models: dict[str, Model], device: str) -> Row:
    """Each model alone at `tokens` tokens, ms."""
    runs = {name: partial(model.run, model.input(tokens)) for name, model in models.items()}
    return {"tokens": tokens, **{f"{name}_ms": milliseconds(run, device) for name, run in runs.items()}}


def time_step(step: str, models: dict[str, Model], device: str) -> Row:
    """The roof of a step, `requests:nodes:depth`, ms: a draft pass and a verify pass in one graph."""
    batch, nodes, depth = map(int, step.split(":"))
    tokens = {"draft": batch * (depth + 1), "target": batch * (nodes + 1)}
    inputs = {name: models[name].input(count) for name, count in tokens.items()}
    roof = milliseconds(lambda: [models[name].run(x) for name, x in inputs.items()], device)
    counts = {f"{name}_tokens": count for name, count in tokens.items()}
    return {"batch": batch, "nodes": nodes, "depth": depth, **counts, "roof_ms": roof}


def table(rows: list[Row], title: str) -> Table:
    result = Table(*rows[0], title=title)
    for row in rows:
        result.add_row(*(str(value) for value in row.values()))
    return result


def main(
    target: Annotated[Path, typer.Argument(help="the target's directory: its config.json")],
    draft: Annotated[Path, typer.Argument(help="the draft's directory: its config.json")],
    out: Annotated[Path | None, typer.Option(help="where the figures go, as JSON")] = None,
    widths: Annotated[str, typer.Option(help="tokens of a pass, comma-separated")] = ",".join(map(str, WIDTHS)),
    steps: Annotated[str, typer.Option(help="requests:nodes:depth, comma-separated")] = "1:63:15,4:31:15,16:7:8,64:2:2",
    device: Annotated[str, typer.Option(help="cuda; cpu only shows that the script runs")] = "cuda",
) -> None:
    """Print, and write to OUT, milliseconds of target and draft by tokens of a pass, and the roofs of whole steps."""
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    shapes = {"target": Shape.of_target(config), "draft": Shape.of_draft(DraftConfig.load(draft))}
    torch.manual_seed(0)
    with torch.inference_mode():
        head = weight(config["vocab_size"], shapes["target"].hidden, device)
        models = {name: Model(shape, head) for name, shape in shapes.items()}
        rows = [time_width(tokens, models, device) for tokens in map(int, widths.split(","))]
        roofs = [time_step(step, models, device) for step in steps.split(",")]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    console = Console()
    console.print(table(rows, f"{name}, torch {torch.__version__}: all linear layers"), table(roofs, "a step"))
    if out is not None:
        about = {"device": name, "torch": torch.__version__, "dtype": "bfloat16", "vocabulary": config["vocab_size"]}
        sizes = {name: vars(shape) for name, shape in shapes.items()}
        out.write_text(json.dumps({**about, **sizes, "widths": rows, "steps": roofs}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
