"""What is written of steps and what rows come of it; published sizes. No server is started here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from loading import ROOT, load

from sglang_dflash.draft.checkpoint import expected_shapes, tensor_shapes_on_disk
from sglang_dflash.draft.config import DraftConfig


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return load("scripts/time_states.py")


class Step:
    """One of two requests, of the shape given, 6 ms in all, 10 ms behind the one before it."""

    def __init__(self, shape: int, before: int | None) -> None:
        self.choice = SimpleNamespace(shape=shape, requests=[4, 5])
        self.clock = SimpleNamespace(parts=lambda: [0.001, 0.003, 0.002], since=lambda start: 0.01)
        self.before = None if before is None else (SimpleNamespace(shape=before, requests=[4]), "start", 0.0)


def test_rows_are_medians_of_steps_of_so_many_requests(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's parts are its own; the whole of it is known when the next one is."""
    file = tmp_path / "steps.jsonl"
    monkeypatch.setenv(script.time_shapes.FILE, str(file))
    planner = SimpleNamespace(budget=SimpleNamespace(shapes=[SimpleNamespace(nodes=0), SimpleNamespace(nodes=7)]))
    learnt: list[Any] = []
    for step in (Step(1, None), Step(0, 1)):
        script.written(lambda planner, *results: learnt.append(results), planner, step, "nodes", "lens", "reqs")
    assert [results[1:] for results in learnt] == [("nodes", "lens", "reqs")] * 2
    assert [*map(json.loads, file.read_text().splitlines())][-1] == [1, 7, "whole", 0.01]
    with file.open("a") as more:
        more.writelines(json.dumps([2, nodes, "whole", seconds]) + "\n" for nodes, seconds in ((0, 1.0), (7, 0.5)))
    parts = {"draft_ms": 1.0, "verify_ms": 3.0, "other_ms": 2.0}
    assert script.medians(file, 2) == [
        {"nodes": 0, "step_ms": 1000.0, **parts, "steps": 1},
        {"nodes": 7, "step_ms": 500.0, **parts, "steps": 1},
    ]


def test_a_row_of_the_table_says_how_many_tokens_a_step_must_bring(script: ModuleType) -> None:
    said = {"size": "9B", "requests": 4}
    rows = [
        {"size": "9B", "server": "trees", "memory_gb": {}},
        {**said, "server": "trees", "nodes": 0, "step_ms": 5.0},
        {**said, "server": "trees", "nodes": 15, "step_ms": 8.0},
        {**said, "server": "none", "step_ms": 4.0},
    ]
    assert [*script.table(rows)][2:] == ["| 9B | 4 | 4.00 (1.00x) | 5.00 (1.25x) |  |  | 8.00 (2.00x) |"]


@pytest.mark.parametrize(("size", "billions"), [("4B", 4.8), ("9B", 9.0), ("27B", 26.9)])
def test_a_size_is_what_it_is_called_and_its_draft_is_ours_to_serve(
    script: ModuleType, tmp_path: Path, size: str, billions: float
) -> None:
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    target, draft = script.SIZES[size].target(), script.SIZES[size].draft()
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**target))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == billions
    config = DraftConfig.from_dict(draft)
    config.check(
        hidden_size=target["hidden_size"], vocab_size=target["vocab_size"], num_layers=len(target["layer_types"])
    )
    script.write_header(tmp_path, draft)
    shapes = tensor_shapes_on_disk(tmp_path)
    assert shapes == expected_shapes(config) and config.served_by(shapes) == ("ours", "")


def test_servers_that_draft_keep_when_their_parts_end(script: ModuleType, tmp_path: Path) -> None:
    """Which they do for their metrics alone."""
    told = {name: "--enable-metrics" in script.arguments(tmp_path, name, []) for name in script.SERVERS}
    assert told == {"none": False, "chains": True, "trees": True}
