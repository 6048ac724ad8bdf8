"""From a draft pass's hidden states to the lattice that a tree is grown in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.draft.leads import Leads, follow_leads, place_leads
from sglang_dflash.draft.selector import Selector
from sglang_dflash.kernels import Noise
from sglang_dflash.tree import Lattice


def build_lattice(
    hidden: Tensor,
    bonus: Tensor,
    logits: Callable[[Tensor], Tensor],
    selector: Selector | None,
    k: int,
    noise: Noise | None = None,
    leads: Leads | None = None,
    *,
    multiplier: float = 1.0,
    softcap: float | None = None,
) -> Lattice:
    """The k likeliest tokens of each drafted position, and their log-probability after each of those before.

    hidden [bs, d, H]: the draft's output at the block's masks (not at the bonus token); bonus [bs] int64;
    logits: the target's head, [N, H] -> [N, V] in any float dtype, V without padding; noise: of the bs requests, what
    their samples will be drawn with (None: they take the likeliest tokens), so that those samples are drafted, and not
    what is likely before the noise is known; leads: what else is known of the tokens to come; multiplier and softcap:
    the checkpoint's output transform, on the head's logits before the selector's scores are added. Without a
    selector a token's log-probability does not depend on the one before.
    """
    bs, d, width = hidden.shape
    scores = logits(hidden.reshape(bs * d, width))
    if multiplier != 1.0:
        scores = scores.float() * multiplier
    if softcap is not None:
        scores = torch.tanh(scores.float() / softcap) * softcap
    unary, tokens, lse = kernels.topk_lse(scores, k, noise)
    unary, tokens, lse = unary.view(bs, d, k), tokens.view(bs, d, k), lse.view(bs, d)
    if leads is not None:
        unary, tokens = place_leads(unary, tokens, leads)
    if selector is None:
        logp = kernels.lattice_logp(unary, lse, None)
    else:
        logp = kernels.selector_logp(
            unary,
            lse,
            tokens,
            bonus,
            selector.hidden_projection(hidden),
            selector.predecessor_codebook,
            selector.successor_codebook,
        )
    return Lattice(tokens, logp if leads is None else follow_leads(logp, tokens, leads))
