"""Rows of a bench with made-up rounds: ratios, percentiles, JSON, table and plot."""

from __future__ import annotations

import io
import json
from importlib import util
from pathlib import Path

import pytest
from rich.console import Console

from sglang_dflash.cli import results
from sglang_dflash.cli.load import Answer, Round
from sglang_dflash.cli.results import Row, Server

NONE = Server("none", [])
OWN = Server("own", [], "/models/qwen/twin", 15, 15, chain=True)
OURS = Server("ours", [], "smollm2-135m", 15, 8)
SAME = {"model": "smollm2-135m", "device": "abacus", "benchmark": "gsm8k"}
MEMORY = {"weights": 1.0, "kv_cache": 2.5, "graphs": 0.5}


def round_of(seconds: float, *ids: list[int], verify_steps: int = 0) -> Round:
    """Each answer's first token came after 0.1 s, the last after 0.4."""
    accepted = sum(map(len, ids)) - len(ids) - verify_steps
    answers = [Answer(i, [1, len(i) - 1], 0.1, 0.4, verify_steps, accepted) for i in ids]
    return Round(answers, seconds)


@pytest.fixture
def rows() -> list[Row]:
    """4 tokens a round. None takes 1, 2, 4 s, own 0.5, 2, 1 s and ours 0.5, 0.5, 1 s."""
    seconds = {"none": (1, 2, 4), "own": (0.5, 2, 1), "ours": (0.5, 0.5, 1)}
    return [
        Row(server, 1, heat, [round_of(s, [1, 2, 3, 4]) for s in seconds[server.kind]])
        for heat in (0.0, 1.0)
        for server in (NONE, OWN, OURS)
    ]


def test_speed_is_the_median_of_each_rounds_ratio(rows: list[Row]) -> None:
    none, own, ours = rows[:3]
    assert none.speed(none) == 1
    assert own.speed(none) == 2  # of 2, 1 and 4
    assert ours.speed(none) == 4  # of 2, 4 and 4
    assert ours.speed(own) == 1  # of 1, 4 and 1
    assert ours.speed(None) is None


def test_a_row_is_held_against_its_own_setting(rows: list[Row]) -> None:
    rows.append(Row(OURS, 8, 0.0))
    assert rows[2].beside(rows, "none") is rows[0]
    assert rows[5].beside(rows, "own") is rows[4]
    assert rows[6].beside(rows, "none") is None


def test_only_greedy_answers_are_compared(rows: list[Row]) -> None:
    none, _, ours, hot_none, _, hot_ours = rows
    ours.rounds[1] = round_of(1, [1, 2, 3, 5])
    assert ours.same(none) == [True, False, True]
    assert hot_ours.same(hot_none) == []
    assert none.same(none) == []


def test_percentiles() -> None:
    assert results.percentile_ms([0.1, None, 0.3], 50) == 200
    assert results.percentile_ms([i / 1000 for i in range(101)], 99) == 99
    assert results.percentile_ms([0.25], 99) == 250
    assert results.percentile_ms([None], 50) is None


def test_rows_as_json(rows: list[Row]) -> None:
    ours = rows[2]
    ours.rounds, ours.memory = [round_of(0.5, [1, 2, 3, 4], verify_steps=1)] * 2, MEMORY
    got = results.as_json(rows, SAME)
    assert [(r["server"], r["temperature"]) for r in got[:4]] == [
        ("none", 0), ("own", 0), ("ours", 0), ("none", 1)
    ]  # fmt: skip
    assert got[2] == {
        "server": "ours", **SAME, "draft": "smollm2-135m", "tree": 15, "depth": 8, "chain": False,
        "concurrency": 1, "temperature": 0.0, "prompts": 1, "tok_s": [8.0, 8.0], "accept_length": 3.0,
        "ttft_ms": 100.0, "ttft_p99_ms": 100.0, "tpot_ms": 100.0, "memory_gb": MEMORY, "same_text": True,
        "same_answers": 1.0,
    }  # fmt: skip
    ours.rounds[1] = round_of(0.5, [1, 2, 3, 5])
    changed = results.as_json(rows, SAME)[2]
    assert (changed["same_text"], changed["same_answers"]) == (False, 0.5)
    assert got[0]["same_text"] is None and got[5]["same_text"] is None


def test_rows_that_were_not_reached_are_left_out(rows: list[Row]) -> None:
    rows[5].rounds.clear()
    assert len(results.as_json(rows, SAME)) == 5
    assert results.table(rows, "").row_count == 5


def test_table(rows: list[Row]) -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(results.table(rows[:3], "six words"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "SGLang's own DFLASH, qwen/twin, block 16" in text
    assert "ours, 15 nodes, 8 deep" in text
    assert "to own" in text and "4.00x" in text and "3 of 3" in text and "six words" in text
    assert "accept length" not in text and "memory" not in text  # nobody told
    console.print(results.table([rows[0], rows[2]], ""))
    assert "to own" not in console.file.getvalue()[len(text) :]  # type: ignore[attr-defined]


def test_the_plot_needs_the_file_alone(tmp_path: Path, rows: list[Row]) -> None:
    file = tmp_path / "bench.json"
    records = results.as_json(rows, SAME)
    about = {"command": "sglang-dflash bench", "date": "2026-01-02", "device": "abacus"}
    plot = results.save(file, about, records)
    assert plot == tmp_path / "bench.png"
    content = json.loads(file.read_text())
    assert content["rows"] == records
    assert about.items() <= content.items()
    assert content["versions"]["sglang"] == "0.5.23"
    assert set(content["versions"]) == {"sglang", "torch", "flashinfer", "sglang_dflash"}
    first = plot.read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 10_000
    plot.unlink()
    assert results.draw(file) == plot
    assert plot.read_bytes() == first


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.check_out(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.txt' does not end in \.json"):
        results.check_out(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="there is no directory"):
        results.check_out(tmp_path / "no" / "x.json")
    monkeypatch.setattr(results, "find_spec", lambda name: None if name == "matplotlib" else util.find_spec(name))
    with pytest.raises(ValueError, match="pip install matplotlib"):
        results.check_out(tmp_path / "x.json")
