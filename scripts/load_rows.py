"""Rows of a load table from the files that SGLang's own client writes; a plot of them all goes beside it.

curl localhost:30000/metrics >> gsm8k.0.ours.16.prom
python -m sglang.benchmark.serving --backend sglang --max-concurrency 16 ... --output-file gsm8k.0.ours.jsonl
curl localhost:30000/metrics >> gsm8k.0.ours.16.prom
python scripts/load_rows.py load.json --device "NVIDIA H100 80GB HBM3" gsm8k.*

A file is named benchmark.temperature.server.jsonl; server is one of NAMES, or a tree of ours fixed by hand, 15:8
(words may follow: "15:8 beside FlashInfer"). Each run of the client is a round; rounds of the same benchmark, server,
temperature and load make one row. Metrics before and after each round (--enable-metrics), the load in their file's
name, tell what the server chose there and how long its steps took.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

VERSIONS = ("sglang", "torch", "flashinfer-python", "sglang-dflash")
NAMES = {
    "none": "no speculation", "full": "no speculation, prefills in one launch", "own": "SGLang's own DFLASH",
    "ours": "ours", "best": "ours, best fixed tree", "plain": "ours, nothing drafted",
    "useless": "ours, a draft of random weights", "apart": "ours, each prompt a pass of its own",
    "wider": "ours, no trees of one node", "late": "ours, each step bound as late as the GPU lets",
    "every": "ours, slow sizes of passes kept", "shared": "ours, nodes shared across the batch",
    "early": "ours, nodes shared, clients told of every 16 pieces", "midst": "ours, told in SGLang's order",
    "all": "ours, clients told of all at each step",
}  # fmt: skip
CHOSEN = re.compile(r'^sglang:dflash_shape_steps_total\{.*nodes="(\d+)".*\} (\S+)$', re.MULTILINE)
TAKEN = re.compile(r'^sglang:dflash_step_seconds_total\{.*part="(\w+)".*\} (\S+)$', re.MULTILINE)


def main(
    out: Path,
    files: list[Path],
    device: Annotated[str, typer.Option(help="what the servers ran on, and how many of them side by side")],
    draft: Annotated[str, typer.Option()] = "embedded, widened",
    others: Annotated[Path | None, typer.Option(help="an OUT whose rows of loads that FILES do not have stand")] = None,
) -> None:
    """Write OUT and its plot, and print its tables: the README's, and all rows."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in sorted(files, key=lambda file: file.suffix):  # .jsonl before .prom
        benchmark, temperature, server, *load, _ = file.name.split(".")
        if load:
            row, metrics = rows[benchmark, int(temperature), int(load[0]), server], file.read_text()
            row |= {"chosen": _chosen(metrics), "step_ms": _step_ms(metrics)}
            continue
        for line in file.read_text().splitlines():
            _add(rows, benchmark, int(temperature), server, json.loads(line))
    table = [rows[key] for key in sorted(rows, key=str)]
    if others is not None:
        asked = {_load_of(row) for row in table}
        table += [row for row in json.loads(others.read_text())["rows"] if _load_of(row) not in asked]
    versions = {name: version(name) for name in VERSIONS}
    out.write_text(json.dumps({"device": device, "draft": draft, "versions": versions, "rows": table}, indent=1) + "\n")
    draw(out)
    print_loads(table)
    print()
    _print(table)


def _add(
    rows: dict[tuple[Any, ...], dict[str, Any]], benchmark: str, temperature: int, server: str, run: dict[str, Any]
) -> None:
    concurrency = run["max_concurrency"]
    row = rows.setdefault(
        (benchmark, temperature, concurrency, server),
        {
            "server": "ours" if ":" in server else server,
            "tree": server if ":" in server else None,
            "benchmark": benchmark,
            "temperature": temperature,
            "concurrency": concurrency,
            "tok_s": [],
            "ttft_ms": [],
            "ttft_p99_ms": [],
            "accept_length": [],
        },
    )
    row["tok_s"].append(round(run["output_throughput"], 1))
    row["ttft_ms"].append(round(run["median_ttft_ms"], 1))
    row["ttft_p99_ms"].append(round(run["p99_ttft_ms"], 1))
    row["accept_length"].append(round(run.get("accept_length") or 1.0, 2))


def _rounds(counter: re.Pattern[str], metrics: str) -> dict[str, list[float]]:
    """By how much a counter grew in each round, by label, from metrics before a round and after it, and so on."""
    told: dict[str, list[float]] = {}
    for label, count in counter.findall(metrics):
        told.setdefault(label, []).append(float(count))
    return {
        label: [after - before for before, after in zip(counts[::2], counts[1::2], strict=True)]
        for label, counts in told.items()
    }


def _chosen(metrics: str) -> dict[str, float]:
    """Shares of steps by drafted nodes, all rounds together."""
    steps = {nodes: sum(counts) for nodes, counts in _rounds(CHOSEN, metrics).items()}
    return {nodes: round(count / sum(steps.values()), 3) for nodes, count in steps.items() if count}


