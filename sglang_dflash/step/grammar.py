"""Grammars along the tree: each node's logits are masked by the state that its path leads to.

A walk follows the target's masked samples, so it never comes to a node that a grammar forbids. The masks are made
on the host, which asks for the tree ahead of the target's pass, while that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.managers.utils import _async_d2h
from torch import Tensor

from sglang_dflash.tree import DraftTree


def looks_ahead(grammar: Any) -> bool:
    """Whether a grammar can take a path's tokens and step back: xgrammar's and llguidance's can, outlines' cannot."""
    inner = grammar.grammar if isinstance(grammar, ReasonerGrammarObject) else grammar
    return inner is None or type(inner).rollback is not BaseGrammarObject.rollback


class NodeMasks:
    """The masks of one step's nodes. Begun with a batch's tree, before the target's pass over it is launched."""

    def __init__(self, batch: Any, tree: DraftTree) -> None:
        self._reqs, self._info = batch.reqs, batch.sampling_info
        self._tree = _async_d2h(torch.stack([tree.tokens, tree.parents]))
        self._copied = torch.cuda.Event() if tree.tokens.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def apply(self, logits: Tensor, barrier: Callable[[], None] | None) -> None:
        """Mask logits [bs * w, V] in place. barrier: brings the grammars up to the tokens already accepted."""
        if barrier is not None:
            barrier()
        if self._copied is not None:
            self._copied.synchronize()
        tokens, parents = self._tree.tolist()
        grammars = {row: req.grammar for row, req in enumerate(self._reqs) if req.grammar is not None}
        one = next(iter(grammars.values()))
        masks = one.allocate_vocab_mask(vocab_size=self._info.vocab_size, batch_size=len(logits), device="cpu")
        by_request = masks.view(len(tokens), -1, masks.shape[1])
        for row, grammar in grammars.items():
            fill_masks(grammar, tokens[row], parents[row], by_request[row])
        one.apply_vocab_mask(logits=logits, vocab_mask=masks.to(logits.device, non_blocking=True))


def fill_masks(grammar: Any, tokens: list[int], parents: list[int], masks: Tensor) -> None:
    """Fill masks [w, V / 32], a row a node, with what the grammar lets follow each path of a tree.

    Rows stay as they are where no walk comes: behind a forbidden token, and once the grammar has ended.
    """
    children: list[list[int]] = [[] for _ in tokens]
    if looks_ahead(grammar):
        for node in range(1, len(tokens)):
            children[parents[node]].append(node)
    words = masks.numpy()

    def visit(node: int) -> None:
        if grammar.is_terminated():
            return
        grammar.fill_vocab_mask(masks, node)
        for child in children[node]:
            token = tokens[child]
            if words[node, token // 32] >> token % 32 & 1:
                grammar.accept_token(token)
                visit(child)
                grammar.rollback(1)

    visit(0)
