"""What is learnt from: cross-entropy of unary and conditional logits, weighted by position in the block.

Labels are the tokens that the target wrote, its own distribution there, or between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 8192  # of logits at a time: what the head's output may take of memory


def _loss_and_gradient(logits: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, and its gradient by the logits (in their dtype)."""
    x = logits.float()
    log_sum = x.logsumexp(-1, keepdim=True)
    loss = log_sum[:, 0] - x.gather(1, gold[:, None])[:, 0]
    is_gold = torch.arange(x.shape[1], device=x.device) == gold[:, None]
    return loss, ((x - log_sum).exp() - is_gold.float()).to(logits.dtype)


def _soft_loss_and_gradient(
    logits: Tensor, gold: Tensor, of_target: Tensor, share: Tensor, variation: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for labels of which a share is softmax(of_target), with so much of the total variation added.

    share, variation: [] each. A distribution q's gradient of sum(s * q), s being signs, is q * (s - sum(s * q)).
    """
    x = logits.float()
    log_q, p = x - x.logsumexp(-1, keepdim=True), of_target.float().softmax(-1)
    q, is_gold = log_q.exp(), torch.arange(x.shape[1], device=x.device) == gold[:, None]
    label = share * p + (1 - share) * is_gold.float()
    apart = q - p
    side = apart.sign()
    loss = variation / 2 * apart.abs().sum(-1) - (label * log_q).sum(-1)
    gradient = q - label + variation / 2 * q * (side - (side * q).sum(-1, keepdim=True))
    return loss, gradient.to(logits.dtype)


_compiled = torch.compile(_loss_and_gradient, dynamic=True)
_compiled_soft = torch.compile(_soft_loss_and_gradient, dynamic=True)


@dataclass(frozen=True)
class Soft:
    """The target's own distribution at each row as its label.

    states [N, H]: what the target's head reads there. share: of a label that is this distribution, the token that was
    written being the rest. variation: weight of the total variation between draft and target, half their L1 distance.
    """

    states: Tensor
    share: float
    variation: float

    def at(self, rows: Tensor | slice) -> Soft:
        return Soft(self.states[rows], self.share, self.variation)


class _FrozenHeadLoss(torch.autograd.Function):
    """Forward makes the hidden states' gradient too, so that logits live for one slice of rows only.

    The head is frozen: its own gradient, a third of the work, is never made.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, gold: Tensor, soft: Soft | None) -> Tensor:
        hard, softly = (
            (_compiled, _compiled_soft) if hidden.is_cuda else (_loss_and_gradient, _soft_loss_and_gradient)
        )
        losses, gradients = [], []
        of_soft = () if soft is None else (soft.share, soft.variation)
        weights = [torch.full((), x, device=head.device) for x in of_soft]
        for at in range(0, len(hidden), ROWS):
            rows = slice(at, at + ROWS)
            logits = hidden[rows] @ head.T
            if soft is None:
                loss, gradient = hard(logits, gold[rows])
            else:
                loss, gradient = softly(logits, gold[rows], soft.states[rows] @ head.T, *weights)
            losses.append(loss)
            gradients.append(gradient @ head)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grads[0][:, None].to(gradients.dtype), None, None, None


def frozen_head_loss(hidden: Tensor, head: Tensor, gold: Tensor, soft: Soft | None = None) -> Tensor:
    """Cross-entropy [N] float32 of hidden [N, H] under a frozen head [V, H] at gold [N] int64, or at soft labels."""
    return _FrozenHeadLoss.apply(hidden.to(head.dtype), head, gold, soft)


def static_weights(depth: int, block: int, device: torch.device) -> Tensor:
    """DFlash's: exp(-(k - 1) / gamma) at the k-th drafted position, gamma 7 for a block of 16. [depth] float32."""
    gamma = 7.0 * block / 16
    return torch.exp(-torch.arange(depth, device=device).float() / gamma)


def dpace_weights(logp: Tensor, valid: Tensor) -> Tensor:
    """Dynamic weights after D-PACE (arXiv 2605.18810): what each position's log-probability does for the length.

    logp [..., depth]: of the gold token at each position, detached; valid [..., depth] bool, true up to some position.
    A block's expected accepted length is the sum over k of p_1 ... p_k; these are the gradients of its logarithm. So
    the first position of every block weighs 1, later ones as much of that as still gets there. (The length's own
    gradient would forget blocks that begin badly: trained so, a draft learns its easy blocks and nothing else.)
    """
    path = torch.where(valid, logp, 0.0).cumsum(-1)
    reached = (path - path[..., :1]).exp() * valid
    onwards = reached.flip(-1).cumsum(-1).flip(-1)
    return onwards / onwards[..., :1].clamp(min=1e-9) * valid


def draw(weights: Tensor, count: int) -> Tensor:
    """`count` indices into weights [N], each expected in proportion to its weight (systematic sampling).

    A plain mean over the drawn then estimates the weighted mean over all, without bias, for less work.
    """
    ends = weights.double().cumsum(0)
    points = (torch.arange(count, device=weights.device) + torch.rand((), device=weights.device)) / count
    return torch.searchsorted(ends, points.double() * ends[-1]).clamp_(max=len(weights) - 1)


def free_codebook_loss(hidden: Tensor, head: Tensor, gold: Tensor, state: Tensor, codebook: Tensor) -> Tensor:
    """As frozen_head_loss, with trainable transition scores `state @ codebook.T` added to the logits."""
    logits = hidden.to(head.dtype) @ head.T + state.to(head.dtype) @ codebook.to(head.dtype).T
    return F.cross_entropy(logits.float(), gold, reduction="none")