def _step_ms(metrics: str) -> list[float]:
    """Milliseconds a step on the device, each round's mean."""
    steps, parts = _rounds(CHOSEN, metrics).values(), _rounds(TAKEN, metrics).values()
    return [
        round(1000 * sum(seconds) / sum(count), 2)
        for seconds, count in zip(zip(*parts, strict=True), zip(*steps, strict=True), strict=False)
        if sum(count)
    ]


def by_setting(table: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]]:
    """Rows by benchmark and temperature, then by server, then by load; "best": of the trees fixed by hand."""
    settings: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in table:
        of = settings.setdefault((row["benchmark"], row["temperature"]), {name: {} for name in NAMES})
        here = of["best" if row["tree"] else row["server"]]
        known = here.get(row["concurrency"])
        if known is None or median(row["tok_s"]) > median(known["tok_s"]):
            here[row["concurrency"]] = row
    return settings


def print_loads(table: list[dict[str, Any]]) -> None:
    """The README's table as Markdown: a row a load, times none's speed, and what the server chose."""
    settings = by_setting(table)
    titles = [f"{benchmark}, {_heat(temperature)}" for benchmark, temperature in settings]
    print("| at once |", " | ".join(titles), "| chosen, in this order |")
    print("|---|" + "---|" * len(titles) + "---|")
    for load in sorted({row["concurrency"] for row in table}):
        cells, chosen = [], []
        for of in settings.values():
            ours, none, own, best = (of[name].get(load) for name in ("ours", "none", "own", "best"))
            beside = [
                f"{name} {_times(row, none)}" for name, row in (("own", own), (best and best["tree"], best)) if row
            ]
            cells.append(f"**{_times(ours, none)}**" + f" ({', '.join(beside)})" * bool(beside) if ours else "")
            shares = (ours or {}).get("chosen", {})
            chosen.append("; ".join(f"{n} nodes {s:.0%}" for n, s in sorted(shares.items(), key=lambda x: -x[1])[:2]))
        print(f"| {load} |", " | ".join(cells), f"| {' / '.join(chosen)} |")


def _load_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["benchmark"], row["temperature"], row["concurrency"]


def _times(row: dict[str, Any], none: dict[str, Any] | None) -> str:
    speed = median(row["tok_s"])
    return f"{speed / median(none['tok_s']):.2f}x" if none else f"{speed:,.0f} tok/s"


def _heat(temperature: int) -> str:
    return f"temperature {temperature}" if temperature else "greedy"


def draw(file: Path) -> Path:
    """Plot speed by load, none's being 1, a panel a benchmark and temperature, from the JSON alone; what none was not
    asked is left out.
    """
    from matplotlib.figure import Figure

    content = json.loads(file.read_text())
    settings = by_setting(content["rows"])
    figure = Figure(figsize=(4.5 * len(settings), 4), layout="tight")
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, ((benchmark, temperature), of) in zip(panels, settings.items(), strict=True):
        plain = {load: median(row["tok_s"]) for load, row in of["none"].items()}
        for server, rows in of.items():
            loads = sorted(rows.keys() & plain.keys())
            if not loads:
                continue
            speeds = [median(rows[load]["tok_s"]) / plain[load] for load in loads]
            style = {"linestyle": ":" if server == "best" else "-", "color": f"C{list(NAMES).index(server)}"}
            axes.plot(loads, speeds, marker=".", label=NAMES[server], **style)
        axes.set(title=f"{benchmark}, {_heat(temperature)}", xlabel="requests at once", xscale="log")
        axes.set_xticks(sorted(plain), [str(load) for load in sorted(plain)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="speed, no speculation being 1", ylim=(0, None))
    for axes in panels:
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(f"{content['device']}; draft: {content['draft']}", fontsize="medium")
    picture = file.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    return picture


def _print(table: list[dict[str, Any]]) -> None:
    """As Markdown: medians, and speeds as ratios to none where it was asked the same."""
    plain = {_load_of(row): median(row["tok_s"]) for row in table if row["server"] == "none"}
    print("| benchmark | temperature | at once | server | tok/s | x none | first token, ms | p99 | accept length |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in sorted(table, key=lambda row: (row["benchmark"], row["temperature"], row["concurrency"], row["server"])):
        speed, none = median(row["tok_s"]), plain.get(_load_of(row))
        name = f"ours, {row['tree']}" if row["tree"] else row["server"]
        first, last = median(row["ttft_ms"]), median(row["ttft_p99_ms"])
        print(
            f"| {row['benchmark']} | {row['temperature']} | {row['concurrency']} | {name} | {speed:,.0f} | "
            f"{f'{speed / none:.2f}' if none else ''} | {first:.0f} | {last:.0f} | {median(row['accept_length']):.2f} |"
        )


if __name__ == "__main__":
    typer.run(main)
