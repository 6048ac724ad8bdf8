"""One training step's mathematics: a batch of the target's answers to a loss, many draft blocks at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_dflash.training.attention import attend, document_mask, draft_mask
from sglang_dflash.training.data import Batch
from sglang_dflash.training.draft import Draft, FreeSelector, TiedSelector
from sglang_dflash.training.loss import (
    Soft,
    dpace_weights,
    draw,
    free_codebook_loss,
    frozen_head_loss,
    static_weights,
)
from sglang_dflash.training.target import Target


def features(target: Target, batch: Batch, layer_ids: list[int]) -> Tensor:
    """[B, T, len(layer_ids) * hidden] of every token of the batch."""
    mask = document_mask(batch.starts)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) - batch.starts
    return target.features(batch.tokens, positions, attend, [mask] * len(target.layers), layer_ids)


def features_and_states(target: Target, batch: Batch, layer_ids: list[int]) -> tuple[Tensor, Tensor]:
    """The features, and what the target's head reads of every token, [B, T, hidden], in the same pass."""
    size, last = target.embedding.shape[1], len(target.layers) - 1
    both = features(target, batch, sorted({*layer_ids, last}))
    return both[..., : len(layer_ids) * size], target.normed(both[..., -size:])


def mixed(target: Target) -> torch.autocast:
    """The precision the draft runs in beside this target: bf16 products where the target is bf16."""
    return torch.autocast(
        target.embedding.device.type, torch.bfloat16, enabled=target.embedding.dtype == torch.bfloat16
    )


@dataclass(frozen=True)
class Blocks:
    """Draft blocks at A anchors a row, an anchor being the bonus token: the last one known.

    anchors [B, A] int64: where in the row. gold [B, A, depth] int64: the tokens after it. valid [B, A, depth] bool: the
    target wrote that token, all before it in the block, and the anchor.
    """

    anchors: Tensor
    gold: Tensor
    valid: Tensor


def blocks_at(batch: Batch, anchors: Tensor, block: int) -> Blocks:
    """The blocks at anchors [B, A]."""
    at = anchors[..., None] + torch.arange(block, device=anchors.device)
    inside = at < batch.tokens.shape[1]
    flat = at.clamp(max=batch.tokens.shape[1] - 1).flatten(1)
    gold = batch.tokens.gather(1, flat).view_as(at)
    valid = (batch.answer.gather(1, flat).view_as(at) & inside).cumprod(-1).bool()
    return Blocks(anchors, gold[..., 1:], valid[..., 1:])


def random_anchors(batch: Batch, count: int) -> Tensor:
    """`count` anchors a row, [B, count], drawn without replacement; each has a next answer token, if enough have.

    In ascending order: blocks that stand together then see the same few tiles of the context, and attention skips the
    rest.
    """
    usable = batch.answer.clone()
    usable[:, :-1] &= batch.answer[:, 1:]
    usable[:, -1] = False
    return (torch.rand(usable.shape, device=usable.device) + usable).topk(count, dim=1).indices.sort(dim=1).values


def draft_hidden(draft: Draft, target: Target, batch: Batch, anchors: Tensor, context: Tensor) -> Tensor:
    """Hidden states at the drafted positions of each block, [B, A, depth, hidden]. context: the batch's features."""
    shape, (b, t) = draft.shape, batch.tokens.shape
    tokens = torch.full((*anchors.shape, shape.block), shape.mask_token, device=anchors.device)
    tokens[..., 0] = batch.tokens.gather(1, anchors)
    starts = batch.starts.gather(1, anchors)
    firsts = torch.maximum(starts, anchors - shape.window) if shape.window else starts
    mask = draft_mask(anchors, firsts, t, shape.block, shape.causal)
    own = (anchors - starts)[..., None] + torch.arange(shape.block, device=anchors.device)
    positions = torch.cat([torch.arange(t, device=anchors.device) - batch.starts, own.flatten(1)], dim=1)
    blocks = F.embedding(tokens.flatten(1), target.embedding)
    hidden = draft(blocks, context, target.rotation(positions), mask)
    return hidden.view(b, -1, shape.block, hidden.shape[-1])[:, :, 1:]


