"""Average the weights of drafts of one shape, such as a draft and what more training has made of it.

    python scripts/average_drafts.py OUT DRAFT DRAFT [DRAFT ...]

Of runs that began with the same weights the mean is often better than each, at what either was trained for
(Wortsman et al., Model soups, arXiv 2203.05482).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file


def main(
    out: Annotated[Path, typer.Argument(help="directory of the average; its config is the first draft's")],
    drafts: Annotated[list[Path], typer.Argument(help="checkpoint directories")],
) -> None:
    """Write OUT. Drafts whose tensors differ in name or shape are refused."""
    weights = [load_file(draft / "model.safetensors") for draft in drafts]
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in weights]
    for draft, shape in zip(drafts, shapes, strict=True):
        if shape != shapes[0]:
            raise typer.BadParameter(f"{draft} is of another shape than {drafts[0]}: average drafts of one shape")
    mean = {
        name: torch.stack([each[name].float() for each in weights]).mean(0).to(first.dtype)
        for name, first in weights[0].items()
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(mean, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(drafts[0] / "config.json", out)


if __name__ == "__main__":
    typer.run(main)
