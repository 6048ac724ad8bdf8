"""`sglang-dflash watch`: what a running server's DFLASH does, from its /metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated

import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

BAR = 40  # characters of a full bar
DEPTHS = ("dflash_accepted_drafts_total", "depth")
PARTS = ("dflash_step_seconds_total", "part")


@dataclass(frozen=True)
class Poll:
    """One reading of /metrics. values: name -> labels -> value, SGLang's and ours."""

    at: float
    values: dict[str, dict[tuple[tuple[str, str], ...], float]]

    def total(self, name: str) -> float:
        """A metric's sum over all its labels."""
        return sum(self.values.get(f"sglang:{name}", {}).values())

    def by(self, name: str, label: str) -> dict[str, float]:
        """Its sums by the values of one label, in the metric's order."""
        sums: dict[str, float] = defaultdict(float)
        for labels, value in self.values.get(f"sglang:{name}", {}).items():
            sums[dict(labels)[label]] += value
        return dict(sums)


@dataclass(frozen=True)
class Reading:
    """What happened between two polls. accept_length, by_depth, parts: None and empty where no step ended meanwhile.

    by_depth: share of steps that accepted a draft token there, from depth 1. parts: part -> seconds, of wall time.
    steps: counted per request.
    """

    seconds: float
    steps: float
    tok_s: float
    accept_length: float | None
    by_depth: list[float]
    parts: dict[str, float]
    running: int
    queued: int
    pool: float
    nodes: int


def watch(
    url: Annotated[str, typer.Argument(help="The server.")] = "http://127.0.0.1:30000",
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option(help="Print one reading, of two looks, and end.")] = False,
) -> None:
    """Watch a running server: tokens a second, accept length, how deep drafts are accepted, where the time goes.

    The server must have been started with `--enable-metrics`. Requests and pool use are those of its last log line
    (`--decode-log-interval`), all else counts every step. Ctrl-C ends it.
    """
    console, last = Console(), poll(url)
    if once:
        time.sleep(every)
        console.print(shown(reading(last, poll(url)), url))
        return
    with Live(Text("…"), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                now = poll(url)
                live.update(shown(reading(last, now), url), refresh=True)
                last = now
        except KeyboardInterrupt:
            return


def poll(url: str) -> Poll:
    """Read the server's metrics. Raises `typer.BadParameter` where there is no server or no DFLASH metrics."""
    address = f"{url.rstrip('/')}/metrics"
    try:
        response = httpx.get(address, timeout=10, follow_redirects=True)
    except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
        raise typer.BadParameter(f"no server answers at {url} ({error}): start one, or give its URL") from error
    if response.status_code == httpx.codes.NOT_FOUND:
        raise typer.BadParameter(f"the server at {url} serves no metrics: start it with --enable-metrics")
    if response.status_code != httpx.codes.OK:
        raise typer.BadParameter(f"{address} answers {response.status_code}: {response.text[:200]}")
    values: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            values[sample.name][tuple(sample.labels.items())] = sample.value
    if "sglang:dflash_steps_total" not in values:
        raise typer.BadParameter(
            f"{address} has no sglang:dflash_steps_total: start the server with --speculative-algorithm DFLASH and "
            "--enable-metrics; if it was, its log says why SGLang's own worker serves"
        )
    return Poll(time.monotonic(), dict(values))


def reading(before: Poll, after: Poll) -> Reading:
    """What the counters say of the time between; one that fell was a restarted server's."""

    def grown(new: float, old: float) -> float:
        return new - old if new >= old else new

    seconds = after.at - before.at
    steps = grown(after.total("dflash_steps_total"), before.total("dflash_steps_total"))
    old_depths, old_parts = before.by(*DEPTHS), before.by(*PARTS)
    depths = sorted(after.by(*DEPTHS).items(), key=lambda item: int(item[0]))
    accepted = [grown(count, old_depths.get(depth, 0)) for depth, count in depths]
    parts = {part: grown(total, old_parts.get(part, 0)) for part, total in after.by(*PARTS).items()}
    return Reading(
        seconds=seconds,
        steps=steps,
        tok_s=(steps + sum(accepted)) / seconds,
        accept_length=1 + sum(accepted) / steps if steps else None,
        by_depth=[count / steps for count in accepted] if steps else [],
        parts=parts if steps else {},
        running=int(after.total("num_running_reqs")),
        queued=int(after.total("num_queue_reqs")),
        pool=after.total("token_usage"),
        nodes=int(after.total("dflash_tree_nodes")),
    )


def shown(now: Reading, url: str) -> Group:
    """A reading as lines and bars."""
    length = f"{now.accept_length:.2f}" if now.accept_length else "–"
    facts = Text.from_markup(
        f"[bold]{now.tok_s:.1f}[/] tok/s · accept length [bold green]{length}[/] · {now.nodes} nodes · "
        f"{now.running} running, {now.queued} queued · pool {now.pool:.1%}"
    )
    bars = Table.grid(padding=(0, 2))
    for depth, share in enumerate(now.by_depth, 1):
        bars.add_row(f"{depth}", f"{share:.0%}", _bar(share, "green"))
    parts = Table.grid(padding=(0, 2))
    busy = sum(now.parts.values())
    for part, seconds in now.parts.items():
        share = seconds / busy if busy else 0.0
        parts.add_row(part, f"{1000 * seconds / now.steps:.1f} ms", f"{share:.0%}", _bar(share, "cyan"))
    lines: list[Text | Table] = [Text(f"{url}, the last {now.seconds:.1f} s", "dim"), facts]
    if now.steps:
        lines += [
            Text(f"\naccepted by depth, of {now.steps:.0f} steps", "bold"), bars,
            Text("\ntime by part, of one request's step", "bold"), parts,
        ]  # fmt: skip
    else:
        lines.append(Text("no step ended meanwhile", "dim"))
    return Group(*lines)


def _bar(share: float, style: str) -> Text:
    return Text("█" * round(share * BAR), style)
