"""What a step measures of itself, in SGLang's /metrics.

SGLang counts accept lengths itself; here are the tree's size, how deep drafts are accepted, and where the time goes.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

from sglang_dflash.options import Options

CONTEXTS = (512, 2048, 8192, 32768)  # tokens: accept lengths are told apart up to each of them, and beyond


class Clock:
    """When the parts of one step ended: start, drafted, verified, done; on a GPU, when it got there itself."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._marks: list[Any] = []
        self.drafted()  # the start

    def drafted(self) -> None:
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    verified = done = drafted

    def seconds(self) -> list[float]:
        """Of each part; a step on a GPU must have ended."""
        if self._on_gpu:
            return [start.elapsed_time(end) / 1000 for start, end in pairwise(self._marks)]
        return [end - start for start, end in pairwise(self._marks)]


class StepMetrics:
    """Counts steps into prometheus_client's registry, which SGLang serves."""

    def __init__(self, options: Options, labels: dict[str, str], on_gpu: bool) -> None:
        from prometheus_client import Counter, Gauge  # after SGLang has set its multi-process directory

        names = list(labels)
        nodes = Gauge(
            "sglang:dflash_tree_nodes",
            "Drafted nodes of a tree.",
            names,
            multiprocess_mode="mostrecent",
        )
        nodes.labels(**labels).set(options.nodes)
        accepted = Counter(
            "sglang:dflash_accepted_drafts", "Draft tokens accepted, by depth.", [*names, "depth"]
        )
        self._steps = Counter("sglang:dflash_steps", "Speculative steps, counted per request.", names).labels(
            **labels
        )
        self._accepted = [
            accepted.labels(**labels, depth=str(depth)) for depth in range(1, options.depth + 1)
        ]
        seconds = Counter("sglang:dflash_step_seconds", "Seconds of steps, by part.", [*names, "part"])
        self._seconds = [seconds.labels(**labels, part=part) for part in ("draft", "verify", "other")]
        by_context = [*names, "context"]
        steps = Counter("sglang:dflash_context_steps", "Steps of requests, by tokens of context up to.", by_context)
        tokens = Counter("sglang:dflash_context_tokens", "Tokens that these steps emitted.", by_context)
        bounds = [*map(str, CONTEXTS), "+Inf"]
        self._by_context = [
            tuple(counter.labels(**labels, context=bound) for counter in (steps, tokens)) for bound in bounds
        ]
        self._running: deque[Clock] = deque()
        self._on_gpu = on_gpu

    def clock(self) -> Clock:
        """Start timing a step. Steps end in the order in which they started."""
        clock = Clock(self._on_gpu)
        self._running.append(clock)
        return clock

    def step_done(self, accepted_drafts: list[int]) -> None:
        """Count a step whose results reached the host; accepted_drafts: one number a request."""
        for counter, seconds in zip(self._seconds, self._running.popleft().seconds(), strict=True):
            counter.inc(seconds)
        self._steps.inc(len(accepted_drafts))
        for depth, counter in enumerate(self._accepted, start=1):
            counter.inc(sum(drafts >= depth for drafts in accepted_drafts))


    def emitted_behind(self, contexts: Iterable[int], emitted: Iterable[int]) -> None:
        """Count a step by each request's tokens of context; emitted: its tokens, 0 where it had ended before."""
        for context, count in zip(contexts, emitted, strict=True):
            if count:
                steps, tokens = self._by_context[bisect_left(CONTEXTS, context)]
                steps.inc()
                tokens.inc(count)


class NoClock:
    """Measures nothing."""

    def drafted(self) -> None:
        pass

    verified = done = drafted


class NoMetrics:
    """Stands in where the server serves no metrics."""

    def clock(self) -> NoClock:
        return NoClock()

    def step_done(self, accepted_drafts: list[int]) -> None:
        pass

    def emitted_behind(self, contexts: Iterable[int], emitted: Iterable[int]) -> None:
        pass


def step_metrics(options: Options, server_args: Any, on_gpu: bool, enabled: bool) -> StepMetrics | NoMetrics:
    """Metrics of a worker, with the labels of SGLang's own."""
    return StepMetrics(options, sglangs_labels(server_args), on_gpu) if enabled else NoMetrics()


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
