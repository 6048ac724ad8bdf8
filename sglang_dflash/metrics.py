"""What a step measures of itself, for the budget, in SGLang's /metrics and in the log.

SGLang counts accept lengths itself; here are the tree's size, how deep drafts are accepted, and where the time goes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from sglang_dflash.budget import Choice
from sglang_dflash.options import Options

CONTEXTS = (512, 2048, 8192, 32768)  # tokens: accept lengths are told apart up to each of them, and beyond

logger = logging.getLogger(__name__)


class Clock:
    """When the parts of one step ended: start, drafted, verified, done; on a GPU, when it got there itself.

    parts: whether anybody asks for more than start and end.
    """

    def __init__(self, on_gpu: bool, *, parts: bool) -> None:
        self._on_gpu, self._parts = on_gpu, parts
        self._marks: list[Any] = []
        self.done()  # the start

    def drafted(self) -> None:
        if self._parts:
            self.done()

    verified = drafted

    def done(self) -> None:
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    @property
    def start(self) -> Any:
        return self._marks[0]

    def since(self, start: Any) -> float:
        """Seconds from another step's start to this one's; on a GPU, both must have ended."""
        return self._seconds(start, self.start)

    def seconds(self) -> float:
        """Seconds of the step; on a GPU it must have ended."""
        return self._seconds(self._marks[0], self._marks[-1])

    def parts(self) -> list[float]:
        """Seconds of each part; a step on a GPU must have ended."""
        return [self._seconds(start, end) for start, end in pairwise(self._marks)]

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._on_gpu else end - start


class StepMetrics:
    """Counts steps into prometheus_client's registry, which SGLang serves."""

    def __init__(self, options: Options, labels: dict[str, str]) -> None:
        from prometheus_client import Counter, Gauge  # after SGLang has set its multi-process directory

        names = list(labels)
        nodes = Gauge(
            "sglang:dflash_tree_nodes",
            "Most drafted nodes of a tree.",
            names,
            multiprocess_mode="mostrecent",
        )
        nodes.labels(**labels).set(options.largest.nodes)
        accepted = Counter(
            "sglang:dflash_accepted_drafts", "Draft tokens accepted, by depth.", [*names, "depth"]
        )
        self._steps = Counter("sglang:dflash_steps", "Speculative steps, counted per request.", names).labels(
            **labels
        )
        self._accepted = [
            accepted.labels(**labels, depth=str(depth)) for depth in range(1, options.largest.depth + 1)
        ]
        seconds = Counter("sglang:dflash_step_seconds", "Seconds of steps, by part.", [*names, "part"])
        self._seconds = [seconds.labels(**labels, part=part) for part in ("draft", "verify", "other")]
        shapes = Counter("sglang:dflash_shape_steps", "Steps of batches, by drafted nodes.", [*names, "nodes"])
        self._shapes = [shapes.labels(**labels, nodes=str(shape.nodes)) for shape in options.shapes]
        self._prompts = Counter(
            "sglang:dflash_prompts_beside", "Prompts that verify passes read beside their trees.", names
        ).labels(**labels)
        by_context = [*names, "context"]
        steps = Counter("sglang:dflash_context_steps", "Steps of requests, by tokens of context up to.", by_context)
        tokens = Counter("sglang:dflash_context_tokens", "Tokens that these steps emitted.", by_context)
        bounds = [*map(str, CONTEXTS), "+Inf"]
        self._context_steps, self._context_tokens = (
            [counter.labels(**labels, context=bound) for bound in bounds] for counter in (steps, tokens)
        )

    def step_done(self, clock: Clock, shape: int, lens: np.ndarray, contexts: list[int], prompts: int) -> None:
        """Count a step whose results reached the host. shape: its index; lens [bs]: emitted tokens, 0 of a request that
        had ended before; contexts [bs]: tokens before them; prompts: how many it read.
        """
        self._prompts.inc(prompts)
        for counter, seconds in zip(self._seconds, clock.parts(), strict=True):
            counter.inc(seconds)
        self._shapes[shape].inc(bool(lens.any()))  # a pass beyond all requests' ends counts nowhere
        self._steps.inc(int(np.count_nonzero(lens)))
        bounds = np.searchsorted(CONTEXTS, contexts)
        for counters, counts in (
            (self._accepted, (lens[:, None] > np.arange(1, len(self._accepted) + 1)).sum(0)),
            (self._context_steps, np.bincount(bounds, lens > 0, len(self._context_steps))),
            (self._context_tokens, np.bincount(bounds, lens, len(self._context_tokens))),
        ):
            for counter, count in zip(counters, counts.tolist(), strict=True):
                if count:
                    counter.inc(count)


