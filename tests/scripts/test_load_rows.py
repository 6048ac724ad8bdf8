"""Rounds of SGLang's client come together by load, and speeds are ratios to none's."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "load_rows.py"


def run(speed: float, ttft: float) -> str:
    return json.dumps(
        {
            "max_concurrency": 16,
            "output_throughput": speed,
            "median_ttft_ms": ttft,
            "p99_ttft_ms": 2 * ttft,
            "accept_length": None,
        }
    )


def test_rounds_come_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"gsm8k.1.none.jsonl": [100.0, 120.0], "gsm8k.1.ours.jsonl": [220.0], "gsm8k.1.15:8.jsonl": [330.0]}
    for name, speeds in files.items():
        (tmp_path / name).write_text("\n".join(run(speed, 20.0) for speed in speeds))
    main = runpy.run_path(str(SCRIPT))["main"]
    main(tmp_path / "load.json", [tmp_path / name for name in files], device="a GPU")
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    by_server = {(row["server"], row["tree"]): row for row in rows}
    assert by_server["none", None]["tok_s"] == [100.0, 120.0]
    assert by_server["none", None]["temperature"] == 1
    assert by_server["ours", "15:8"]["ttft_p99_ms"] == [40.0]
    assert (tmp_path / "load.png").stat().st_size > 10_000
    assert "| gsm8k | 1 | 16 | ours | 220 | 2.00 | 20 | 40 | 1.00 |" in capsys.readouterr().out


def test_loads_that_were_not_asked_again_keep_their_rows(tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    for out, names in (("old.json", ("gsm8k.0.none", "gsm8k.0.ours", "chat.0.ours")), ("new.json", ("gsm8k.0.ours",))):
        files = [tmp_path / f"{name}.jsonl" for name in names]
        for file in files:
            file.write_text(run(100.0 if out == "old.json" else 200.0, 20.0))
        main(tmp_path / out, files, device="a GPU", others=tmp_path / "old.json" if out == "new.json" else None)
    rows = json.loads((tmp_path / "new.json").read_text())["rows"]
    assert [(row["benchmark"], row["server"], row["tok_s"]) for row in rows] == [
        ("gsm8k", "ours", [200.0]), ("chat", "ours", [100.0]),
    ]  # fmt: skip


def test_the_readmes_table_says_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics stand before and after each round; what other loads did in between is not this one's."""
    speeds = {"0.none": 100.0, "0.ours": 250.0, "0.7:7": 240.0, "0.2:2": 150.0}
    for name, speed in {**{f"gsm8k.{name}": speed for name, speed in speeds.items()}, "chat.1.ours": 60.0}.items():
        (tmp_path / f"{name}.jsonl").write_text(run(speed, 20.0))
    counts = [(0, 10), (0, 40), (500, 40), (510, 100)]  # of 0 and of 7 nodes: a round, something else, a round
    metrics = tmp_path / "gsm8k.0.ours.16.prom"
    metrics.write_text(
        "".join(
            f'sglang:dflash_shape_steps_total{{model_name="m",nodes="{nodes}"}} {count}.0\n'
            for pair in counts
            for nodes, count in zip((0, 7), pair, strict=True)
        )
        + "".join(
            f'sglang:dflash_step_seconds_total{{part="{part}"}} {seconds}\n'
            for seconds in (1.0, 1.3, 2.0, 2.35)
            for part in ("draft", "verify")
        )
    )
    main = runpy.run_path(str(SCRIPT))["main"]
    main(tmp_path / "load.json", [metrics, *tmp_path.glob("*.jsonl")], device="a GPU")
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    row = next(row for row in rows if row["server"] == "ours" and row["benchmark"] == "gsm8k" and not row["tree"])
    assert row["chosen"] == {"0": 0.1, "7": 0.9}
    assert row["step_ms"] == [20.0, 10.0]
    told = capsys.readouterr().out
    assert "| at once | chat, temperature 1 | gsm8k, greedy | chosen, in this order |" in told
    assert "| 16 | **60 tok/s** | **2.50x** (7:7 2.40x) |  / 7 nodes 90%; 0 nodes 10% |" in told
