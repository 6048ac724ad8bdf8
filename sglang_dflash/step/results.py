"""What a step's results come to on the host: a run of tokens ends where plain decoding would have ended it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult, _async_d2h
from sglang.srt.mem_cache.common import checkpoint_kv_cache
from torch import Tensor


@dataclass
class StepResult(GenerationBatchResult):
    """A step's results; `live`: requests that it counts for, None before the host has settled it.

    nodes [bs, D + 1] int64: walked nodes, the root first. learn: told them and how many of each request's count, [bs],
    both on the host, and the requests, before they get their tokens. read: requests whose prompts the step has read.
    """

    live: int | None = None
    nodes: Tensor | None = None
    read: Collection[Any] = ()
    learn: Callable[[Tensor | None, Tensor, Sequence[Any]], None] = lambda nodes, lens, reqs: None

    def copy_to_cpu(self, *args: Any, **kwargs: Any) -> None:
        """With what the step learns from, before SGLang marks the end of its copies."""
        if self.nodes is not None:
            self.nodes = _async_d2h(self.nodes)
        super().copy_to_cpu(*args, **kwargs)

    def get_num_generated_tokens(self, batch_size: int) -> int:
        """Tokens emitted: of a request that had ended before, a pass that overlap ran all the same emits none."""
        return self.num_correct_drafts + (batch_size if self.live is None else self.live)


def settle_runs(
    original: Callable[[Any, Any, Any], list[list[int]]], processor: Any, result: Any, batch: Any
) -> list[list[int]]:
    """Around SGLang's reading of the runs: cut each where its request ends, so that nothing behind is kept or counted.

    A request that has ended, or was retracted, has a run of nothing. Of a run under a grammar, SGLang keeps what the
    grammar took before it ended.
    """
    stride = result.speculative_output_stride
    tokens = result.next_token_ids.view(len(batch.reqs), stride).tolist()
    processor.advance_grammar_fsm(result, batch)
    taken = result.grammar_retained_tokens or [None] * len(tokens)
    lens = [
        # Of a grammar that broke at once nothing is kept, but a step was made.
        0 if req.finished() or req.is_retracted else max(1, emitted(req, run[:length] if kept is None else kept))
        for req, run, length, kept in zip(batch.reqs, tokens, result.accept_lens.tolist(), taken, strict=True)
    ]
    if result.grammar_retained_tokens is not None:
        result.grammar_retained_tokens = [kept and kept[:length] for kept, length in zip(taken, lens, strict=True)]
    result.accept_lens = torch.tensor(lens, dtype=torch.int32)
    result.learn(result.nodes, result.accept_lens, batch.reqs)
    result.live = sum(length > 0 for length in lens)
    runs = original(processor, result, batch)
    if result.read:
        keep(result.read, dict(zip(batch.reqs, lens, strict=True)), processor.tree_cache)
    result.num_correct_drafts = sum(lens) - result.live
    return runs


def keep(read: Iterable[Any], lens: Mapping[Any, int], tree_cache: Any) -> None:
    """Prompts of these requests have been read, and each has emitted so many tokens: as SGLang does behind a prompt's
    own pass, its times and the prefix cache are told, and its first token alone is no step's.
    """
    for req in read:
        if req.finished() or req.is_retracted:
            continue
        if lens[req] == 1:
            req.spec_verify_ct -= 1
            req.spec_correct_drafts_histogram[0] -= 1
        req.time_stats.set_prefill_finished_time()
        checkpoint_kv_cache(req, tree_cache)


def count_live(
    original: Callable[..., None], reporter: Any, bs: int, num_correct_drafts: int, num_accept_tokens: int, **more: int
) -> None:
    """Around SGLang's counting of a step: each request that it counts for emitted one token that was not drafted."""
    original(reporter, num_accept_tokens - num_correct_drafts, num_correct_drafts, num_accept_tokens, **more)


def emitted(req: Any, run: list[int]) -> int:
    """How many tokens of a run plain decoding would have emitted: it asks after each whether the request ends there.

    A grammar's end ends the run already.
    """
    params = req.sampling_params
    if len(run) <= 1:
        return len(run)
    if not (params.stop_strs or params.stop_regex_strs) and stop_ids(req).isdisjoint(run):
        return len(run)
    probe = copy.copy(req)
    probe.grammar = None  # it has taken the whole run
    probe.output_ids = req.output_ids[:]
    for count, token in enumerate(run, start=1):
        probe.output_ids.append(token)
        probe.update_finish_state()
        if probe.finished():
            return count
    return len(run)


def stop_ids(req: Any) -> set[int]:
    """Tokens at which the request may end."""
    return {*(req.sampling_params.stop_token_ids or ()), *(req.eos_token_ids or ()), *_ends_of(req.tokenizer)}


@functools.cache  # a tokenizer looks its own up anew each time, as long as all else here takes
def _ends_of(tokenizer: Any) -> frozenset[int]:
    if tokenizer is None:
        return frozenset()
    return frozenset([tokenizer.eos_token_id, *(getattr(tokenizer, "additional_stop_token_ids", None) or ())])
