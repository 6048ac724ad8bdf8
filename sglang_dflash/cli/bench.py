"""`sglang-dflash bench`: SGLang without speculation, with its own DFLASH and with ours, in alternating rounds."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from sglang_dflash import embedded
from sglang_dflash.cli import load, results
from sglang_dflash.cli.models import DraftOption, Models, TargetOption
from sglang_dflash.cli.results import Row, Server
from sglang_dflash.cli.server import ServerError, quiet, starting

WARM_UP_TOKENS = 16
TABLE_WIDTH = 120
DFLASH_RUNNING = 48  # requests that SGLang runs at once with DFLASH, unless told otherwise
PLUGINS_OFF = {"SGLANG_PLUGINS": "none"}  # a plug-in list that names no plug-in keeps this package out


@dataclass(frozen=True)
class Plan:
    """What every server is asked."""

    prompts: dict[int, list[list[int]]]  # token ids of a round, by concurrency
    rounds: int
    max_tokens: int
    stream_interval: int

    def ask(self, url: str, row: Row) -> load.Round:
        return self._ask(url, row, self.prompts[row.concurrency], self.max_tokens)

    def warm_up(self, url: str, row: Row) -> None:
        self._ask(url, row, self.prompts[row.concurrency][: row.concurrency], WARM_UP_TOKENS)

    def _ask(self, url: str, row: Row, prompts: list[list[int]], max_tokens: int) -> load.Round:
        return load.ask(
            url,
            prompts,
            max_tokens=max_tokens,
            temperature=row.temperature,
            concurrency=row.concurrency,
            stream_interval=self.stream_interval,
        )


def bench(
    context: typer.Context,
    tree: Annotated[
        list[str] | None,
        typer.Option(metavar="N[:D]", help="Drafted nodes, and how deep; chain:D is a chain. May be given again."),
    ] = None,
    opponent: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="A draft for SGLang's own DFLASH (needs an accelerator). May be given again."
        ),
    ] = None,
    opponent_block: Annotated[int | None, typer.Option(min=2, help="Its block size, where not its config's.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Requests at once. May be given again.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(min=0, help="0 is greedy. May be given again.")] = None,
    benchmark: Annotated[Literal["gsm8k", "chat", "code"], typer.Option(help="Whose prompts are sent.")] = "gsm8k",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Instead, prompts of about so many tokens: lists of GSM8K problems, one to solve."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each server, alternating.")] = 3,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts a round at least.")] = 8,
    per_slot: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts a round for each request at once, at least. 1 on a CPU, else 10."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most. 96 on a CPU, else 256.")
    ] = None,
    stream_interval: Annotated[
        int | None, typer.Option(min=1, help="Tokens a chunk of the stream. Unless given: the first, then all others.")
    ] = None,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="One server after the other, where two do not fit.")
    ] = False,
    model: TargetOption = embedded.NAME,
    draft: DraftOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as a JSON list on the last line.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the rows there, and a plot beside it.")
    ] = None,
) -> None:
    """Time SGLang without speculation against SGLang with DFLASH on this machine.

    All servers run at once and take turns with the same prompts; every round starts with an empty prefix cache.
    Speed is output tokens a second of wall time, prefill included. Options not listed here go to every server, such as
    `--dtype bfloat16`. On one GPU, `--mem-fraction-static 0.3` is each server's part of what is free when it
    starts; `--max-total-tokens` gives all the same KV cache.
    """
    console = Console(stderr=as_json)
    try:
        if out:
            results.check_out(out)
        with console.status("making the models ready"):
            models = Models.of(model, draft)
            with quiet():
                per_slot = per_slot or (1 if _on_cpu() else 10)
                max_tokens = max_tokens or (96 if _on_cpu() else 256)
                widths = concurrency or [1]
                servers = _servers(
                    models, tree, opponent or [], opponent_block, for_every_server(context.args, widths)
                )
            counts = {width: max(prompts, per_slot * width) for width in widths}
            ids = prompt_ids(models, benchmark, max(counts.values()), prompt_tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    plan = Plan(
        prompts={width: ids[:count] for width, count in counts.items()},
        rounds=rounds,
        max_tokens=max_tokens,
        stream_interval=stream_interval or max_tokens,
    )
    rows = [Row(s, width, heat) for heat in temperature or [0.0] for width in widths for s in servers]
    about = {
        "command": shlex.join(["sglang-dflash", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "device": device_name(),
    }
    same = {"model": models.name, "device": device_name(), "benchmark": benchmark, "max_tokens": max_tokens}
    if prompt_tokens:
        same |= {"benchmark": "gsm8k", "prompt_tokens": prompt_tokens}

    def write() -> None:
        if out:
            results.save(out, about, results.as_json(rows, same))

    try:
        _measure(rows, [[s] for s in servers] if one_at_a_time else [servers], plan, write, console)
    finally:  # an hour's rounds must not be lost with a server that fails in the last
        if any(row.rounds for row in rows):
            write()
            table = results.table(rows, _caption(rounds, one_at_a_time))
            Console(stderr=as_json, width=max(console.width, TABLE_WIDTH)).print(table)  # a folded row reads badly
            if out:
                console.print(f"written: {out} and {out.with_suffix('.png')}")
            if as_json:
                print(json.dumps(results.as_json(rows, same)))


def _measure(
    rows: list[Row], groups: list[list[Server]], plan: Plan, write: Callable[[], None], console: Console
) -> None:
    """Fill the rows' rounds, and write after each of them. The servers of a group run at once and take turns."""
    for group in groups:
        with ExitStack() as stack:
            urls = _start(group, stack, console)
            here = [row for row in rows if row.server in group]
            for setting in dict.fromkeys((row.temperature, row.concurrency) for row in here):
                turn = [row for row in here if (row.temperature, row.concurrency) == setting]
                _take_turns(turn, urls, plan, write, console)


