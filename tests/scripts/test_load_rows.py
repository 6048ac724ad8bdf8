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
    assert "| gsm8k | 1 | 16 | ours | 220 | 2.00 | 20 | 40 | 1.00 |" in capsys.readouterr().out
