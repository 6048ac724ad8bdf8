"""Held-out accept lengths of saved drafts, offline.

python scripts/evaluate_draft.py TARGET held-out/ DRAFT [DRAFT ...]
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from sglang_dflash.training import draft as drafts
from sglang_dflash.training.data import Answers
from sglang_dflash.training.evaluate import evaluate
from sglang_dflash.training.target import Target
from sglang_dflash.training.train import few


def main(
    target: Path,
    held_out: Annotated[Path, typer.Argument(help="greedy answers (make_data.py --answers-only)")],
    draft: list[Path],
    window: Annotated[
        list[int] | None, typer.Option(help="last tokens that the draft sees, 0: all; repeatable. Else its own.")
    ] = None,
    documents: Annotated[int, typer.Option(help="at most, of each benchmark")] = 10**9,
    rows: int = 12,
    width: int = 2048,
) -> None:
    """A JSON line a draft and window: benchmark -> accept length of chain and trees, also as `served` step by step."""
    cuda = torch.cuda.is_available()
    model = Target.load(target, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    answers = Answers(held_out)
    for path in draft:
        one = drafts.load(path, model.config).to(model.embedding.device).eval()
        for size in [one.shape.window] if window is None else window:
            one.shape = replace(one.shape, window=size)
            result = evaluate(one, model, answers, few(answers, documents), rows, width)
            print(json.dumps({"draft": str(path), "window": size, "accept": result}), flush=True)


if __name__ == "__main__":
    typer.run(main)