class StepLog:
    """Says every ten seconds of decoding what steps were chosen and what came of them."""

    EVERY = 10.0

    def __init__(self, options: Options) -> None:
        self._shapes = options.shapes
        self._since = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self._steps = [0] * len(self._shapes)
        self._tokens = self._expected = 0.0
        self._requests, self._prompts, self._seconds = 0, 0, 0.0

    def step_done(self, choice: Choice, clock: Clock, lens: np.ndarray, prompts: int) -> None:
        """Take in a step whose results reached the host; lens and prompts as in `StepMetrics`."""
        self._steps[choice.shape] += 1
        self._tokens += int(lens.sum())
        self._expected += choice.tokens
        self._requests += int(np.count_nonzero(lens))
        self._prompts += prompts
        self._seconds += clock.seconds()
        if time.monotonic() - self._since >= self.EVERY:
            logger.info("DFLASH: %s.", self._told())
            self._since = time.monotonic()
            self._begin()

    def _told(self) -> str:
        steps = sum(self._steps)
        shares = [
            f"{count / steps:.0%} of {shape.nodes} nodes" if shape.nodes else f"{count / steps:.0%} plain"
            for shape, count in zip(self._shapes, self._steps, strict=True)
            if count
        ]
        requests = max(self._requests, 1)
        return (
            f"{steps} steps of {requests / steps:.1f} requests, {1e3 * self._seconds / steps:.1f} ms each; "
            f"{self._tokens / requests:.2f} tokens a request ({self._expected / requests:.2f} expected); "
            f"{', '.join(shares)}{f'; {self._prompts} prompts read beside' if self._prompts else ''}"
        )


def step_metrics(options: Options, server_args: Any, enabled: bool) -> StepMetrics | None:
    """Metrics of a worker, with the labels of SGLang's own; none where the server has none."""
    return StepMetrics(options, sglangs_labels(server_args)) if enabled else None


def sglangs_labels(server_args: Any) -> dict[str, str]:
    """The labels of the scheduler's metrics, asked of the function of SGLang that makes both."""
    from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector
    from sglang.srt.runtime_context import get_observability, get_schedule

    class Labels(SchedulerMetricsCollector):
        def __init__(self, labels: dict[str, str], **_: Any) -> None:
            self.labels = labels

    with get_observability().override(stat_loggers=None):  # else it makes the user's collector
        context = Labels.init_new(
            server_args=server_args,
            enable_priority_scheduling=get_schedule().enable_priority_scheduling,
            enable_lora=False,
            enable_hierarchical_cache=False,
        )
    return context.collector.labels


def by_path(report: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's reports of an accept rate: accepted drafts over the positions of a path, drafted in each step.

    SGLang divides by the window less the bonus token, and a tree's window holds more than a path can.
    """
    from sglang.srt.runtime_context import get_spec

    spec = get_spec()
    path = spec.speculative_dflash_block_size or spec.speculative_num_draft_tokens  # with the bonus token
    with spec.override(speculative_num_draft_tokens=path):
        return report(*args, **kwargs)


def by_path_when_told(report: Callable[..., Any], reporter: Any, *args: Any, **kwargs: Any) -> Any:
    """The same around the scheduler's report, which it asks for at every step and makes every so many."""
    due = reporter.forward_ct_decode % reporter.decode_log_interval == 0
    return by_path(report, reporter, *args, **kwargs) if due else report(reporter, *args, **kwargs)
