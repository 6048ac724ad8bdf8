"""`sglang-dflash demo`: the same chats with DFLASH and without, on real servers, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sglang_dflash import embedded
from sglang_dflash.cli import load
from sglang_dflash.cli.models import DraftOption, Models, TargetOption
from sglang_dflash.cli.server import serving

QUESTIONS = [
    "What is the capital of France?",
    "Tom has 3 boxes with 12 pencils each. He gives 9 pencils away. How many are left?",
    "Write a Python function that returns the sum of the squares of a list of numbers.",
    "Explain in two sentences why the sky is blue.",
    "A train travels 60 miles in an hour and a half. How far does it go in 6 hours?",
]
ACCEPTED = "bold green"


def demo(
    prompt: Annotated[list[str] | None, typer.Option(help="A question to ask; may be given again.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 96,
    tree: Annotated[int | None, typer.Option(min=0, help="Drafted nodes a tree.")] = None,
    model: TargetOption = embedded.NAME,
    draft: DraftOption = None,
) -> None:
    """Chat with a real SGLang server with DFLASH and without, and see which tokens were drafted.

    Two servers are started one after the other; each loads for about half a minute on a CPU. Answers are greedy,
    so both give the same text. Tokens that the draft guessed and the target accepted are **green**.
    """
    console = Console()
    with console.status("making the models ready"):
        models = Models.of(model, draft)
        tokenizer = models.tokenizer()
    questions = prompt or QUESTIONS
    prompts = [load.chat_ids(tokenizer, q) for q in questions]

    plain = []
    with (
        serving("SGLang without speculation", models.plain_args(), console) as url,
        Progress(console=console, transient=True) as progress,
    ):
        for ids in progress.track(prompts, description="answering without speculation"):
            plain.append(load.ask(url, [ids], max_tokens=max_tokens))
    drafted = []
    with serving("SGLang with DFLASH", models.dflash_args(tree), console) as url:
        for question, ids, before in zip(questions, prompts, plain, strict=True):
            console.print(f"\n[bold cyan]{question}[/]")
            drafted.append(load.ask(url, [ids], max_tokens=max_tokens))
            _show_answer(console, tokenizer, before, drafted[-1])
    console.print(_summary(plain, drafted))


def _show_answer(console: Console, tokenizer: Any, before: load.Round, after: load.Round) -> None:
    answer = after.answers[0]
    text = Text()
    for piece, accepted in pieces(tokenizer, answer):
        text.append(piece, style=ACCEPTED if accepted else "")
    console.print(text)
    length = load.accept_length([answer])
    same = answer.ids == before.answers[0].ids
    console.print(
        f"[dim]{len(answer.ids)} tokens in {len(answer.steps)} steps"
        + (f" · accept length {length:.2f}" if length else "")
        + f" · {after.tok_s:.0f} tok/s, {before.tok_s:.0f} without: {after.tok_s / before.tok_s:.1f}x · "
        + ("same text[/]" if same else "[/][red]another text than without[/]")
    )


def pieces(tokenizer: Any, answer: load.Answer) -> Iterator[tuple[str, bool]]:
    """The answer's text token by token, and whether the token is an accepted draft token.

    The first chunk is the prefill's; in every later one the last token is the target's own, the others were
    drafted.
    """
    own = {0} | {end - 1 for end in accumulate(answer.steps)}
    for i, text in enumerate(texts(tokenizer, answer.ids)):
        yield text, i not in own


def texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """An answer's text token by token."""
    decoded = [tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids))]
    # Bytes of an unfinished character decode to U+FFFD: they are shown with the token that completes it.
    shown = accumulate(decoded, lambda done, text: done if text.endswith("\ufffd") else text, initial="")
    return [text[len(done) :] for done, text in pairwise(shown)]


def _summary(plain: list[load.Round], drafted: list[load.Round]) -> Table:
    table = Table(title="\nall answers", title_justify="left")
    for name in ("", "tokens", "steps", "tokens a step", "accept length", "tok/s", "speed"):
        table.add_column(name, justify="right" if name else "left")
    base = None
    for name, rounds in (("without", plain), ("DFLASH", drafted)):
        answers = [a for r in rounds for a in r.answers]
        tokens, steps = sum(len(a.ids) for a in answers), sum(len(a.steps) for a in answers)
        tok_s = tokens / sum(r.seconds for r in rounds)
        base = base or tok_s
        length = load.accept_length(answers)
        table.add_row(
            name,
            str(tokens),
            str(steps),
            f"{tokens / steps:.2f}",
            f"{length:.2f}" if length else "-",
            f"{tok_s:.1f}",
            f"{tok_s / base:.2f}x",
        )
    return table
