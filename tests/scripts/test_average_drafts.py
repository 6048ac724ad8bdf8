"""The mean of drafts' weights, rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from loading import load
from safetensors.torch import load_file, save_file


def a_draft(folder: Path, weight: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({"fc.weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"name": "{folder.name}"}}')
    return folder


def test_weights_are_averaged_in_their_own_type(tmp_path: Path) -> None:
    torch.manual_seed(0)
    several = torch.randn(3, 4, 5).bfloat16()
    drafts = [a_draft(tmp_path / str(i), weight) for i, weight in enumerate(several)]
    load("scripts/average_drafts.py").main(tmp_path / "mean", drafts)
    mean = load_file(tmp_path / "mean" / "model.safetensors")["fc.weight"]
    assert mean.dtype == torch.bfloat16
    torch.testing.assert_close(mean.float(), several.float().mean(0), rtol=2**-8, atol=1e-6)
    assert (tmp_path / "mean" / "config.json").read_text() == '{"name": "0"}'


def test_drafts_of_other_shapes_are_refused(tmp_path: Path) -> None:
    drafts = [a_draft(tmp_path / str(width), torch.zeros(2, width)) for width in (3, 4)]
    with pytest.raises(typer.BadParameter, match="another shape"):
        load("scripts/average_drafts.py").main(tmp_path / "mean", drafts)
