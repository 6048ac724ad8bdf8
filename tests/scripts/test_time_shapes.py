"""Shapes in turn, and rows of what their steps took; the server around it is not started here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from loading import load


@pytest.fixture
def script() -> ModuleType:
    return load("scripts/time_shapes.py")


@dataclass
class Chosen:
    shape: int
    requests: list[int]


def test_each_shape_is_taken_twice_in_turn(script: ModuleType) -> None:
    budget: Any = SimpleNamespace(shapes=[SimpleNamespace(most=most) for most in (9, 2, 2)])

    def in_turn(requests: list[int]) -> int:
        shape: int = script.in_turn(lambda budget, *batch: Chosen(1, *batch), budget, requests).shape
        return shape

    taken = [in_turn([5, 7]) for _ in range(8)]
    assert taken == [0, 0, 1, 1, 2, 2, 0, 0]
    assert {in_turn([5, 7, 8]) for _ in range(8)} == {0}, "the others have no graphs for three requests"


def test_rows_are_medians_of_full_batches(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "steps.jsonl"
    monkeypatch.setenv(script.FILE, str(file))
    told: list[Any] = []
    for requests, shape, seconds in ((4, 0, 1.0), (4, 0, 3.0), (4, 0, 9.0), (3, 0, 50.0), (4, 1, 2.0)):
        script.written(lambda cost, *step: told.append(step), None, requests, shape, seconds)
    assert len(told) == 5 and json.loads(file.read_text().splitlines()[0]) == [4, 0, 1.0]
    assert script._rows(file, 4, 1, [0, 7]) == [
        {"requests": 4, "temperature": 1, "nodes": 0, "seconds": 3.0, "steps": 3},
        {"requests": 4, "temperature": 1, "nodes": 7, "seconds": 2.0, "steps": 1},
    ]
