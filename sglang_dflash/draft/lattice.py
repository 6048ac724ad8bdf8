"""From a draft pass's hidden states to the lattice that a tree is grown in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.draft.selector import Selector
from sglang_dflash.kernels import Leads, Noise
from sglang_dflash.tree import Lattice


@dataclass(frozen=True)
class Candidates:
    """The k likeliest tokens of each drafted position, as the draft's pass alone knows them.

    unary [bs, d, k] float32: their scores, the highest first; tokens [bs, d, k] int64; lse [bs, d] float32: log-sum-exp
    of all tokens' scores; gate [bs, d, r]: of the selector, None without one.
    """

    unary: Tensor
    tokens: Tensor
    lse: Tensor
    gate: Tensor | None

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        logits: Callable[[Tensor], Tensor],
        selector: Selector | None,
        k: int,
        noise: Noise | None = None,
        *,
        multiplier: float = 1.0,
        softcap: float | None = None,
    ) -> Candidates:
        """hidden [bs, d, H]: the draft's output at the block's masks (not at the bonus token).

        logits: the target's head, [N, H] -> [N, V] in any float dtype, V without padding; noise: of the bs requests,
        what their samples will be drawn with (None: they take the likeliest tokens), so that those samples are drafted,
        and not what is likely before the noise is known; multiplier and softcap: the checkpoint's output transform, on
        the head's logits before the selector's scores are added.
        """
        bs, d, width = hidden.shape
        scores = logits(hidden.reshape(bs * d, width))
        if multiplier != 1.0:
            scores = scores.float() * multiplier
        if softcap is not None:
            scores = torch.tanh(scores.float() / softcap) * softcap
        unary, tokens, lse = kernels.topk_lse(scores, k, noise)
        gate = None if selector is None else selector.hidden_projection(hidden)
        return cls(unary.view(bs, d, k), tokens.view(bs, d, k), lse.view(bs, d), gate)

    def first(self, bs: int) -> Candidates:
        """Those of the first bs requests."""
        gate = None if self.gate is None else self.gate[:bs]
        return Candidates(self.unary[:bs], self.tokens[:bs], self.lse[:bs], gate)

    def take(self, other: Candidates) -> None:
        """Become a copy of another batch's, of the same shape."""
        for mine, given in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(given)

    def lattice(self, bonus: Tensor, selector: Selector | None, leads: Leads | None = None) -> Lattice:
        """With their log-probability after each of those before; bonus [bs] int64: before the first position.

        leads: what else is known of the tokens to come. Without a selector, and without leads, a token's
        log-probability does not depend on the one before.
        """
        unary, tokens = self.unary, self.tokens
        if leads is not None:
            unary, tokens = kernels.place_leads(unary, tokens, leads)
        if selector is None:
            logp = kernels.lattice_logp(unary, self.lse, None)
        else:
            tables = selector.predecessor_codebook, selector.successor_codebook
            logp = kernels.selector_logp(unary, self.lse, tokens, bonus, self.gate, *tables)
        return Lattice(tokens, logp if leads is None else kernels.follow_leads(logp, tokens, leads))

    def _tensors(self) -> list[Tensor]:
        every = self.unary, self.tokens, self.lse, self.gate
        return [x for x in every if x is not None]
