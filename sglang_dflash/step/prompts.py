"""Prompts that verify passes read beside their trees.

A prompt's own pass reads all of the target's weights for a few tokens, and decoding waits for it. A verify pass reads
them anyway. So where others are running, a short prompt joins them at once: its last token is the root of its first
step, as a bonus token is, and the tokens before it are windows of that step's pass, each a chain behind the one before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import NextBatchPlan
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.step.carry import Carry
from sglang_dflash.step.plan import Planner, windows
from sglang_dflash.step.upload import upload_numbers
from sglang_dflash.step.window import Window


@dataclass(frozen=True)
class Prompt:
    """Tokens of a request that no cache has the keys of, from position `begin` up to its last, which is not among them.

    tokens [T] int64.
    """

    begin: int
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class Prompts:
    """Those that have joined the running requests, until a step reads them.

    possible: whether any may, on this server.
    """

    def __init__(self, planner: Planner, possible: bool) -> None:
        self._planner, self._possible = planner, possible
        self._unread: dict[Any, Prompt] = {}

    def join(self, new: Any, running: Any, future_map: Any, forward_stream: Any) -> bool:
        """Let the requests of one batch, prepared to be prefilled, join those of another; or leave both as they are.

        future_map, forward_stream: through which SGLang hands a step's results to the next under overlap; None without.
        """
        self._unread = {req: prompt for req, prompt in self._unread.items() if req in running.reqs}
        found = _prompts_of(new) if self._possible and not running.is_empty() else []
        lengths = [*map(len, [*self._unread.values(), *found])]
        if not found or not self._planner.has_room(len(running.reqs) + len(found), lengths):
            return False
        self._unread.update(zip(new.reqs, found, strict=True))
        for req in new.reqs:
            req.kv.kv_committed_len -= 1
        new.seq_lens, new.seq_lens_cpu = new.seq_lens - 1, new.seq_lens_cpu - 1
        new.spec_info = _carry_of(new, future_map, forward_stream)
        running.merge_batch(new)
        return True

    def leave(self, reqs: Sequence[Any]) -> None:
        """These are prefilled: what was retracted before a step came is read there."""
        for req in reqs:
            self._unread.pop(req, None)

    def take(self, reqs: Sequence[Any]) -> dict[Any, Prompt]:
        """Those of a step's requests that it is to read."""
        return {req: self._unread.pop(req) for req in reqs if req in self._unread} if self._unread else {}


def join_running(original: Callable[[Any, Any], Any], scheduler: Any, running_batch: Any) -> Any:
    """Around SGLang's choice of what is prefilled before the next step: what joins the running requests is not."""
    plan = original(scheduler, running_batch)
    new, running = plan.batch_to_run, plan.running_batch
    if new is None:
        return plan
    relay = (scheduler.future_map, scheduler.forward_stream_ctx) if scheduler.enable_overlap else (None, None)
    if not scheduler.model_worker.prompts.join(new, running, *relay):
        return plan
    scheduler.processed_tokens_counter += new.extend_num_tokens
    scheduler.metrics_reporter.report_prefill_stats(new, new.prefill_stats, new.seq_lens.is_cuda)
    return NextBatchPlan(batch_to_run=None, running_batch=running)


