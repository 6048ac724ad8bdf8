"""Penalties and least lengths: how often a request has emitted a token, counted from its own output at every node.

The host's `output_ids` are the truth: a request that was retracted or prefilled again has them, and batches may be
merged and filtered as they like. A list that has only grown since the last step is counted from there on. Under overlap
they lack what the pass before has emitted, and nothing else; that is kept here on the device for one pass, with its
place in the sequence, so that what the host has learned meanwhile is not counted twice.

A penalty changes only logits of tokens that were emitted, so only those are read and written, each once: the work grows
with the distinct tokens of the output, not with the vocabulary. Requests without penalties cost nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.sampling.penaltylib import BatchedPenalizerOrchestrator
from torch import Tensor

from sglang_dflash.step.results import stop_ids
from sglang_dflash.tree import DraftTree


def penalised(req: Any) -> bool:
    """Whether the next logits of a request depend on what it has emitted or on how much."""
    params = req.sampling_params
    return bool(
        params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.repetition_penalty != 1.0
        or params.min_new_tokens > len(req.output_ids)
    )


def leave_uncounted(original: Callable[..., None], info: Any, batch: Any, vocab_size: int) -> None:
    """Around the end of SGLang's gathering of a batch's settings: its running counts are not kept.

    They take one token a step: late under overlap, none where a prefill comes between, anew after a retraction.
    """
    original(info, batch, vocab_size)
    info.penalizer_orchestrator = BatchedPenalizerOrchestrator(vocab_size, batch, set())


@dataclass(frozen=True)
class Penalised:
    """What the penalised requests of one batch, P of them, have emitted: with every sample so far, the roots included.

    numbers: rows in the batch by SGLang's numbers of requests, on the host; rows [P]: the same rows. owners, tokens
    [N]: what was emitted, each token once but for the last pass's, by whom (an index into rows). counts [P, V].
    settings [3, P] float32: frequency, presence and repetition penalty. lacking [P]: tokens until an end is allowed.
    stop_owners, stops [M]: tokens that end a request, of those that lack any.
    Tensors are on the logits' device, and int64 where nothing is said; counts int32.
    """

    numbers: dict[int, int]
    rows: Tensor
    owners: Tensor
    tokens: Tensor
    counts: Tensor
    settings: Tensor
    lacking: Tensor
    stop_owners: Tensor
    stops: Tensor

    is_required = True  # as SGLang's sampler asks what it is to apply

    def apply(self, logits: Tensor) -> None:
        """As SGLang's sampler asks for it, behind a prefill: logits [bs, V]."""
        self.at_depths(logits[:, None])

    def at_depths(self, logits: Tensor) -> None:
        """Penalise logits [bs, d, V] in place by what has been emitted; of what comes between, only how much counts."""
        self._by_output(logits)
        self._hold_back(logits, torch.arange(logits.shape[1], device=logits.device).expand(len(self.rows), -1))

    def along(self, logits: Tensor, tree: DraftTree) -> None:
        """Penalise logits [bs, w, V] in place, each node's by its path too, itself included: they follow it."""
        own, path = tree.tokens[self.rows], tree.mask[self.rows].float()
        path[:, :, 0] = 0.0  # the root is counted
        more = path @ (own[:, :, None] == own[:, None]).float()  # [P, w, w]: of a node's path, a node's token
        counts = self.counts.gather(1, own)[:, None] + more.long()
        place = self.rows[:, None, None], torch.arange(own.shape[1], device=own.device)[:, None], own[:, None]
        raw = logits[place]
        self._by_output(logits)
        logits[place] = _penalise(raw, counts, self.settings[:, :, None, None])
        self._hold_back(logits, tree.depths[self.rows])

    def _by_output(self, logits: Tensor) -> None:
        """A token emitted twice is written twice, the same."""
        place = self.rows[self.owners], slice(None), self.tokens
        counts = self.counts[self.owners, self.tokens]
        logits[place] = _penalise(logits[place], counts[:, None], self.settings[:, self.owners, None])

    def _hold_back(self, logits: Tensor, depths: Tensor) -> None:
        """No end before the least length; depths [P, w]: how many tokens come before those of logits [bs, w, V]."""
        early = (depths < self.lacking[:, None])[self.stop_owners]
        place = self.rows[self.stop_owners], slice(None), self.stops
        logits[place] = logits[place].masked_fill(early, float("-inf"))


def _penalise(raw: Tensor, counts: Tensor, settings: Tensor) -> Tensor:
    """SGLang's penalties of logits, given how often each token was emitted and settings [3, ...]."""
    frequency, presence, repetition = settings
    emitted = counts > 0
    x = raw.float() - (frequency * counts + presence * emitted)
    scale = torch.where(emitted, repetition, 1.0)
    return torch.where(x < 0, x * scale, x / scale).to(raw.dtype)


@dataclass(frozen=True)
class _Pass:
    """What a pass emitted: tokens [bs, n], lens [bs] of them, behind lengths [bs]; rows: of SGLang's numbers."""

    rows: dict[int, int]
    lengths: Tensor
    tokens: Tensor
    lens: Tensor


