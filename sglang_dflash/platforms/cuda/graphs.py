"""CUDA graphs of window passes in several widths: one of SGLang's graph runners each, behind the face of one.

SGLang knows one width of passes, and runs another one eagerly without a word. Here a pass goes to the runner of its
width; one that no runner has is an error, as the shapes that the budget may choose are those that are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from sglang.srt.model_executor.cuda_graph_config import Phase, with_phase
from sglang.srt.model_executor.runner.base_cuda_graph_runner import freeze_gc
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_exec

from sglang_dflash.platforms import WITH_PROMPTS, windows_beside
from sglang_dflash.platforms.cuda import parts_of
from sglang_dflash.platforms.cuda.attention import WindowAttention

# Batch sizes that graphs are captured for: a batch is padded to the next one. Of passes of so few tokens that a GPU
# waits for the weights alone, only powers of two.
SIZES = (1, 2, 3, 4, 6, 8, 10, 12, *range(16, 32, 4), *range(32, 64, 8), *range(64, 128, 16), *range(128, 513, 32))
FEW_TOKENS = 64
TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # of them, and every pass of more than so many tokens
MANY_TOKENS = 256
SLOWER = 1.1  # than a pass of more tokens: less than that may be chance, others being at work on the GPU
_frozen = ContextVar("frozen", default=False)  # whether a runner captures within another's freezing


def set_widths(runner: Any, widths: dict[int, int]) -> None:
    """Let a model runner capture graphs of these widths: tokens a request, and how many requests each may have. None at
    all: of a draft that drafts nothing.
    """
    runner.window_widths = widths
    runner.shared_hidden = None  # of all its graphs
    runner.decode_num_tokens_per_req = lambda *, num_draft_tokens=None: (
        num_draft_tokens if num_draft_tokens in widths else max(widths, default=1)
    )
    runner._decode_cuda_graph_runner_cls = lambda: WindowGraphs
    runner.max_shared_logits_buffer_rows = lambda: max(
        (width * max(sizes) for width, sizes in _sizes_by_width(runner).items()), default=0
    )


def _sizes_by_width(runner: Any) -> dict[int, list[int]]:
    """Batch sizes to capture: SGLang's largest, or the user's, bounds how many requests all of them have, and beside
    these there may be windows of prompts; the largest passes come first.
    """
    joins = parts_of(runner.attn_backend)[0].windows_join
    largest = min(max(get_exec().graph.cuda_graph_config.decode.bs), runner.req_to_token_pool.size)
    bounds = {width: min(most, largest) for width, most in runner.window_widths.items()}
    if joins:
        bounds = {w: most + (windows_beside(w) if most >= WITH_PROMPTS else 0) for w, most in bounds.items()}
    by_width = {}
    for width, bound in sorted(bounds.items(), key=lambda item: (item[0] * item[1], item[0]), reverse=True):
        sizes = {size for size in SIZES if size * width > FEW_TOKENS or size.bit_count() == 1}
        by_width[width] = sorted({*(size for size in sizes if size < bound), bound})
    return by_width


def keep_sizes(original: Callable[..., tuple[list[int], list[int]]], runner: Any, *args: Any, **how: Any) -> Any:
    """Around SGLang's choice of what is captured: it leaves out batches of more requests than a server may have, where
    a pass that reads prompts has as many windows.
    """
    captured, compiled = original(runner, *args, **how)
    beyond = [size for size in get_exec().graph.cuda_graph_config.decode.bs if size > runner.req_to_token_pool.size]
    return [*captured, *beyond], compiled


@contextmanager
def freeze_once(
    original: Callable[[bool], AbstractContextManager[None]], enable_cudagraph_gc: bool
) -> Iterator[None]:
    """Around SGLang's freezing of what is there while a runner captures, which collects garbage before and behind it,
    half a second each time: nothing is left to do within another's.
    """
    if _frozen.get():
        yield
        return
    within = _frozen.set(True)
    try:
        with original(enable_cudagraph_gc):
            yield
    finally:
        _frozen.reset(within)


def leave_to_torch(original: Callable[..., bool], destinations: Any, sources: Any) -> bool:
    """Around SGLang's copying of what a pass reads by a Triton kernel, whose callers ask torch where it says no. It is
    compiled anew by how tensors happen to lie in memory: 0.15 to 0.3 s in which all requests wait.
    """
    return False


def capture_passes(capture: Callable[[Any], None], runner: Any) -> None:
    """Around SGLang's capture of a runner's CUDA graphs: where a window pass has two ways, graphs of both. A runner's
    first pass is run twice before it is captured, as SGLang's are, every other one once: most of a start goes there.
    """
    backend = parts_of(runner.attn_backend)[0]
    if isinstance(backend, WindowAttention):
        runner.attention_graph_variants = backend.ways(runner.captured_req_width)
        capture_one = _warmed_once(runner.backend.capture_one)
        runner.backend.capture_one = _in_shared_rows(capture_one, runner.model_runner)
    capture(runner)


def _warmed_once(capture_one: Callable[..., None]) -> Callable[..., None]:
    """SGLang's `capture_one` runs what it is given three times, the third under capture."""
    captured = count()

    def capture(key: Any, forward: Callable[[], Any], **how: Any) -> None:
        runs, first = count(), next(captured) == 0
        capture_one(key, lambda: forward() if first or next(runs) != 1 else None, **how)

    return capture


