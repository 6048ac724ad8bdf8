"""What a bench measured: its rows as a table, as JSON, and as a plot that the JSON file alone is enough for."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from sglang_dflash.cli.load import Answer, Round, accept_length

VERSIONS = ("sglang", "torch", "flashinfer_python", "sglang_dflash")


@dataclass(frozen=True)
class Server:
    """A server that is compared, and how to start it."""

    kind: str  # "none" (no speculation), "own" (SGLang's own DFLASH) or "ours"
    args: list[str]
    draft: str | None = None  # as the user named it
    nodes: int = 0
    depth: int = 0
    chain: bool = False
    env: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return label(self.kind, self.draft, self.nodes, self.depth, self.chain)


def label(kind: str, draft: str | None, nodes: int, depth: int, chain: bool) -> str:
    """A server's name in tables and plots."""
    if kind == "none":
        return "SGLang, no speculation"
    if kind == "own":
        name = "/".join(Path(draft or "").parts[-2:])
        return f"SGLang's own DFLASH, {name}, block {depth + 1}"
    if nodes and not depth:  # what pays at each step
        return f"ours, chains of up to {nodes}" if chain else f"ours, up to {nodes} nodes"
    return f"ours, chain of {depth}" if chain else f"ours, {nodes} nodes, {depth} deep"


@dataclass
class Row:
    """All rounds of one server at one concurrency and temperature."""

    server: Server
    concurrency: int
    temperature: float
    rounds: list[Round] = field(default_factory=list)
    memory: dict[str, float] | None = None

    @property
    def answers(self) -> list[Answer]:
        return [answer for r in self.rounds for answer in r.answers]

    def beside(self, rows: Sequence[Row], kind: str) -> Row | None:
        """The first row of a server of that kind at the same concurrency and temperature."""
        setting = (self.concurrency, self.temperature)
        same = (r for r in rows if r.server.kind == kind and (r.concurrency, r.temperature) == setting)
        return next(same, None)

    def speed(self, base: Row | None) -> float | None:
        """Tokens a second as a ratio to another row's: the median of the ratio of each round to that one's."""
        pairs = list(zip(self.rounds, base.rounds, strict=False)) if base else []
        return median(a.tok_s / b.tok_s for a, b in pairs) if pairs else None

    def same(self, base: Row | None) -> list[bool]:
        """For every answer: the same tokens as in the other row. Empty unless both are greedy: samples differ."""
        if base is None or base is self or self.temperature > 0:
            return []
        pairs = zip(self.rounds, base.rounds, strict=False)
        return [a.ids == b.ids for x, y in pairs for a, b in zip(x.answers, y.answers, strict=True)]


def percentile_ms(seconds: Iterable[float | None], q: float) -> float | None:
    """A percentile of those that are there, in milliseconds."""
    there = [s for s in seconds if s is not None]
    return round(1000 * float(np.percentile(there, q)), 2) if there else None