@dataclass(frozen=True)
class Objective:
    """weights: "static" or "dpace" (see loss.py). unary: weight of the unary loss beside the conditional one's 1.

    soft: share of a label that is the target's own distribution, the token it wrote being the rest. variation: weight
    of the total variation between the draft's distribution and the target's. Both need static weights.
    """

    weights: str = "static"
    unary: float = 0.5
    soft: float = 0.0
    variation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.soft <= 1 or self.variation < 0:
            raise ValueError(f"soft {self.soft} is a share from 0 to 1, variation {self.variation} no less than 0")
        if self.of_distribution and self.weights != "static":
            raise ValueError(
                f"weights {self.weights!r} go by how probable written tokens are: soft and variation need static ones"
            )

    @property
    def of_distribution(self) -> bool:
        """Whether the target's distribution is looked at, and not what it wrote alone."""
        return self.soft > 0 or self.variation > 0


def soft_labels(blocks: Blocks, states: Tensor | None, objective: Objective) -> Soft | None:
    """Labels of all drafted positions, flat, from states [B, T, H]; None: what was written is all there is."""
    if states is None:
        return None
    at = blocks.anchors[..., None] + torch.arange(blocks.gold.shape[-1], device=states.device)
    at = at.flatten(1).clamp(max=states.shape[1] - 1)  # what a row's end cuts off is not valid
    rows = torch.arange(len(states), device=states.device)[:, None]
    return Soft(states[rows, at].flatten(0, 1), objective.soft, objective.variation)


def conditional_loss(
    draft: Draft, target: Target, hidden: Tensor, gold: Tensor, before: Tensor, soft: Soft | None = None
) -> Tensor:
    """Loss [N] at gold [N], or soft labels, given the token before it, [N]; hidden [N, H]."""
    selector = draft.candidate_selector
    if isinstance(selector, TiedSelector):
        return frozen_head_loss(selector.conditional(hidden, before, target), target.head, gold, soft)
    assert isinstance(selector, FreeSelector)
    state = F.embedding(before, selector.predecessor_codebook) * selector.hidden_projection(hidden)
    return free_codebook_loss(hidden, target.head, gold, state, selector.successor_codebook)


def loss(
    draft: Draft,
    target: Target,
    batch: Batch,
    blocks: Blocks,
    hidden: Tensor,
    objective: Objective,
    states: Tensor | None = None,
) -> Tensor:
    """The objective over a batch's blocks, whose drafted positions have hidden [B, A, depth, H].

    states [B, T, H]: what the target's head reads of every token, where the objective looks at its distribution.

    Static weights are met by drawing positions in proportion to them; dynamic ones need every position's probability.
    The unary loss looks at every other position drawn.
    """
    depth = blocks.gold.shape[-1]
    before = torch.cat([batch.tokens.gather(1, blocks.anchors)[..., None], blocks.gold[..., :-1]], -1).flatten()
    h, gold, valid = hidden.flatten(0, 2), blocks.gold.flatten(), blocks.valid.flatten()
    if objective.weights == "static":
        weights = static_weights(depth, draft.shape.block, h.device)
        chosen = draw((blocks.valid * weights).flatten(), int(len(valid) * weights.mean()))
        h, gold, before = h[chosen], gold[chosen], before[chosen]
        soft = soft_labels(blocks, states, objective)
        soft = soft and soft.at(chosen)
        if draft.candidate_selector is None:
            return frozen_head_loss(h, target.head, gold, soft).mean()
        half = slice(None, None, 2)
        unary = frozen_head_loss(h[half], target.head, gold[half], soft and soft.at(half)).mean()
        return conditional_loss(draft, target, h, gold, before, soft).mean() + objective.unary * unary
    unary = frozen_head_loss(h, target.head, gold)
    sharp = unary if draft.candidate_selector is None else conditional_loss(draft, target, h, gold, before)
    weight = dpace_weights(-sharp.detach().view_as(blocks.valid), blocks.valid).flatten()
    weight = weight / weight.sum()
    total = (sharp * weight).sum()
    return total if draft.candidate_selector is None else total + objective.unary * (unary * weight).sum()