def _in_shared_rows(capture_one: Callable[..., None], model_runner: Any) -> Callable[..., None]:
    """SGLang's `capture_one` keeps what a graph gives. Each graph would keep hidden states of its own, in all some
    thirty times what the largest has: all of a model leave them in the same rows, which are read before the next pass.
    """

    def shared(output: Any) -> Any:
        hidden = output.hidden_states
        if hidden is None:
            return output
        if model_runner.shared_hidden is None:  # made in the first run, which is no capture
            rows = model_runner.max_shared_logits_buffer_rows()
            model_runner.shared_hidden = hidden.new_empty(rows, hidden.shape[1])
        output.hidden_states = model_runner.shared_hidden[: len(hidden)].copy_(hidden)
        return output

    return lambda key, forward, **how: capture_one(key, lambda: shared(forward()), **how)


class WindowGraphs:
    """The graphs of a model runner, by width; what SGLang asks of a decode graph runner goes to the right one."""

    decode_graph_gather_requirements = DecodeCudaGraphRunner.decode_graph_gather_requirements

    def __init__(self, model_runner: Any) -> None:
        graph = get_exec().graph
        sizes = _sizes_by_width(model_runner)
        for backend in parts_of(model_runner.attn_backend):
            backend.make_room({width: max(batches) for width, batches in sizes.items()})
        self._runners: dict[int, DecodeCudaGraphRunner] = {}
        with freeze_gc(graph.enable_cudagraph_gc):  # by way of freeze_once, as each runner's own is
            for width, batches in sizes.items():
                config = with_phase(graph.cuda_graph_config, Phase.DECODE, bs=batches, max_bs=max(batches))
                with graph.override(cuda_graph_config=config):
                    self._runners[width] = DecodeCudaGraphRunner(model_runner, speculative_num_draft_tokens=width)
        self._last: DecodeCudaGraphRunner
        self.capture_bs = sorted({size for runner in self._runners.values() for size in runner.capture_bs})

    def can_run_graph(self, forward_batch: Any) -> bool:
        """Raises LookupError where no graph has this batch's width."""
        runner = self._runners.get(forward_batch.spec_info.draft_token_num)
        if runner is None:
            raise LookupError(
                f"a pass of {forward_batch.spec_info.draft_token_num} tokens a request has no CUDA graph: there are "
                f"graphs of {sorted(self._runners)}"
            )
        return runner.can_run_graph(forward_batch)

    def execute(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> Any:
        self._last = self._runners[forward_batch.spec_info.draft_token_num]
        return self._last.execute(forward_batch, pp_proxy_tensors)

    @property
    def bs(self) -> int:
        """Requests of the last pass, those that padded it included."""
        return self._last.bs

    def keep_fast(self, agreed: Callable[[int], int]) -> dict[int, dict[int, float]]:
        """Time passes, and from now on pad no batch to a size that takes longer than a larger one: libraries choose
        matrix products of 448 tokens that take a third longer than those of 512.

        Passes are replayed as they were captured, behind prefixes of a token. agreed: gives of a rank's microseconds
        those that all ranks go by. Returns seconds by width, then by requests.
        """
        return {width: _keep_fast(runner, width, agreed) for width, runner in self._runners.items()}


def _keep_fast(runner: Any, width: int, agreed: Callable[[int], int]) -> dict[int, float]:
    """Seconds by the sizes of a runner that were timed and stay."""
    many = {size for size in runner.capture_bs if size * width > MANY_TOKENS}
    some = [size for size in runner.capture_bs if size in (*TIMED, runner.max_bs) or size in many]
    seconds = {size: agreed(round(1e6 * _replayed(runner, size))) / 1e6 for size in some}
    for size in many:
        if seconds[size] > SLOWER * min(took for larger, took in seconds.items() if larger >= size):
            runner.capture_bs.remove(size)
    return {size: took for size, took in seconds.items() if size in runner.capture_bs}


def _replayed(runner: DecodeCudaGraphRunner, size: int) -> float:
    """Seconds of a pass, the least of two: others may be at work on the GPU."""
    key = min((key for key in runner.backend._graphs if key.size == size), key=str)
    begin, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    with runner.backend.replay_session():
        begin.record()
        runner.backend.replay(key, None)
        between.record()
        runner.backend.replay(key, None)
        end.record()
        torch.cuda.synchronize()
    return min(begin.elapsed_time(between), between.elapsed_time(end)) / 1000
