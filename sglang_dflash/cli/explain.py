"""`sglang-dflash explain`: how one greedy answer came about, step by step, as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sglang_dflash import embedded
from sglang_dflash.cli import load
from sglang_dflash.cli.explain_page import page
from sglang_dflash.cli.models import DraftOption, Models, TargetOption


def explain(
    prompt: Annotated[str, typer.Argument(help="A question to ask.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 48,
    nodes: Annotated[int, typer.Option(min=1, help="Drafted nodes a tree.")] = 15,
    depth: Annotated[int | None, typer.Option(min=1, help="Drafted positions; by default as a server has it.")] = None,
    model: TargetOption = embedded.NAME,
    draft: DraftOption = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("explain.html"),
) -> None:
    """Draw each step's tree of a greedy answer: what was accepted, and where draft and target parted.

    Computed in this process, on the CPU and in float32, without a server; the draft is one of the kinds that
    `scripts/train_draft.py` makes. The page needs nothing but itself.
    """
    console = Console()
    with console.status("making the models ready"):
        models = Models.of(model, draft)
        tokenizer = models.tokenizer()
        from transformers.utils import logging  # after the tokenizer, which imports it anyway

        from sglang_dflash.training.explain import explain as follow  # torch: seconds to import

        logging.disable_progress_bar()
        target, drafter = directory(models.target), directory(models.draft)
    with console.status("answering and drafting"):
        ids = load.chat_ids(tokenizer, prompt)
        try:
            told = follow(target, drafter, ids, max_tokens, nodes, depth)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    out.write_text(page(told, prompt, models.name, models.draft_name, tokenizer), encoding="utf-8")
    length = told.accept_length
    console.print(
        f"{len(told.answer)} tokens in {len(told.steps)} steps"
        + (f", accept length {length:.2f}" if length else "")
        + f": open {out} in a browser",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def directory(name: str) -> Path:
    """A checkpoint's directory, downloaded from the hub where `name` is none."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))