class _Tally:
    """How often each token stands in an output, which is held: another list may come in its place, and is not it.

    tokens, counts: distinct tokens, as they came first.
    """

    def __init__(self, output: Any) -> None:
        self._output, self._read = output, 0
        self._places: dict[int, int] = {}
        self.tokens, self.counts = array("q"), array("q")

    def of(self, output: Any) -> _Tally:
        """The tally of a request's output: this one, brought up to date, or a new one where that is not its growth."""
        tally = self if output is self._output and len(output) >= self._read else _Tally(output)
        for token in output[tally._read :]:
            place = tally._places.setdefault(token, len(tally.tokens))
            if place == len(tally.tokens):
                tally.tokens.append(token)
                tally.counts.append(0)
            tally.counts[place] += 1
        tally._read = len(output)
        return tally


class Penalties:
    """What one server's requests have emitted, as far as penalties ask."""

    def __init__(self) -> None:
        self._last: _Pass | None = None
        self._tallies: dict[int, _Tally] = {}  # by SGLang's numbers of requests, of each number's last

    def of(self, batch: Any, lengths: Tensor, running: Collection[Any]) -> Penalised | None:
        """The batch's penalised requests, None where there are none.

        lengths [bs]: tokens of each request, its last sample included. running: those of the batch whose last tokens
        the host may lack; the others are prefilled with all that they have.
        """
        which = [row for row, req in enumerate(batch.reqs) if penalised(req)]
        if not which:
            return None
        reqs = [batch.reqs[row] for row in which]
        device, vocab = lengths.device, batch.sampling_info.vocab_size
        owners, tokens, weights = self._output(reqs, {id(req) for req in running}, device)
        counts = torch.zeros(len(reqs) * vocab, dtype=torch.int32, device=device)
        counts.scatter_add_(0, owners * vocab + tokens, weights)
        params = [req.sampling_params for req in reqs]
        settings = [[p.frequency_penalty, p.presence_penalty, p.repetition_penalty] for p in params]
        ends = [_ends(req, vocab) for req in reqs]
        rows, fewest, stop_owners, stops = _numbers(
            device,
            which,
            [len(req.origin_input_ids) + req.sampling_params.min_new_tokens for req in reqs],
            np.repeat(np.arange(len(reqs)), [len(ids) for ids in ends]),
            [token for ids in ends for token in ids],
        )
        return Penalised(
            numbers={req.kv.req_pool_idx: row for req, row in zip(reqs, which, strict=True)},
            rows=rows,
            owners=owners,
            tokens=tokens,
            counts=counts.view(-1, vocab),
            settings=_on(device, torch.tensor(settings).T.contiguous()),
            lacking=fewest - lengths[rows],
            stop_owners=stop_owners,
            stops=stops,
        )

    def follow(self, found: Penalised | None, lengths: Tensor, tokens: Tensor, lens: Tensor) -> None:
        """A pass has emitted the first lens [bs] of tokens [bs, n] behind lengths [bs]: the host learns of it later.

        found: what `of` gave for its batch.
        """
        # A batch's own lengths are another stream's memory, kept for this pass alone.
        self._last = _Pass(found.numbers, lengths.clone(), tokens, lens) if found is not None else None

    def _output(self, reqs: list[Any], running: set[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Owners and tokens [N] int64, and how often each was emitted, int32.

        The last pass's tokens come behind, 0 times where they were not emitted, or are counted before.
        """
        tallies = [self._tallies.get(req.kv.req_pool_idx, _Tally(None)).of(req.output_ids) for req in reqs]
        self._tallies.update(zip((req.kv.req_pool_idx for req in reqs), tallies, strict=True))
        last = self._last.rows if self._last else {}
        late = [last.get(req.kv.req_pool_idx) if id(req) in running else None for req in reqs]
        owners, tokens, counts, late_owners, late_rows, known = _numbers(
            device,
            np.repeat(np.arange(len(reqs)), [len(tally.tokens) for tally in tallies]),
            np.concatenate([np.array(tally.tokens) for tally in tallies]),
            np.concatenate([np.array(tally.counts) for tally in tallies]),
            [owner for owner, row in enumerate(late) if row is not None],
            [row for row in late if row is not None],
            [len(r.origin_input_ids) + len(r.output_ids) for r, row in zip(reqs, late, strict=True) if row is not None],
        )
        weights = counts.to(torch.int32)
        if self._last is None or not len(late_rows):
            return owners, tokens, weights
        more = self._last.tokens[late_rows].to(torch.int64)
        at = torch.arange(more.shape[1], device=device)
        unknown = self._last.lengths[late_rows, None] + at >= known[:, None]
        unknown &= at < self._last.lens[late_rows, None]
        return (
            torch.cat([owners, late_owners[:, None].expand_as(more).flatten()]),
            torch.cat([tokens, more.flatten()]),
            torch.cat([weights, unknown.flatten().to(torch.int32)]),
        )


def _ends(req: Any, vocab: int) -> list[int]:
    """Tokens at which a request would end before its time."""
    if req.sampling_params.min_new_tokens <= len(req.output_ids):
        return []
    return [token for token in stop_ids(req) if token is not None and 0 <= token < vocab]


def _numbers(device: torch.device, *parts: Any) -> tuple[Tensor, ...]:
    """Sequences of integers on the device, in one copy."""
    arrays = [np.asarray(part, dtype=np.int64) for part in parts]
    return _on(device, torch.from_numpy(np.concatenate(arrays))).split([len(array) for array in arrays])


def _on(device: torch.device, host: Tensor) -> Tensor:
    """On the device, without waiting for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
