"""Penalties and least lengths: how often a request has emitted a token, counted from its own output at every node.

The counts are on the device, by SGLang's numbers of requests. A prefill begins them anew from `output_ids`, which are
the truth for whatever is prefilled: a new request, a chunk of one, one that was retracted. From then on each pass
counts what it has emitted as soon as it has: so a step needs nothing of the host, which under overlap learns of it
later, and batches may be merged and filtered as they like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.sampling.penaltylib import BatchedPenalizerOrchestrator
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.kernels import Emitted
from sglang_dflash.kernels.penalties import END
from sglang_dflash.step.results import stop_ids
from sglang_dflash.step.upload import upload, upload_numbers
from sglang_dflash.tree import DraftTree

FEWEST_ROWS = 4  # of counts that are made room for, a vocabulary's int32 each


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
    """Requests of which some may have penalties, and where they stand.

    requests [bs] int64: SGLang's numbers; positions [bs, n] int64: of the tokens that rows of logits stand at.
    """

    emitted: Emitted
    requests: Tensor
    positions: Tensor

    is_required = True  # as SGLang's sampler asks what it is to apply

    def apply(self, logits: Tensor) -> None:
        """As SGLang's sampler asks for it, behind a prefill: logits [bs, V]."""
        self.at_depths(logits[:, None])

    def at_depths(self, logits: Tensor) -> None:
        """Penalise logits [bs, d, V] in place by what has been emitted; of what comes between, only how much counts."""
        kernels.penalise(logits, self.requests, self.positions, self.emitted)

    def along(self, logits: Tensor, tree: DraftTree) -> None:
        """Penalise logits [bs, w, V] in place, each node's by its path too, itself included: they follow it."""
        kernels.penalise(logits, self.requests, self.positions, self.emitted, tree.tokens, tree.mask)


class Penalties:
    """What one server's requests have emitted, as far as penalties ask.

    requests: how many numbers SGLang has for them; vocab: the target's.
    """

    def __init__(self, requests: int, vocab: int, device: torch.device | str) -> None:
        self._emitted = Emitted.none(requests, vocab, device)
        self._rows: dict[int, tuple[int, Any]] = {}  # by number: the row of counts, and the request that it is of
        self._free: list[int] = []

    def at(self, requests: Tensor, positions: Tensor) -> Penalised:
        """Of requests [bs] int64, at positions [bs * n] int64."""
        return Penalised(self._emitted, requests, positions.view(len(requests), -1))

    def prefill(self, batch: Any) -> Penalised | None:
        """Begin anew for all that a batch prefills, and give what its samples are penalised by, None where nothing is.

        Rows that decode beside them in a mixed batch go on.
        """
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        self.begin([req for req in batch.reqs if id(req) not in decoding])
        return self.at(batch.req_pool_indices, batch.seq_lens - 1) if any(map(penalised, batch.reqs)) else None

    def emitted(self, requests: Tensor, tokens: Tensor, lens: Tensor) -> None:
        """A pass with penalised requests has emitted the first lens [bs] int32 of tokens [bs, n] int64."""
        kernels.count_emitted(self._emitted, requests, tokens, lens)

    def begin(self, reqs: list[Any]) -> None:
        """Count anew what these requests have emitted."""
        places = dict.fromkeys(self._let_go({req.kv.req_pool_idx for req in reqs}), -1)
        asked = [req for req in reqs if penalised(req)]
        self._make_room(len(asked))
        for req in asked:
            row = places[req.kv.req_pool_idx] = self._free.pop()
            self._rows[req.kv.req_pool_idx] = row, req
        if places:
            numbers, rows = upload_numbers(self._emitted.places.device, [*places], [*places.values()])
            self._emitted.places[numbers] = rows
        if asked:
            self._write(asked)

    def _let_go(self, numbers: set[int]) -> list[int]:
        """Numbers whose rows are free from now on: they are given anew, or their requests have given them back.

        A finished request may be in one more pass, which was launched before the host knew, and so before what comes.
        """
        gone = [n for n, (_, req) in self._rows.items() if n in numbers or req.kv.req_pool_idx != n]
        self._free.extend(self._rows.pop(number)[0] for number in gone)
        return gone

    def _make_room(self, rows: int) -> None:
        """For so many more rows: twice as many as there are, if that is needed, and never more than requests."""
        if (missing := rows - len(self._free)) <= 0:
            return
        held = len(self._emitted.counts)
        room = min(held + max(missing, held, FEWEST_ROWS), len(self._emitted.places))
        self._emitted.grow(room)
        self._free.extend(range(held, room))

    def _write(self, reqs: list[Any]) -> None:
        """What these requests, which have new rows, have emitted and ask for."""
        to = self._emitted
        device, vocab = to.places.device, to.counts.shape[1]
        numbers = [req.kv.req_pool_idx for req in reqs]
        begins = [vocab * self._rows[number][0] for number in numbers]
        texts = [np.array(req.output_ids, dtype=np.int64) for req in reqs]
        ends = [np.array(_ends(req, vocab), dtype=np.int64) for req in reqs]
        owners, fewest, said, held_back = upload_numbers(
            device,
            numbers,
            [len(req.origin_input_ids) + req.sampling_params.min_new_tokens for req in reqs],
            np.concatenate([begin + text for begin, text in zip(begins, texts, strict=True)]),
            np.concatenate([begin + text for begin, text in zip(begins, ends, strict=True)]),
        )
        params = [req.sampling_params for req in reqs]
        settings = [[p.frequency_penalty, p.presence_penalty, p.repetition_penalty] for p in params]
        to.settings[owners] = upload(device, torch.tensor(settings))
        to.fewest[owners] = fewest
        to.counts.index_fill_(0, to.places[owners], 0)
        flat = to.counts.view(-1)
        flat.index_fill_(0, held_back, END)
        flat.index_add_(0, said, torch.ones_like(said, dtype=torch.int32))


def _ends(req: Any, vocab: int) -> list[int]:
    """Tokens at which a request would end before its time."""
    if req.sampling_params.min_new_tokens <= len(req.output_ids):
        return []
    return [token for token in stop_ids(req) if token is not None and 0 <= token < vocab]
