"""Rows of a load table from the files that SGLang's own client writes.

python -m sglang.benchmark.serving --backend sglang ... --output-file gsm8k.0.ours.jsonl
python scripts/load_rows.py load.json --device "NVIDIA H100 80GB HBM3" gsm8k.*.jsonl

A file is named benchmark.temperature.server.jsonl; server is none, own, ours, or a tree of ours fixed by hand, 15:8.
Each run of the client is a round; rounds of the same benchmark, server, temperature and load make one row.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

VERSIONS = ("sglang", "torch", "flashinfer-python", "sglang-dflash")


def main(
    out: Path,
    files: list[Path],
    device: Annotated[str, typer.Option(help="what the servers ran on, and how many of them side by side")],
    draft: Annotated[str, typer.Option()] = "embedded, widened",
) -> None:
    """Write OUT, and print its table."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in files:
        benchmark, temperature, server, _ = file.name.split(".")
        for line in file.read_text().splitlines():
            _add(rows, benchmark, int(temperature), server, json.loads(line))
    table = [rows[key] for key in sorted(rows, key=str)]
    versions = {name: version(name) for name in VERSIONS}
    out.write_text(json.dumps({"device": device, "draft": draft, "versions": versions, "rows": table}, indent=1) + "\n")
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


def _print(table: list[dict[str, Any]]) -> None:
    """As Markdown: medians, and speeds as ratios to none where it was asked the same."""
    plain = {
        (row["benchmark"], row["temperature"], row["concurrency"]): median(row["tok_s"])
        for row in table
        if row["server"] == "none"
    }
    print("| benchmark | temperature | at once | server | tok/s | x none | first token, ms | p99 | accept length |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in sorted(table, key=lambda row: (row["benchmark"], row["temperature"], row["concurrency"], row["server"])):
        speed, none = median(row["tok_s"]), plain.get((row["benchmark"], row["temperature"], row["concurrency"]))
        name = f"ours, {row['tree']}" if row["tree"] else row["server"]
        first, last = median(row["ttft_ms"]), median(row["ttft_p99_ms"])
        print(
            f"| {row['benchmark']} | {row['temperature']} | {row['concurrency']} | {name} | {speed:,.0f} | "
            f"{f'{speed / none:.2f}' if none else ''} | {first:.0f} | {last:.0f} | {median(row['accept_length']):.2f} |"
        )


if __name__ == "__main__":
    typer.run(main)
