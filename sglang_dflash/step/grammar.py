"""Grammars along the tree: each node's logits are masked by the state that its path leads to.

A walk follows the target's masked samples, so it never comes to a node that a grammar forbids. The masks are made
on the host, which asks for the tree ahead of the target's pass, while that runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from sglang.srt.managers.utils import _async_d2h
from torch import Tensor
from xgrammar import BatchGrammarMatcher

from sglang_dflash.tree import DraftTree

MOST_THREADS = 8  # for masks; half the cores, where there are fewer


def looks_ahead(grammar: Any) -> bool:
    """Whether a grammar can take a path's tokens and step back: xgrammar's and llguidance's can, outlines' cannot."""
    inner = grammar.grammar if isinstance(grammar, ReasonerGrammarObject) else grammar
    return inner is None or type(inner).rollback is not BaseGrammarObject.rollback


class NodeMasks:
    """The masks of one step's nodes. Begun with a batch's tree, before the target's pass over it is launched.

    rows: requests that have a grammar, [R]; made [R, w] bool: the nodes whose masks were made; seconds: what that took.
    """

    made: np.ndarray
    seconds: float

    def __init__(self, batch: Any, tree: DraftTree) -> None:
        self._reqs, self._info = batch.reqs, batch.sampling_info
        self.rows = [row for row, req in enumerate(batch.reqs) if req.grammar is not None]
        self._tree = _async_d2h(torch.stack([tree.tokens, tree.parents]))
        self._copied = torch.cuda.Event() if tree.tokens.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def apply(self, logits: Tensor, barrier: Callable[[], None] | None) -> None:
        """Mask logits [bs * w, V] in place. barrier: brings the grammars up to the tokens already accepted."""
        if barrier is not None:
            barrier()
        grammars = [self._reqs[row].grammar for row in self.rows]
        masks = grammars[0].allocate_vocab_mask(
            vocab_size=self._info.vocab_size, batch_size=len(logits), device="cpu"
        )
        if self._copied is not None:
            self._copied.synchronize()
        tokens, parents = self._tree.tolist()
        begun = time.perf_counter()
        self.made = fill_masks(grammars, self.rows, tokens, parents, masks)
        self.seconds = time.perf_counter() - begun
        grammars[0].apply_vocab_mask(logits=logits, vocab_mask=masks.to(logits.device, non_blocking=True))


def fill_masks(
    grammars: list[Any], rows: list[int], tokens: list[list[int]], parents: list[list[int]], masks: Tensor
) -> np.ndarray:
    """Fill masks [bs * w, V / 32], a row a node, with what a grammar lets follow each path of a tree.

    grammars: of the batch's requests in rows; tokens, parents [bs, w]: their trees. Masks stay as they are where no
    walk comes: behind a forbidden token, and once the grammar has ended. Returns those made, [rows, w] bool.
    """
    width = len(tokens[0])
    made = np.zeros((len(rows), width), dtype=bool)
    words = masks.numpy().reshape(len(tokens), width, -1)
    visits = {
        i: _visits(grammar, tokens[row], parents[row], words[row])
        for i, (grammar, row) in enumerate(zip(grammars, rows, strict=True))
    }
    while visits:
        at = {i: node for i, visit in visits.items() if (node := next(visit, None)) is not None}
        _fill([grammars[i] for i in at], masks, [rows[i] * width + node for i, node in at.items()])
        made[list(at), list(at.values())] = True
        visits = {i: visits[i] for i in at}
    return made


def _fill(grammars: list[Any], masks: Tensor, rows: list[int]) -> None:
    """Fill a row of masks for each grammar; those of xgrammar side by side on several cores."""
    matchers = [grammar.matcher for grammar in grammars if type(grammar) is XGrammarGrammar]
    if len(matchers) == len(grammars) > 1:
        _cores().batch_fill_next_token_bitmask(matchers, masks, rows)
        return
    for grammar, row in zip(grammars, rows, strict=True):
        grammar.fill_vocab_mask(masks, row)


@cache
def _cores() -> BatchGrammarMatcher:
    return BatchGrammarMatcher(min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2)))


def _visits(grammar: Any, tokens: list[int], parents: list[int], words: np.ndarray) -> Iterator[int]:
    """Bring a grammar to each node that it allows, and back; words[node] are its mask before the next is asked for."""
    children: list[list[int]] = [[] for _ in tokens]
    if looks_ahead(grammar):
        for node in range(1, len(tokens)):
            children[parents[node]].append(node)

    def visit(node: int) -> Iterator[int]:
        if grammar.is_terminated():
            return
        yield node
        for child in children[node]:
            token = tokens[child]
            if words[node, token // 32] >> token % 32 & 1:
                grammar.accept_token(token)
                yield from visit(child)
                grammar.rollback(1)

    return visit(0)