@dataclass(frozen=True)
class PromptWindows:
    """Windows of w tokens that read prompts. tokens, positions, slots [E, w] int64: slot 0, SGLang's sink, behind a
    prompt's end; requests, prefix_lens [E] int64: SGLang's numbers, and tokens before each window; host_lens [E] int64
    on the host: tokens behind it.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    requests: Tensor
    prefix_lens: Tensor
    host_lens: Tensor

    @classmethod
    def of(cls, prompts: dict[Any, Prompt], w: int, least: int, slot_table: Tensor) -> PromptWindows | None:
        """At least so many; None where nothing is to be read. slot_table: SGLang's, slots by position."""
        rows = [_rows(req.kv.req_pool_idx, prompt, w) for req, prompt in prompts.items()]
        if not sum(map(len, rows)):
            return None
        host = np.concatenate(rows)
        host = np.pad(host, ((0, max(least - len(host), 0)), (0, 0)))
        requests, prefix_lens, ends, tokens = upload_numbers(slot_table.device, *host[:, :3].T, host[:, 3:].ravel())
        # As windows of requests that hold no more slots; of the draft blocks there the positions alone are asked for.
        slots, _, _, positions = kernels.open_window(
            slot_table, requests, prefix_lens, ends, most=ends, bonus_tokens=requests, mask_token=0, w=w, block=w
        )
        return cls(tokens.view(-1, w), positions, slots, requests, prefix_lens, torch.from_numpy(host[:, 1] + w))

    def behind(self, batch: Any, window: Window, runner: Any) -> tuple[Any, Any]:
        """A batch's requests with these behind them, as a batch; and SGLang's record of what all of them write."""
        w = self.tokens.shape[1]
        joined = copy.copy(batch)
        joined.req_pool_indices = torch.cat([batch.req_pool_indices, self.requests])
        joined.seq_lens = torch.cat([window.prefix_lens, self.prefix_lens])
        joined.seq_lens_cpu = torch.cat([window.host_lens, self.host_lens])
        plan = runner.kv_index_translator.plan(
            req_pool_indices=joined.req_pool_indices,
            seq_lens=joined.seq_lens,
            seq_lens_cpu=joined.seq_lens_cpu - w,
            write_virtual=torch.cat([window.slots[:, :w], self.slots]).flatten(),
            read_extent=w,
        )
        return joined, plan

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and mask [E, w, w] bool: each token sees those before it."""
        e, w = self.tokens.shape
        mask = torch.ones(w, w, dtype=torch.bool, device=self.tokens.device).tril().expand(e, -1, -1)
        return self.tokens, self.positions, mask


def _rows(number: int, prompt: Prompt, w: int) -> np.ndarray:
    """Of each window of a request: its number, the tokens before it, the prompt's end, and its tokens, [E, 3 + w]."""
    count = windows([len(prompt)], w)
    tokens = np.zeros(count * w, dtype=np.int64)
    tokens[: len(prompt)] = prompt.tokens
    begins = prompt.begin + w * np.arange(count)
    numbers, ends = np.full(count, number), np.full(count, prompt.begin + len(prompt))
    return np.column_stack([numbers, begins, ends, tokens.reshape(count, w)])


def _prompts_of(new: Any) -> list[Prompt]:
    """The prompts of a batch that was prepared to be prefilled; none where one is not all there, or not plain text that
    is answered token by token.
    """
    apart = new.chunked_req, new.decoding_reqs, new.input_embeds, new.replace_embeds
    whole = all(x is None for x in apart) and all(map(_is_plain, new.reqs))
    loads = new.hicache_consumer_index >= 0  # keys of the prefix, layer by layer, as a prompt's own pass waits for them
    if not whole or loads or new.return_logprob or new.has_grammar:
        return []
    texts = np.split(new.prefill_input_ids_cpu.numpy(), np.cumsum(new.extend_lens)[:-1])
    return [Prompt(begin, text[:-1]) for begin, text in zip(new.prefix_lens, texts, strict=True)]


def _is_plain(req: Any) -> bool:
    others = req.multimodal_inputs, req.session, req.beam_group, req.token_indices_to_pool, req.discard_output_reason
    # While the result of a prompt's chunk is to come, SGLang takes it for a step's, which ends requests of one token.
    whole = req.inflight_middle_chunks == 0
    return whole and req.sampling_params.max_new_tokens > 0 and all(x is None for x in others)


def _carry_of(new: Any, future_map: Any, forward_stream: Any) -> Carry:
    """What new requests carry to their first step, as if one had been: the prompt's last token as bonus token."""
    last = new.prefill_input_ids_cpu.numpy()[np.cumsum(new.extend_lens) - 1]
    parts = new.req_pool_indices_cpu, new.seq_lens_cpu, last
    if future_map is None:
        _, lens, tokens = upload_numbers(new.seq_lens.device, *parts)
        return Carry.of(tokens, lens)
    with forward_stream:  # behind the step before, which may still tell of a finished request that had this number
        requests, lens, tokens = upload_numbers(new.seq_lens.device, *parts)
        future_map.publish(requests, lens)
        future_map.stash_bonus_tokens(requests, tokens)
        carry = Carry.of(tokens, lens)
    carry.future_indices = new.req_pool_indices
    return carry
