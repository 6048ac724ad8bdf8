"""What is timed as a step's roof, at sizes that a CPU bears; its speed is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from loading import ROOT, load

SCRIPT = ROOT / "scripts/time_roof.py"

TARGET = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
}
DRAFT = {
    **TARGET,
    "architectures": ["DFlashDraftModel"],
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "block_size": 16,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2]},
}


roof = load("scripts/time_roof.py")


def directory(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_every_linear_layer_is_there_once() -> None:
    shape = roof.Shape.of_target(TARGET)
    assert shape.linears == [(64, 64), (64, 32), (192, 64), (64, 96)]
    head = roof.weight(50, 64, "cpu")
    model = roof.Model(shape, head)
    layers = [weight for layer in model.layers for weight in layer]
    assert len(layers) == len({weight.data_ptr() for weight in layers}) == 3 * 4
    assert all(weight.dtype == torch.bfloat16 for weight in layers)
    assert model.run(model.input(5)).shape == (5, 50)


def test_what_goes_through_many_layers_stays_in_range() -> None:
    model = roof.Model(roof.Shape.of_target({**TARGET, "num_hidden_layers": 40}), roof.weight(50, 64, "cpu"))
    assert 0.01 < model.run(model.input(16)).float().std().item() < 100


def test_heads_of_their_own_size_and_as_many_keys_as_queries() -> None:
    config = {name: value for name, value in TARGET.items() if name not in ("head_dim", "num_key_value_heads")}
    assert roof.Shape.of_target(config).linears[0] == (3 * 64, 64)


def test_the_script_writes_its_figures_without_sglang(tmp_path: Path) -> None:
    target, draft = directory(tmp_path / "target", TARGET), directory(tmp_path / "draft", DRAFT)
    alone = (
        "import runpy, sys; sys.modules['sglang'] = None;"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    out = tmp_path / "roof.json"
    options = ["--device", "cpu", "--widths", "1,4", "--steps", "1:7:3,2:3:1", "--out", out]
    command = [sys.executable, "-c", alone, SCRIPT, target, draft, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["draft"] == {"layers": 2, "hidden": 64, "query": 32, "key": 16, "mlp": 32}
    assert [row["tokens"] for row in report["widths"]] == [1, 4]
    assert all(row["target_ms"] > 0 and row["draft_ms"] > 0 for row in report["widths"])
    steps = [tuple(row.values())[:5] for row in report["steps"]]
    assert steps == [(1, 7, 3, 4, 8), (2, 3, 1, 4, 8)]
    assert all(row["roof_ms"] > 0 for row in report["steps"])