def _take_turns(
    rows: list[Row], urls: dict[str, str], plan: Plan, write: Callable[[], None], console: Console
) -> None:
    """All rounds of one concurrency and temperature: the first of every server, the second of every server, …"""
    with console.status("") as status:
        for row in rows:
            status.update(f"{row.server.label}, {row.concurrency} at once: warming up")
            row.memory = load.memory_gb(urls[row.server.label])
            plan.warm_up(urls[row.server.label], row)
        for i in range(plan.rounds):
            for row in rows:
                name = f"{row.server.label}, {row.concurrency} at once, temperature {row.temperature:g}"
                status.update(f"{name}: round {i + 1} of {plan.rounds}")
                row.rounds.append(plan.ask(urls[row.server.label], row))
            write()


def _start(group: list[Server], stack: ExitStack, console: Console) -> dict[str, str]:
    """Start the servers; gives their URLs by label.

    With an accelerator all import SGLang at once, and then each in its turn takes memory: SGLang sizes a KV cache by
    what is free before its weights are loaded and after, which no other server must change meanwhile. A CPU has no
    cores to spare: there each starts when the one before it answers.
    """
    at_once = not _on_cpu()
    started = (stack.enter_context(starting(s.label, s.args, s.env, gated=at_once)) for s in group)
    urls: dict[str, str] = {}
    for label, server in zip((s.label for s in group), list(started) if at_once else started, strict=True):
        try:
            urls[label] = server.ready(console)
        except ServerError as error:
            if not urls:
                raise
            raise ServerError(
                f"{error}\nIf it lacks memory beside {', '.join(urls)}: give a smaller "
                "--mem-fraction-static, or --one-at-a-time"
            ) from error
    return urls


def _servers(
    models: Models, trees: list[str] | None, opponents: list[str], block: int | None, extra: list[str]
) -> list[Server]:
    """All servers that are compared, the one without speculation first."""
    servers = [
        Server("none", [*models.plain_args(), *extra]),
        *_opponents(models, opponents, block, extra),
        *(_ours(models, tree, extra) for tree in trees or [""]),
    ]
    labels = [server.label for server in servers]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise ValueError(f"two of the servers are {twice!r}: leave one out")
    return servers