def as_json(rows: Sequence[Row], same: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row that has rounds, as JSON takes it; `same` is what all rows share (model, device, benchmark, …)."""
    return [_row_json(row, rows, same) for row in rows if row.rounds]


def _row_json(row: Row, rows: Sequence[Row], same: dict[str, Any]) -> dict[str, Any]:
    server, answers = row.server, row.answers
    length = accept_length(answers)
    alike = row.same(row.beside(rows, "none"))
    return {
        "server": server.kind,
        **same,
        "draft": server.draft,
        "tree": server.nodes,
        "depth": server.depth,
        "chain": server.chain,
        "concurrency": row.concurrency,
        "temperature": row.temperature,
        "prompts": len(row.rounds[0].answers),
        "tok_s": [round(r.tok_s, 2) for r in row.rounds],
        "accept_length": length and round(length, 3),
        "ttft_ms": percentile_ms((a.ttft for a in answers), 50),
        "ttft_p99_ms": percentile_ms((a.ttft for a in answers), 99),
        "tpot_ms": percentile_ms((a.tpot for a in answers), 50),
        "memory_gb": row.memory,
        "same_text": all(alike) if alike else None,
        "same_answers": round(sum(alike) / len(alike), 4) if alike else None,
    }


def table(rows: Sequence[Row], caption: str) -> Table:
    """The rows for a terminal; columns that no row fills are left out."""

    def number(form: str, value: float | None) -> str:
        return "" if value is None else form.format(value)

    def alike(row: Row) -> str:
        same = row.same(row.beside(rows, "none"))
        return f"{sum(same)} of {len(same)}" if same else ""

    columns: dict[str, Callable[[Row], str]] = {
        "server": lambda r: r.server.label,
        "at once": lambda r: str(r.concurrency),
        "temp.": lambda r: f"{r.temperature:g}",
        "tok/s": lambda r: f"{median(x.tok_s for x in r.rounds):.1f}",
        "to none": lambda r: number("{:.2f}x", r.speed(r.beside(rows, "none"))),
        "to own": lambda r: number("{:.2f}x", r.speed(r.beside(rows, "own"))),
        "accept": lambda r: number("{:.2f}", accept_length(r.answers)),
        "ttft ms": lambda r: number("{:.0f}", percentile_ms((a.ttft for a in r.answers), 50)),
        "ttft p99": lambda r: number("{:.0f}", percentile_ms((a.ttft for a in r.answers), 99)),
        "tpot ms": lambda r: number("{:.1f}", percentile_ms((a.tpot for a in r.answers), 50)),
        "GB": lambda r: number("{:.1f}", sum(r.memory.values()) if r.memory else None),
        "same text": alike,
    }
    measured = [row for row in rows if row.rounds]
    result = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    for name, cell in columns.items():
        if any(map(cell, measured)):
            result.add_column(name, justify="left" if name == "server" else "right", no_wrap=name != "server")
    for row in measured:
        result.add_row(*(cell(row) for cell in columns.values() if any(map(cell, measured))))
    return result


def check_out(file: Path) -> None:
    """Raise ValueError, before anything is measured, where `save` could not write or draw."""
    if file.suffix != ".json":
        raise ValueError(f"{str(file)!r} does not end in .json: the plot goes beside it as .png")
    if not file.parent.is_dir():
        raise ValueError(f"there is no directory {str(file.parent)!r}: make it first")
    if find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install matplotlib")


def save(file: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write the rows to `file` after `about` (command, date, device), and their plot beside it; gives its path."""
    file.write_text(json.dumps({**about, "versions": versions(), "rows": rows}, indent=1) + "\n")
    return draw(file)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            found[name.removesuffix("_python")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name.removesuffix("_python")] = None
    return found


def draw(file: Path) -> Path:
    """Plot tokens a second against concurrency, a line a server and a panel a temperature, from the JSON alone."""
    import matplotlib

    matplotlib.use("agg")  # there need be no screen
    from matplotlib import pyplot

    content = json.loads(file.read_text())
    temperatures = sorted({row["temperature"] for row in content["rows"]})
    figure, panels = pyplot.subplots(
        1, len(temperatures), figsize=(1.5 + 5 * len(temperatures), 4.5), squeeze=False, sharey=True
    )
    for panel, temperature in zip(panels[0], temperatures, strict=True):
        _draw_panel(panel, [row for row in content["rows"] if row["temperature"] == temperature])
        panel.set_title("greedy" if temperature == 0 else f"temperature {temperature:g}")
    panels[0, 0].set_ylabel("output tokens a second")
    panels[0, 0].legend(fontsize="small")
    first = content["rows"][0]
    figure.suptitle(f"{first['model']}, {first['benchmark']}, {content['device']}", fontsize="medium")
    figure.tight_layout()
    picture = file.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
    return picture


def _draw_panel(panel: Any, rows: list[dict[str, Any]]) -> None:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = label(row["server"], row["draft"], row["tree"], row["depth"], row["chain"])
        lines.setdefault(name, []).append(row)
    for name, points in lines.items():
        points.sort(key=lambda row: row["concurrency"])
        middle = [median(row["tok_s"]) for row in points]
        # From the slowest round to the fastest.
        reach = [
            [m - min(row["tok_s"]) for m, row in zip(middle, points, strict=True)],
            [max(row["tok_s"]) - m for m, row in zip(middle, points, strict=True)],
        ]
        panel.errorbar([row["concurrency"] for row in points], middle, reach, marker="o", capsize=3, label=name)
    widths = sorted({row["concurrency"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(widths, [str(width) for width in widths])
    panel.minorticks_off()
    panel.set_xlabel("requests at once")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
