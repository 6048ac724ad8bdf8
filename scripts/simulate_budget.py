"""The budget beside the best fixed tree and an oracle, on recorded traces; no server, no model, no GPU.

usage: simulate_budget.py TRACE.npz OUT.json --roof roof.json [--steps steps.json]

TRACE.npz is record_trace.py's. Costs are a GPU's linear layers by tokens, as time_roof.py wrote them, and a CPU
server's steps by requests and nodes, as time_shapes.py did. A world is a benchmark, a temperature, a number of requests
at once and a cost; in it the same is asked of every policy:

- fixed: one shape always;
- ours: sglang_dflash.budget, told what a server's planner is told, when it is told (a step's results come while the
  next one runs, and a request that has ended stays for that step);
- oracle: each step the shape of most tokens a second, by what the step is going to accept.

What a prefill takes is left out: each emitted token needs the same share of it. Besides, a day: requests at once step
1, 64, 4, 256, 1, benchmark and temperature change, and ours goes on with what it has learned. A plot goes beside OUT.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_dflash.arguments import LADDER, most_requests
from sglang_dflash.budget import Budget, Choice, Shape

RECORDED = 31  # nodes of a trace's trees: record_trace.py's NODES
SHAPES = [Shape(n, d, d + 1 if n else 1, most_requests(n)) for n, d in LADDER if n <= RECORDED]
SETTLING = 100  # tokens of each request before a world is looked at
HICCUP = 0.03  # standard deviation of a step's seconds, as a share
DAY = ((1, "gsm8k 0"), (64, "gsm8k 0"), (4, "chat 1"), (256, "code 0"), (1, "gsm8k 1"))
DAY_TOKENS = 3000, 60  # of a segment, for each request at once besides

Seconds = Callable[[int, Shape], float]


class Trace:
    """Answers by group, and what each shape accepts at every position."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as content:
            self.groups, self.starts, self.nodes = (content[name] for name in ("groups", "starts", "nodes"))
        at = np.arange(1, self.nodes.shape[1] + 1)
        self.accepted = np.stack(
            [((self.nodes > 0) & (self.nodes <= s.nodes) & (at <= s.depth)).sum(1) for s in SHAPES], 1
        )  # [positions, shapes]

    def answers(self, group: str) -> np.ndarray:
        """First position and end of each answer, [answers, 2]."""
        of_group = np.flatnonzero(self.groups == group)
        return np.stack([self.starts[of_group], self.starts[of_group + 1]], 1)


class Passes:
    """Seconds of a GPU's linear layers by tokens; wider passes than were timed cost in proportion."""

    def __init__(self, file: Path) -> None:
        rows = json.loads(file.read_text())["widths"]
        columns = ("tokens", "target_ms", "draft_ms")
        self.tokens, self.target, self.draft = (np.array([row[name] for row in rows]) for name in columns)

    def seconds(self, verified: int, drafted: int) -> float:
        """A target's pass over so many tokens, and a draft's, if it reads any."""
        both = ((verified, self.target), (drafted, self.draft))
        widest = self.tokens[-1]
        return sum(float(np.interp(n, self.tokens, ms)) * max(n / widest, 1) for n, ms in both if n) / 1000


def roof(file: Path) -> Seconds:
    """Steps of nothing but a GPU's linear layers."""
    passes = Passes(file)
    return lambda requests, s: passes.seconds(requests * s.verified, requests * s.block if s.nodes else 0)


def steps(file: Path) -> Seconds:
    """Seconds of a server's greedy steps; between two batch sizes they are interpolated."""
    rows = [row for row in json.loads(file.read_text())["steps"] if row["temperature"] == 0]
    by_nodes = {
        nodes: np.array(sorted((r["requests"], r["seconds"]) for r in rows if r["nodes"] == nodes)).T
        for nodes in {r["nodes"] for r in rows}
    }

    def seconds(requests: int, shape: Shape) -> float:
        sizes, took = by_nodes[shape.nodes]
        return float(np.interp(requests, sizes, took))

    return seconds


