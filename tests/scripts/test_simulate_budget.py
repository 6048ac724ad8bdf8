"""The budget's simulator in worlds whose answer is known: a trace made by hand, costs that say what must win."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
DEPTH, NODES = 15, 31


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import simulate_budget

    return simulate_budget


def record(file: Path, walks: dict[str, list[int]], positions: int = 40) -> Path:
    """Two answers a group, of which every position has the same walk."""
    nodes = np.zeros((2 * positions * len(walks), DEPTH), dtype=np.uint8)
    for i, walk in enumerate(walks.values()):
        nodes[2 * positions * i : 2 * positions * (i + 1), : len(walk)] = walk
    for end in range(positions, len(nodes) + 1, positions):  # no walk goes beyond its answer
        for back in range(min(positions, DEPTH)):
            nodes[end - 1 - back, back:] = 0
    logp = np.tile(-np.arange(NODES + 1, dtype=np.float16) / 10, (len(nodes), 1))
    depths = np.tile(np.minimum(np.arange(NODES + 1), DEPTH).astype(np.uint8), (len(nodes), 1))
    groups = [group for group in walks for _ in range(2)]
    starts = np.arange(len(groups) + 1) * positions
    np.savez(file, groups=groups, starts=starts, nodes=nodes, logp=logp, depths=depths)
    return file


def test_what_each_shape_accepts(simulator: ModuleType, tmp_path: Path) -> None:
    trace = simulator.Trace(record(tmp_path / "t.npz", {"gsm8k 0": [1, 2, 5, 6, 9, 30]}))
    assert dict(zip([s.nodes for s in simulator.SHAPES], trace.accepted[0], strict=True)) == {
        0: 0, 1: 1, 2: 2, 4: 2, 7: 4, 15: 5, 31: 6,
    }  # fmt: skip
    assert trace.accepted[39].tolist() == [0] * 7  # an answer's end


@pytest.mark.parametrize(("walk", "best"), [([1, 2, 5, 6, 9, 30], 31), ([], 0)], ids=["a draft", "a useless draft"])
@pytest.mark.parametrize("measured", [True, False])
def test_ours_finds_the_best(
    simulator: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    walk: list[int],
    best: int,
    measured: bool,
) -> None:
    monkeypatch.setattr(simulator, "SETTLING", 1500)  # half a per cent of the time goes to finding out
    trace = simulator.Trace(record(tmp_path / "t.npz", {"gsm8k 0": walk}))
    row = simulator.world(trace, lambda requests, shape: 1.0 + 0.005 * shape.nodes, measured, 4, "gsm8k 0")
    assert row["nodes"] == best
    assert row["ours"] > 0.96 * row["best_fixed"]
    assert row["oracle"] > 0.98 * row["best_fixed"]


def test_a_day_goes_on_with_what_was_learned(
    simulator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "DAY", ((1, "gsm8k 0"), (8, "chat 1"), (2, "gsm8k 0")))
    monkeypatch.setattr(simulator, "DAY_TOKENS", (1000, 100))
    trace = simulator.Trace(record(tmp_path / "t.npz", {"gsm8k 0": [1, 2, 3, 4, 5, 6], "chat 1": []}))
    rows = simulator.day(trace, lambda requests, shape: 1.0 + 0.05 * shape.nodes, True)
    assert [row["at_once"] for row in rows] == [1, 8, 2]
    assert [row["nodes"] for row in rows] == [7, 0, 7]
    assert all(row["ours"] > 0.9 * row["best_fixed"] for row in rows)


def test_shared_nodes_go_where_the_draft_is_sure(
    simulator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import simulate_shared

    sure, unsure = np.full(NODES + 1, -0.1), np.full(NODES + 1, -5.0)
    rank = simulate_shared.ranks(np.stack([sure, unsure]))
    assert ((rank < 20).sum(1) == [20, 0]).all()
    monkeypatch.setattr(simulate_shared, "STEPS", 5)
    with np.load(record(tmp_path / "t.npz", {"gsm8k 0": [1, 2, 3, 4, 5, 6, 7]})) as content:
        trace = dict(content)
    roof = tmp_path / "roof.json"
    widths = [{"tokens": n, "target_ms": 1.0 + n, "draft_ms": 0.1} for n in (1, 1024)]
    roof.write_text(json.dumps({"widths": widths}))
    row = simulate_shared.compare(trace, np.arange(80), simulator.Passes(roof), 16, useless=0.5)
    assert row["told"]["tok_s"] > 1.2 * row["equal"]["tok_s"]
