"""Turn a draft with a tied selector into a DFlash2 checkpoint, its codebooks expanded over the vocabulary.

    python scripts/export_twin.py TARGET DRAFT OUT

SGLang's own DFLASH worker serves the result, if the draft is bidirectional. Its scores are the tied ones, number for
number, so that what is compared with it is the serving and not the draft.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer

from sglang_dflash.training import draft as drafts
from sglang_dflash.training.draft import Draft, FreeSelector, TiedSelector
from sglang_dflash.training.target import Target


def expanded(draft: Draft, target: Target) -> Draft:
    """The same draft with free codebooks. Raises ValueError if it has no tied selector."""
    tied = draft.candidate_selector
    if not isinstance(tied, TiedSelector):
        raise ValueError(f"the draft's selector is {draft.shape.selector}, not tied: there is nothing to expand")
    shape = drafts.DraftShape(**{**vars(draft.shape), "selector": "free"})
    twin = Draft(shape, draft.target_config)
    twin.load_state_dict({k: v for k, v in draft.state_dict().items() if "candidate_selector" not in k}, strict=False)
    free = twin.candidate_selector
    assert isinstance(free, FreeSelector)
    with torch.no_grad():
        for book, values in zip(
            (free.predecessor_codebook, free.successor_codebook), tied.codebooks(target), strict=True
        ):
            book.copy_(values)
        free.hidden_projection.weight.copy_(tied.hidden_projection.weight)
    return twin


def main(target: Path, draft: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write OUT, the DFlash2 form of DRAFT."""
    model = Target.load(target, "cpu", torch.float32)
    twin = expanded(drafts.load(draft, model.config), model)
    drafts.save(twin, twin.state_dict(), out, getattr(torch, dtype))
    print(json.dumps({"twin": str(out), "causal": twin.shape.causal}))


if __name__ == "__main__":
    typer.run(main)
