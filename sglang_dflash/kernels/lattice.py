"""From a draft's logits to a lattice's conditional log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_lse(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k highest logits of each row, and the log-sum-exp of the whole row.

    logits [N, V], any float dtype. Returns values [N, k] float32 (descending), indices [N, k] int64, lse [N]
    float32.
    """
    values, indices = logits.topk(k, dim=-1)
    return values.float(), indices, logits.float().logsumexp(-1)


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