class Requests:
    """The running batch: answers drawn from one group, for every policy the same, a new one where one has ended."""

    def __init__(self, trace: Trace, seconds: Seconds) -> None:
        self.trace, self.seconds = trace, seconds
        self.hiccups = np.random.default_rng(2)
        self.at, self.end, self.kinds = np.zeros((3, 0), dtype=np.int64)

    def change(self, at_once: int, group: str) -> None:
        """So many requests from now on; those that run already go on, as far as there is room."""
        self.rng = np.random.default_rng(1)
        self.pool, self.kind = self.trace.answers(group), int(not group.endswith(" 0"))
        fresh = self._drawn(max(0, at_once - len(self.at)), anywhere=True)
        running = self.at, self.end, self.kinds
        self.at, self.end, self.kinds = (np.concatenate(x)[:at_once] for x in zip(running, fresh, strict=True))

    def _drawn(self, count: int, anywhere: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first, end = self.pool[self.rng.integers(len(self.pool), size=count)].T
        return (self.rng.integers(first, end) if anywhere else first), end, np.full(count, self.kind)

    def ended(self) -> np.ndarray:
        return np.flatnonzero(self.at >= self.end)

    def replace(self, ended: np.ndarray) -> None:
        self.at[ended], self.end[ended], self.kinds[ended] = self._drawn(len(ended), anywhere=False)

    def would(self) -> np.ndarray:
        """Tokens that each shape would emit, [requests, shapes]."""
        running = self.at < self.end
        return (self.trace.accepted[np.where(running, self.at, 0)] + 1) * running[:, None]

    def go(self, shape: int) -> tuple[np.ndarray, np.ndarray, float]:
        """One step: walked nodes, emitted tokens, and seconds."""
        emitted = self.would()[:, shape]
        walked = self.trace.nodes[np.minimum(self.at, len(self.trace.nodes) - 1)][:, : SHAPES[shape].depth]
        nodes = np.concatenate([np.zeros((len(walked), 1), dtype=np.int64), walked], 1)
        took = self.seconds(len(self.at), SHAPES[shape]) * np.exp(HICCUP * self.hiccups.standard_normal())
        self.at = self.at + emitted
        return nodes, emitted, took


class Ours:
    """The budget, told things as a server's planner tells it."""

    def __init__(self, requests: Requests, measured: bool) -> None:
        """measured: whether passes are timed before serving, as they are where graphs are captured."""
        self.requests, self.budget = requests, Budget(SHAPES, 512)
        self.last: tuple[Choice, np.ndarray, np.ndarray] | None = None
        sizes = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
        for index, shape in enumerate(SHAPES if measured else ()):
            self.budget.cost.expect(index, sizes, np.array([requests.seconds(size, shape) for size in sizes]))

    def begin(self, numbers: np.ndarray) -> None:
        self.budget.gain.begin(numbers, self.requests.kinds[numbers])

    def go_on(self, requests: Requests) -> None:
        """With what is known, and other requests."""
        self.requests, self.last = requests, None

    def step(self, alone: bool) -> tuple[int, float, int]:
        """One step: tokens, seconds, shape. alone: no prefill follows it, so that its time is known."""
        bs = len(self.requests.at)
        choice = self.budget.choose(np.arange(bs), self.requests.kinds.copy(), np.ones(bs, dtype=bool))
        if self.last is not None:
            self.budget.learn(*self.last)
        nodes, emitted, took = self.requests.go(choice.shape)
        self.last = choice, nodes, emitted
        if alone:
            self.budget.cost.took(bs, choice.shape, took)
        return int(emitted.sum()), took, choice.shape


@dataclass
class Outcome:
    tokens: int
    seconds: float
    shares: list[float]  # of steps, by shape

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(requests: Requests, step: Callable[[bool], tuple[int, float, int]], begin: Any, least: int) -> Outcome:
    """Steps until so many tokens are emitted."""
    tokens, seconds, taken = 0, 0.0, np.zeros(len(SHAPES))
    while tokens < least:
        ended = requests.ended()
        emitted, took, shape = step(not len(ended))
        requests.replace(ended)
        begin(ended)
        tokens, seconds, taken[shape] = tokens + emitted, seconds + took, taken[shape] + 1
    return Outcome(tokens, seconds, (taken / taken.sum()).round(3).tolist())


def no_matter(numbers: np.ndarray) -> None:
    """Policies that know nothing need not be told who is new."""


def fixed(requests: Requests, shape: int) -> Callable[[bool], tuple[int, float, int]]:
    def step(alone: bool) -> tuple[int, float, int]:
        _, emitted, took = requests.go(shape)
        return int(emitted.sum()), took, shape

    return step


def oracle(requests: Requests) -> Callable[[bool], tuple[int, float, int]]:
    def step(alone: bool) -> tuple[int, float, int]:
        bs = len(requests.at)
        seconds = [requests.seconds(bs, s) if bs <= s.most else np.inf for s in SHAPES]
        shape = int((requests.would().sum(0) / seconds).argmax())
        return fixed(requests, shape)(alone)

    return step


def best_fixed(trace: Trace, seconds: Seconds, at_once: int, group: str, least: int) -> tuple[Shape, float]:
    """The best of the fixed shapes, by trial, and its tokens a second."""
    rates = []
    for index, shape in enumerate(SHAPES):
        requests = Requests(trace, seconds)
        requests.change(at_once, group)
        rates.append(run(requests, fixed(requests, index), no_matter, least).rate if at_once <= shape.most else 0.0)
    return SHAPES[int(np.argmax(rates))], max(rates)


def world(trace: Trace, seconds: Seconds, measured: bool, at_once: int, group: str) -> dict[str, Any]:
    """One row: tokens a second of every policy."""
    least = 4000 + 100 * at_once
    shape, best = best_fixed(trace, seconds, at_once, group, least)
    knowing = Requests(trace, seconds)
    knowing.change(at_once, group)
    known = run(knowing, oracle(knowing), no_matter, least).rate
    requests = Requests(trace, seconds)
    requests.change(at_once, group)
    ours = Ours(requests, measured)
    ours.begin(np.arange(at_once))
    early = run(requests, ours.step, ours.begin, SETTLING * at_once)
    ours.go_on(Requests(trace, seconds))
    ours.requests.change(at_once, group)
    ours.begin(np.arange(at_once))
    outcome = run(ours.requests, ours.step, ours.begin, least)
    return {
        "group": group,
        "at_once": at_once,
        "plain": round(at_once / seconds(at_once, SHAPES[0]), 1),
        "best_fixed": round(best, 1),
        "nodes": shape.nodes,
        "oracle": round(known, 1),
        "ours": round(outcome.rate, 1),
        "ours_at_first": round(early.rate, 1),
        "shares": outcome.shares,
    }


def day(trace: Trace, seconds: Seconds, measured: bool) -> list[dict[str, Any]]:
    """Rows of its segments; ours starts with the first and learns on."""
    requests, rows = Requests(trace, seconds), []
    ours = Ours(requests, measured)
    for at_once, group in DAY:
        before = len(requests.at)
        requests.change(at_once, group)
        ours.begin(np.arange(before, at_once))
        least = DAY_TOKENS[0] + DAY_TOKENS[1] * at_once
        outcome = run(requests, ours.step, ours.begin, least)
        shape, best = best_fixed(trace, seconds, at_once, group, least)
        rows.append({"group": group, "at_once": at_once, "best_fixed": round(best, 1), "nodes": shape.nodes,
                     "ours": round(outcome.rate, 1), "shares": outcome.shares})  # fmt: skip
    return rows


def plot(results: dict[str, Any], path: Path) -> None:
    """Tokens a second as a share of the best fixed shape's: a panel a cost, a line a group; the days below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(results), 7), layout="tight")
    grid = figure.subplots(2, len(results), squeeze=False, sharey=True)
    for (name, of), (above, below) in zip(results.items(), grid.T, strict=True):
        for group in dict.fromkeys(row["group"] for row in of["worlds"]):
            rows = [row for row in of["worlds"] if row["group"] == group]
            loads = [row["at_once"] for row in rows]
            line = above.plot(loads, [r["ours"] / r["best_fixed"] for r in rows], marker=".", label=group)
            above.plot(loads, [r["oracle"] / r["best_fixed"] for r in rows], ":", color=line[0].get_color())
        above.set(title=name, xlabel="requests at once", xscale="log", xticks=loads, xticklabels=loads)
        above.minorticks_off()
        names = [f"{row['at_once']}\n{row['group']}" for row in of["day"]]
        below.bar(range(len(names)), [row["ours"] / row["best_fixed"] for row in of["day"]])
        below.set(xticks=range(len(names)), xticklabels=names, xlabel="a day: requests at once")
    grid[0, 0].legend(fontsize="small", title="benchmark, temperature", loc="upper right")
    for axes in grid.flat:
        axes.axhline(1, color="grey", lw=0.8)
        axes.set(ylim=(0.85, 1.15), ylabel="of the best fixed shape (dots: oracle)")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--roof", type=Path, required=True)
    parser.add_argument("--steps", type=Path)
    args = parser.parse_args()
    trace, results = Trace(args.trace), {}
    costs: list[tuple[Path | None, Callable[[Path], Seconds], bool, tuple[int, ...]]] = [
        (args.roof, roof, True, (1, 4, 16, 64, 128, 256)), (args.steps, steps, False, (1, 4, 16)),
    ]  # fmt: skip
    for file, read, measured, loads in costs:
        if file is None:
            continue
        device, seconds = json.loads(file.read_text())["device"], read(file)
        groups = [str(group) for group in dict.fromkeys(trace.groups)]
        rows = [world(trace, seconds, measured, load, group) for group in groups for load in loads]
        results[device] = {"worlds": rows, "day": day(trace, seconds, measured)}
        for row in [*rows, *results[device]["day"]]:
            print(f"{device[:12]:12} {row['group']:8} {row['at_once']:4}: best fixed {row['nodes']:2} nodes; ours "
                  f"{row['ours'] / row['best_fixed']:.3f} of it", f"oracle {row['oracle'] / row['best_fixed']:.3f}"
                  if "oracle" in row else "in the day", row["shares"])  # fmt: skip
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