def for_every_server(extra: list[str], widths: list[int]) -> list[str]:
    """Options of every server: those given, and as many requests at once as are sent."""
    widest = max(widths)
    if widest > DFLASH_RUNNING and not any(a.startswith("--max-running-requests") for a in extra):
        return [*extra, "--max-running-requests", str(widest)]
    return extra


def _ours(models: Models, tree: str, extra: list[str]) -> Server:
    """The server with this package's DFLASH for one --tree. Raises ValueError where it cannot be served."""
    args = [*models.dflash_args(None), *tree_args(tree), *extra]
    asked = _parsed(args, extra)
    from sglang_dflash.arguments import options_of, reason_to_hand_over  # SGLang must have been imported before

    reason = reason_to_hand_over(asked)
    if reason:
        raise ValueError(f"{reason}: SGLang's own DFLASH would serve it, name it with --opponent instead")
    options = options_of(asked)
    depth = options.largest.depth if len(options.shapes) == 1 else 0
    return Server("ours", args, models.draft_name, options.largest.nodes, depth, options.chain)


def tree_args(tree: str) -> list[str]:
    """SGLang's arguments for `N`, `N:D` or `chain:D`; none for the default tree, an empty string."""
    if not tree:
        return []
    found = re.fullmatch(r"(\d+)(?::(\d+))?|chain:(\d+)", tree)
    if found is None:
        raise ValueError(f"--tree {tree!r}: give nodes (15), nodes and depth (31:10), or a chain's length (chain:8)")
    nodes, depth, chain = found.groups()
    args = ["--speculative-num-draft-tokens", nodes or chain]
    if depth or chain:
        args += ["--speculative-num-steps", depth or chain]
    return [*args, "--speculative-eagle-topk", "1"] if chain else args


def _parsed(args: list[str], extra: list[str]) -> Any:
    """SGLang's own record of the arguments."""
    from sglang.srt.server_args import prepare_server_args

    try:
        return prepare_server_args(args)
    except SystemExit as error:  # argparse's, whose message is for another program's help
        raise ValueError(f"neither bench nor SGLang's server takes all of {shlex.join(extra)}") from error


def _opponents(models: Models, drafts: list[str], block: int | None, extra: list[str]) -> list[Server]:
    """Servers with SGLang's own DFLASH."""
    if block and not drafts:
        raise ValueError(f"--opponent-block {block} is for --opponent: name one")
    if drafts and _on_cpu():
        raise ValueError("SGLang's own DFLASH needs an accelerator, torch sees none: leave out --opponent")
    servers = []
    for name in drafts:
        pair = embedded.resolve(name)
        draft = str(pair.draft) if pair else name
        # SGLang counts the bonus token: what it calls draft tokens is the block.
        size = block or _block_size(draft)
        args = [*models.dflash_args(size, draft), *extra]
        servers.append(Server("own", args, name, size - 1, size - 1, chain=True, env=PLUGINS_OFF))
    return servers


def _block_size(draft: str) -> int:
    """A draft's block size where SGLang's own worker looks for it, and what it takes where there is none."""
    from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = parse_dflash_draft_config(draft_hf_config=get_config(draft, trust_remote_code=False))
    return int(config.resolve_block_size(default=16))


def prompt_ids(models: Models, benchmark: str, count: int, tokens: int | None = None) -> list[list[int]]:
    """`count` chats on a benchmark's prompts, or of about so many tokens each."""
    if tokens is not None:
        return load.long_chats(models.tokenizer(), load.gsm8k(load.GSM8K), tokens, count)
    questions = load.questions(benchmark, count)
    tokenizer = models.tokenizer()
    return [load.chat_ids(tokenizer, question) for question in questions]


def _caption(rounds: int, one_at_a_time: bool) -> str:
    order = "one server after the other, not alternating" if one_at_a_time else "servers taking turns"
    return f"Output tokens a second: median of {rounds} rounds, {order}. Speeds are medians of each round's ratio."


def _on_cpu() -> bool:
    from sglang.srt.platforms import current_platform

    return bool(current_platform.device_type == "cpu")


def device_name() -> str:
    """What servers run on here, as SGLang names it."""
    from sglang.srt.platforms import current_platform

    return str(current_platform.get_device_name())
