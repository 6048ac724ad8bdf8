"""Penalties by what requests have emitted: counts that stay on the device, and logits penalised by them in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

END = 1 << 30  # in a token's count: it ends the request, and is held back until the least length


@dataclass
class Emitted:
    """What requests with penalties have emitted, and their penalties, by SGLang's numbers of requests, R of them.

    counts [rows, V] int32: how often each token was emitted, END more for one that ends the request. places [R] int64:
    a request's row of counts, -1 where it has no penalties; no two have the same. settings [R, 3] float32: frequency,
    presence and repetition penalty; fewest [R] int64: tokens, its prompt's too, behind which it may end.

    Only counts may be replaced, by a larger tensor. address [1] int64, on the device: where it begins, so that a
    captured graph finds it.
    """

    counts: Tensor
    address: Tensor
    places: Tensor
    settings: Tensor
    fewest: Tensor

    @classmethod
    def none(cls, requests: int, vocab: int, device: torch.device | str) -> Emitted:
        """No request has penalties yet."""
        return cls(
            counts=torch.zeros(0, vocab, dtype=torch.int32, device=device),
            address=torch.zeros(1, dtype=torch.int64, device=device),
            places=torch.full((requests,), -1, dtype=torch.int64, device=device),
            settings=torch.zeros(requests, 3, device=device),
            fewest=torch.zeros(requests, dtype=torch.int64, device=device),
        )

    def grow(self, rows: int) -> None:
        """Make room for so many rows; no row changes its number."""
        # What the old counts took is given to none but this stream's later work, so what runs still reads them.
        more = self.counts.new_zeros(rows - len(self.counts), self.counts.shape[1])
        self.counts = torch.cat([self.counts, more])
        self.address.fill_(self.counts.data_ptr())


def penalise(
    logits: Tensor,
    requests: Tensor,
    positions: Tensor,
    emitted: Emitted,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Penalise logits [bs, w, >= V] in place by what their requests have emitted, as SGLang does: in float32, rounded
    once. Those of requests without penalties stay as they are.

    requests [bs] int64: SGLang's numbers; positions [bs, >= w] int64: of the token that each row stands at. tokens
    [bs, w] int64 and mask [bs, w, w] bool, or neither: a tree's, each node of which counts its path too, itself
    included, but for the root, which was emitted. A row's logits are neighbours in memory.

    This one reads values on the host, and serves a CPU alone.
    """
    for b, (request, row) in enumerate(zip(requests.tolist(), emitted.places[requests].tolist(), strict=True)):
        if row < 0:
            continue
        x, entries = logits[b], emitted.counts[row]
        early = positions[b, : len(x), None] + 1 < emitted.fewest[request]
        groups = [(entries.nonzero()[:, 0], torch.zeros(1))]  # tokens, and how often each is on a row's path
        if tokens is not None and mask is not None:
            below = mask[b].float()
            below[:, 0] = 0.0
            groups.append((tokens[b], below @ (tokens[b, :, None] == tokens[b]).float()))
        found = [
            (which, _penalise(x.index_select(1, which), entries[which], path, emitted.settings[request], early))
            for which, path in groups
        ]
        for which, scores in found:  # a tree's tokens last, some of which were emitted too
            x[:, which] = scores


def _penalise(raw: Tensor, entries: Tensor, path: Tensor, settings: Tensor, early: Tensor) -> Tensor:
    """SGLang's penalties of logits [w, n]; entries [n]: the tokens' counts; path: how often more each was emitted."""
    frequency, presence, repetition = settings
    counts = entries % END + path.to(entries)
    some = counts > 0
    x = raw.float() - (frequency * counts + presence * some)
    scale = torch.where(some, repetition, 1.0)
    scores = torch.where(x < 0, x * scale, x / scale).to(raw.dtype)
    return scores.masked_fill_(early & (entries >= END), float("-inf"))


def count_emitted(emitted: Emitted, requests: Tensor, tokens: Tensor, lens: Tensor) -> None:
    """A pass has emitted the first lens [bs] int32 of tokens [bs, n] int64 for requests [bs] int64: they count from now
    on, where their requests have penalties.
    """
    rows = emitted.places[requests, None]
    counted = (torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]) & (rows >= 0)
    places = torch.where(counted, rows * emitted.counts.shape[1] + tokens, 0).flatten()
    if len(emitted.counts):
        emitted.counts.view(-1).index_add_(0, places, counted.flatten().to(torch.int32))
