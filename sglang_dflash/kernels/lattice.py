"""From a draft's logits to a lattice's conditional log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sglang_dflash.kernels.sampling import gumbel_of

LIKELIEST = 256  # tokens of a row that are given noise on a CPU


class Noise(NamedTuple):
    """The noise that requests' next samples will be drawn with, and what it counts beside a logit.

    seeds, positions [bs] int64: of a request, and where its first drafted token's sample will stand; weights [bs]
    float32: 0 where a request takes its likeliest tokens.
    """

    seeds: Tensor
    positions: Tensor
    weights: Tensor


def topk_lse(logits: Tensor, k: int, noise: Noise | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The k highest scores of each row, and the log-sum-exp of all its scores.

    logits [N, V], any float dtype. A score is the logit, to which noise of bs requests adds weight * Gumbel(seed,
    position, token): each has N / bs rows, neighbours, at positions that follow one another. Returns values [N, k]
    float32 (descending), indices [N, k] int64, lse [N] float32.

    With noise this one reads values on the host, and serves a CPU alone: there a whole row's noise costs as much as the
    row's logits, so only its LIKELIEST tokens have scores.
    """
    if noise is None:
        values, indices = logits.topk(k, dim=-1)
        return values.float(), indices, logits.float().logsumexp(-1)
    each = len(logits) // len(noise.seeds)
    rows = (noise.weights != 0).repeat_interleave(each).nonzero()[:, 0]
    of_row = Noise(*(x[rows // each] for x in noise))
    of_row.positions.add_(rows % each)
    if len(rows) == len(logits):
        return _noisy_topk_lse(logits, k, of_row)
    every = topk_lse(logits, k)
    for values, some in zip(every, _noisy_topk_lse(logits[rows], k, of_row), strict=True):
        values[rows] = some
    return every


def _noisy_topk_lse(logits: Tensor, k: int, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """noise: of each row."""
    vocab = logits.shape[1]
    scores, tokens = logits.topk(min(LIKELIEST, vocab), dim=-1)
    scores = scores.float() + noise.weights[:, None] * gumbel_of(noise.seeds, noise.positions, tokens, vocab)
    values, best = scores.topk(k, dim=-1)
    return values, tokens.gather(1, best), scores.logsumexp(-1)


def selector_logp(
    unary: Tensor,
    lse: Tensor,
    tokens: Tensor,
    bonus_tokens: Tensor,
    gate: Tensor,
    predecessors: Tensor,
    successors: Tensor,
) -> Tensor:
    """`lattice_logp` with a selector's transitions: <predecessors[p] * gate, successors[c]> from p to c.

    unary [bs, d, K] float32, lse [bs, d] float32: as in `lattice_logp`; tokens [bs, d, K] int64; bonus_tokens [bs]
    int64: before the first position; gate [bs, d, r] and the codebooks [V, r] in one float dtype. Returns
    [bs, d, K, K] float32; at the first position every row is the same.
    """
    first = bonus_tokens[:, None, None].expand(-1, 1, tokens.shape[2])
    before = predecessors[torch.cat([first, tokens[:, :-1]], 1)].float() * gate[:, :, None].float()
    return lattice_logp(unary, lse, before @ successors[tokens].float().transpose(-1, -2))


def lattice_logp(unary: Tensor, lse: Tensor, transitions: Tensor | None) -> Tensor:
    """Log-probability of each candidate given each candidate one depth before.

    unary [bs, d, K] float32: logits of the candidates; lse [bs, d] float32: log-sum-exp of their position's
    full logits; transitions [bs, d, Kp, K] float32: score added to a candidate after a predecessor, or None.

    With transitions only the candidates' scores are known, not the full row's: the softmax over the K
    candidates is scaled by the share of probability that the unary softmax gives to these K together.
    Without, it is the unary softmax itself, and Kp = 1.

    Returns [bs, d, Kp, K] float32, every entry in [-inf, 0] (what `grow` relies on): rounding above 0 is cut
    off, and a NaN of a broken draft becomes a candidate of no probability.
    """
    if transitions is None:
        logp = (unary - lse[..., None])[:, :, None]
    else:
        share = unary.logsumexp(-1) - lse
        logp = (unary[:, :, None] + transitions).log_softmax(-1) + share[..., None, None]
    return torch.nan_to_num(logp, nan=-torch.inf, neginf=-torch.inf).clamp_(max=0.0)
