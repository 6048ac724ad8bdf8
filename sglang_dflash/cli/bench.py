"""`sglang-dflash bench`: a server without speculation against one with DFLASH, in alternating rounds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sglang_dflash import embedded
from sglang_dflash.cli import load
from sglang_dflash.cli.models import DraftOption, Models, TargetOption
from sglang_dflash.cli.server import quiet, serving


@dataclass(frozen=True)
class Case:
    """A server that is compared with the one without speculation."""

    server: str  # "ours", or "own" for SGLang's own DFLASH
    nodes: int
    depth: int
    args: list[str]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"DFLASH, {self.nodes} nodes" if self.server == "ours" else "SGLang's own DFLASH"


@dataclass
class Row:
    """All rounds of one server at one concurrency."""

    server: str
    nodes: int
    depth: int
    concurrency: int
    rounds: list[load.Round] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)  # against the plain round just before
    same: list[bool] = field(default_factory=list)  # an answer: the same tokens as without speculation

    @property
    def answers(self) -> list[load.Answer]:
        return [a for r in self.rounds for a in r.answers]

    @property
    def ttft_ms(self) -> float:
        return 1000 * median(a.ttft for a in self.answers)


def bench(
    context: typer.Context,
    tree: Annotated[list[int] | None, typer.Option(min=0, help="Drafted nodes; may be given again.")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at once; may be given again.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each server, alternating.")] = 3,
    prompts: Annotated[int, typer.Option(min=1, help="GSM8K questions a round.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    own: Annotated[
        bool, typer.Option("--own", help="Also run SGLang's own DFLASH (needs an accelerator).")
    ] = False,
    model: TargetOption = embedded.NAME,
    draft: DraftOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the rows as a JSON list on the last line.")
    ] = False,
) -> None:
    """Time SGLang without speculation against SGLang with DFLASH on this machine.

    Two servers run at once and take turns with the same prompts; every round starts with an empty prefix
    cache. Speed is output tokens a second of wall time, prefill included. Options not listed here go to every
    server, such as `--dtype bfloat16`, or on one GPU `--mem-fraction-static 0.4`, so that two servers fit.
    """
    console = Console(stderr=as_json)
    with console.status("making the models ready"):
        models = Models.of(model, draft)
        tokenizer = models.tokenizer()
        with quiet():
            cases = _cases(models, tree or [None], own, context.args)
    ids = [load.chat_ids(tokenizer, q) for q in load.gsm8k(prompts)]

    rows: list[Row] = []
    with serving("SGLang without speculation", [*models.plain_args(), *context.args], console) as plain_url:
        for case in cases:
            with serving(case.title, case.args, console, case.env) as url:
                for width in concurrency or [1]:
                    settings = {"max_tokens": max_tokens, "temperature": temperature, "concurrency": width}
                    _alternate(rows, case, plain_url, url, ids, rounds, settings, console)
    console.print(_table(rows))
    if as_json:
        print(json.dumps([_json_row(row, models, temperature) for row in rows]))


def _cases(models: Models, trees: list[int] | list[None], own: bool, extra: list[str]) -> list[Case]:
    from sglang.srt.platforms import current_platform
    from sglang.srt.server_args import prepare_server_args

    from sglang_dflash.options import Options

    cases = []
    for nodes in trees:
        args = [*models.dflash_args(nodes), *extra]
        options = Options.of(prepare_server_args(args))
        cases.append(Case("ours", options.nodes, options.depth, args))
    if own:
        if current_platform.device_type == "cpu":
            raise typer.BadParameter(
                "SGLang's own DFLASH needs an accelerator, torch sees none: leave out --own"
            )
        block = options.draft.block_size
        # A plug-in list that names no plug-in keeps this package out.
        args = [*models.dflash_args(None), *extra]
        cases.append(Case("own", block - 1, block - 1, args, {"SGLANG_PLUGINS": "none"}))
    return cases


def _alternate(
    rows: list[Row],
    case: Case,
    plain_url: str,
    url: str,
    ids: list[list[int]],
    rounds: int,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Add one case's rounds at one concurrency to `rows`, and the plain rounds between them."""
    width = settings["concurrency"]
    plain = next((r for r in rows if r.server == "none" and r.concurrency == width), None)
    if plain is None:
        plain = Row("none", 0, 0, width)
        rows.append(plain)
    row = Row(case.server, case.nodes, case.depth, width)
    rows.append(row)
    for warm in (plain_url, url):
        load.ask(warm, ids[:width], **{**settings, "max_tokens": 8})
    for i in range(rounds):
        with console.status(f"{case.title}, {width} at once: round {i + 1} of {rounds}"):
            before = load.ask(plain_url, ids, **settings)
            after = load.ask(url, ids, **settings)
        plain.rounds.append(before)
        row.rounds.append(after)
        row.speedups.append(after.tok_s / before.tok_s)
        row.same += [a.ids == b.ids for a, b in zip(after.answers, before.answers, strict=True)]


def _table(rows: list[Row]) -> Table:
    table = Table(title="\noutput tokens a second, median of the rounds", title_justify="left")
    table.add_column("server")
    for name in ("nodes", "depth", "at once", "tok/s", "speed", "accept length", "ttft ms", "same text"):
        table.add_column(name, justify="right")
    for row in rows:
        length = load.accept_length(row.answers)
        table.add_row(
            row.server,
            str(row.nodes),
            str(row.depth),
            str(row.concurrency),
            f"{median(r.tok_s for r in row.rounds):.1f}",
            f"{median(row.speedups):.2f}x" if row.speedups else "1.00x",
            f"{length:.2f}" if length else "-",
            f"{row.ttft_ms:.0f}",
            f"{sum(row.same)} of {len(row.same)}" if row.same else "-",
        )
    return table


def _json_row(row: Row, models: Models, temperature: float) -> dict[str, Any]:
    length = load.accept_length(row.answers)
    return {
        "server": row.server,
        "model": models.name,
        "draft": None if row.server == "none" else models.draft_name,
        "device": _device(),
        "tree": row.nodes,
        "depth": row.depth,
        "concurrency": row.concurrency,
        "temperature": temperature,
        "tok_s": [round(r.tok_s, 2) for r in row.rounds],
        "accept_length": length and round(length, 3),
        "ttft_ms": round(row.ttft_ms, 1),
        # Samples differ from run to run, so only greedy answers can be compared.
        "same_text": all(row.same) if row.same and temperature == 0 else None,
    }


def _device() -> str:
    from sglang.srt.platforms import current_platform

    return str(current_platform.get_device_name())
