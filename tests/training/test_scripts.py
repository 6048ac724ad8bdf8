"""The commands of docs/training.md, after the data: two processes train, then evaluate and export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loading import ROOT, load
from safetensors.torch import load_file, save_file
from toy import CONFIG, random_weights

from sglang_dflash.training.data import Answers

OPTIONS = "--features 0,1 --intermediate 48 --layers 1 --block 6 --rank 8 --rows 2 --width 128 --anchors 16"


def script(name: str) -> Any:
    """The module of scripts/<name>.py."""
    return load(f"scripts/{name}.py")


@pytest.fixture
def target_path(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    save_file(random_weights(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_train_evaluate_export(
    target_path: Path, make_answers: Callable[..., Answers], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_answers(20)
    make_answers(4, seed=9)
    data, held_out, out = tmp_path / "answers-20-0", tmp_path / "answers-4-9", tmp_path / "out"
    train = [ROOT / "scripts/train_draft.py", target_path, data, held_out, out, *OPTIONS.split(), "--steps", "4"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([*two, *train], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("million parameters") == 1  # one process speaks
    curve = json.loads((out / "curve.json").read_text())
    assert curve[-1]["step"] == 4 and curve[-1]["tokens"] == 4 * 2 * 128 * 2
    dflash = json.loads((out / "draft" / "config.json").read_text())["dflash_config"]
    assert dflash["draft_window"] == Answers(data).longest  # no server will let it look further

    script("evaluate_draft").main(target_path, held_out, [out / "draft"], None, 10, 2, 128)
    assert set(json.loads(capsys.readouterr().out)["accept"]) == {"even", "odd"}
    script("evaluate_draft").main(target_path, held_out, [out / "draft"], [0, 3], 10, 2, 128)
    whole, cut = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (whole["window"], cut["window"]) == (0, 3) and whole["accept"] != cut["accept"]
    script("export_twin").main(target_path, out / "draft", tmp_path / "twin", "float32")
    twin = load_file(tmp_path / "twin" / "model.safetensors")
    assert twin["candidate_selector.successor_codebook"].shape == (61, 8)
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert config["architectures"] == ["DFlash2DraftModel"]
