"""Transition scores between the candidates of neighbouring positions: they make a lattice of marginals."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sglang_dflash.draft.config import DraftConfig


class Selector(nn.Module):
    """DFlash2's selector: how well candidate c follows predecessor p where the draft's hidden state is h.

    The score is <A[p] * (G h), B[c]>, with codebooks A and B [V, r] and G `hidden_projection` [r, H]; it is computed
    in `kernels.selector_logp`.
    Parameters are named as in the checkpoint.
    """

    predecessor_codebook: Tensor
    successor_codebook: Tensor

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)
        self._make_codebooks(config)

    def _make_codebooks(self, config: DraftConfig) -> None:
        for name in ("predecessor_codebook", "successor_codebook"):
            setattr(self, name, nn.Parameter(torch.empty(config.vocab_size, config.selector_rank)))

    def bind_target(self, embedding: Tensor, head: Tensor) -> None:
        """Called after every load, with the target's tables [V, H]. Free codebooks ask nothing of them."""


class TiedSelector(Selector):
    """The selector with both codebooks tied to the target: A = rmsnorm(E P^T) without weight, B = W S^T.

    E and W are the target's embedding and head, so a checkpoint holds only P, G and S, each [r, H].
    """

    def _make_codebooks(self, config: DraftConfig) -> None:
        self.eps = config.selector_eps
        self.predecessor_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)
        self.successor_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)
        for name in ("predecessor_codebook", "successor_codebook"):
            self.register_buffer(name, torch.empty(config.vocab_size, config.selector_rank), persistent=False)

    @torch.no_grad()
    def bind_target(self, embedding: Tensor, head: Tensor) -> None:
        """Expand the codebooks, in place, from the target's embedding and head, both [V, H] in the draft's dtype."""
        predecessors = self.predecessor_projection(embedding)
        self.predecessor_codebook.copy_(F.rms_norm(predecessors, predecessors.shape[-1:], eps=self.eps))
        self.successor_codebook.copy_(self.successor_projection(head))


def make_selector(config: DraftConfig) -> Selector | None:
    """The selector that a checkpoint of this config carries, its weights not loaded yet."""
    if config.selector == "none":
        return None
    return TiedSelector(config) if config.selector == "tied" else Selector(config)


def build_selector(network: nn.Module, *, embedding: Tensor, head: Tensor) -> Selector | None:
    """The loaded network's selector, ready to score; None where its checkpoint has none.

    embedding and head: the target's weights [>= V, H] in any dtype; rows beyond the vocabulary are padding.
    """
    selector: Selector | None = network.candidate_selector
    if selector is not None:
        vocab, dtype = network.draft_config.vocab_size, selector.hidden_projection.weight.dtype
        selector.bind_target(embedding[:vocab].to(dtype), head[:vocab].to(dtype))
    return selector
