"""Grammars along the tree: each node's logits are masked by the state that its path leads to.

A walk follows the target's masked samples, so it never comes to a node that a grammar forbids. The masks are made
on the host, which asks for the tree ahead of the target's pass, while that runs. Some take far longer: when the pass is
over, what is left are those that a walk needs. These are few, as a mask changes nothing where the choice is allowed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from sglang.srt.managers.utils import _async_d2h
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from torch import Tensor
from xgrammar import BatchGrammarMatcher

from sglang_dflash.tree import DraftTree

QUICK = 5e-4  # seconds of a tree's masks; most take less than a tenth
LONG = 2e-4  # seconds of a mask; most take a tenth, less than it does to start the threads of a round
MOST_THREADS = 8  # for masks; half the cores, where there are fewer


def looks_ahead(grammar: Any) -> bool:
    """Whether a grammar can take a path's tokens and step back: xgrammar's and llguidance's can, outlines' cannot."""
    inner = grammar.grammar if isinstance(grammar, ReasonerGrammarObject) else grammar
    return inner is None or type(inner).rollback is not BaseGrammarObject.rollback


def depends_on_history(req: Any) -> bool:
    """Whether a request's logits depend on the tokens before as no path can tell: custom logit processors, and grammars
    that cannot look ahead.

    Such a request takes its one token at the root, as plain decoding does, while the rest of the batch walks on.
    """
    return bool(req.custom_logit_processor or (req.grammar is not None and not looks_ahead(req.grammar)))


Draw = Callable[[list[int], list[int]], list[int]]  # tokens, by requests and rows of logits


class Grammars:
    """The grammars of one step. Begun with a batch's tree, before the target's pass over it is launched.

    rows: requests that have a grammar; seconds: what the host took for them behind the pass.
    open: requests of whose nodes some have no mask; tokens, parents [bs, w]: the tree, on the host. All three once
    `mask_ahead` was called.
    """

    open: set[int]

    def __init__(self, batch: Any, tree: DraftTree) -> None:
        self._reqs, self._info, self.seconds = batch.reqs, batch.sampling_info, 0.0
        self.rows = [row for row, req in enumerate(batch.reqs) if req.grammar is not None]
        self._tree = _async_d2h(torch.stack([tree.tokens, tree.parents]))
        self._copied = torch.cuda.Event() if tree.tokens.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def mask_ahead(self, logits: Tensor) -> None:
        """Mask logits [bs * w, V] in place, at as many nodes as the host comes to while the pass that makes them runs.

        By now the grammars must have been brought up to the tokens already accepted.
        """
        over = _end_of_pass(logits)
        if self._copied is not None:
            self._copied.synchronize()
        self.tokens, self.parents = self._tree.tolist()
        w = len(self.tokens[0])
        self._masks = self._allocate(len(logits))
        at_root = [row for row in self.rows if depends_on_history(self._reqs[row])]
        rows = [row for row in self.rows if row not in at_root]
        at_root = [row for row in at_root if not self._reqs[row].grammar.is_terminated()]
        _fill([self._reqs[row].grammar for row in at_root], self._masks, [row * w for row in at_root])
        grammars = [self._reqs[row].grammar for row in rows]
        left = fill_trees(grammars, rows, self._tree, self._masks, over)
        grammars = [self._reqs[row].grammar for row in left]
        self._made, still = fill_masks(grammars, left, self.tokens, self.parents, self._masks, over)
        self.open, self._taken = set(still), dict.fromkeys(still, 0)
        if at_root or self._made or len(left) < len(rows):
            self._apply(logits, self._masks)

    def settle(self, nodes: dict[int, int], tokens: list[int], logits: Tensor, draw: Draw) -> list[int]:
        """What walks go on with at nodes, by request's row, where the target chose tokens; the open grammars take it.

        An allowed choice of all tokens is the choice of those that are allowed, unless filters went by what else there
        is. Where that is not so the node's row of logits [bs * w, V] is masked now, and drawn from again.
        """
        begun = time.perf_counter()
        w, said = len(self.tokens[0]), dict(zip(nodes, tokens, strict=True))
        refused = [row for row in nodes if row in self.open and not self._takes(row, row * w + nodes[row], said[row])]
        if refused:
            said.update(self._drawn_masked({row: row * w + nodes[row] for row in refused}, logits, draw))
        self.seconds += time.perf_counter() - begun
        return list(said.values())

    def _drawn_masked(self, rows: dict[int, int], logits: Tensor, draw: Draw) -> dict[int, int]:
        """What is drawn at these rows of logits, by request's row, once they are masked; the grammars take it."""
        masks, at = self._allocate(len(rows)), list(rows.values())
        _fill([self._reqs[row].grammar for row in rows], masks, range(len(rows)))
        some = logits[at]
        self._apply(some, masks)
        logits[at] = some
        tokens = dict(zip(rows, draw(list(rows), at), strict=True))
        for (row, token), words in zip(tokens.items(), masks.numpy(), strict=True):
            self._take(row, token, words)
        return tokens

    def step_back(self) -> None:
        """Leave every grammar where it was before the walks."""
        for row, taken in self._taken.items():
            if taken:
                self._reqs[row].grammar.rollback(taken)

    def _takes(self, row: int, at: int, token: int) -> bool:
        """Whether a choice stands as it is; at: its row of logits."""
        req = self._reqs[row]
        if req.grammar.is_terminated():
            self.open.remove(row)
        elif at in self._made:
            self._take(row, token, self._masks[at].numpy())
        elif _tells(req) and req.grammar.matcher.accept_token(token):
            req.grammar.matcher.rollback(1)
            self._take(row, token)
        else:
            return False
        return True

    def _take(self, row: int, token: int, words: np.ndarray | None = None) -> None:
        """A grammar takes an allowed token. Where its mask, words, allows nothing, SGLang will end the request."""
        if words is not None and not _allows(words, token):
            self.open.remove(row)
            return
        self._reqs[row].grammar.accept_token(token)
        self._taken[row] += 1

    def _allocate(self, rows: int) -> Tensor:
        """Masks that allow everything, a row a node."""
        grammar = self._reqs[self.rows[0]].grammar
        mask: Tensor = grammar.allocate_vocab_mask(vocab_size=self._info.vocab_size, batch_size=1, device="cpu")
        pinned = self._copied is not None
        return torch.empty(rows, mask.shape[1], dtype=mask.dtype, pin_memory=pinned).copy_(mask)

    def _apply(self, logits: Tensor, masks: Tensor) -> None:
        grammar = self._reqs[self.rows[0]].grammar
        grammar.apply_vocab_mask(logits=logits, vocab_mask=masks.to(logits.device, non_blocking=True))


def _end_of_pass(logits: Tensor) -> Callable[[], bool]:
    """Tells whether the pass that makes logits is over; on a CPU it is once it returns."""
    if not logits.is_cuda:
        return lambda: True
    end = torch.cuda.Event()
    end.record()
    return end.query


def _tells(req: Any) -> bool:
    """Whether a sample of all tokens, if it is allowed, is that of the allowed ones, and its grammar tells that.

    Not where filters go by what is forbidden too, nor where the masked logits themselves are asked for.
    """
    params = req.sampling_params
    every = params.top_k == TOP_K_ALL and params.top_p == 1.0 and params.min_p == 0.0
    return type(req.grammar) is XGrammarGrammar and (params.top_k == 1 or every) and not req.return_logprob


def _allows(words: np.ndarray, token: int) -> bool:
    return bool(words[token // 32] >> token % 32 & 1)


def fill_trees(
    grammars: list[Any], rows: list[int], tree: Tensor, masks: Tensor, over: Callable[[], bool] = lambda: False
) -> list[int]:
    """As `fill_masks` does, request by request: half of the time for xgrammar's, as long as masks are quick to make.
    Returns those of rows that are left for it, with their masks as they were.

    tree [2, bs, w] int64: tokens and parents.
    """
    tokens, parents = tree
    first, sibling = _links(parents.numpy())
    words = masks.view(*tokens.shape, -1)
    left = list(rows)
    for grammar, row in zip(grammars, rows, strict=True):
        if type(grammar) is not XGrammarGrammar:
            continue
        if over():
            break
        arguments = first[row], sibling[row], tokens[row], words[row]
        if not grammar.is_terminated() and not grammar.matcher.traverse_draft_tree(*arguments, QUICK):
            words[row] = -1
            break  # others are like it, most likely
        left.remove(row)
    if len(left) < len(rows):
        # It forbids everything where no walk comes. A pass beyond a request's end samples there all the same.
        every = words.numpy()
        every[np.bitwise_or.reduce(every, axis=-1) == 0] = -1
    return left


def _links(parents: np.ndarray) -> tuple[Tensor, Tensor]:
    """Each node's first child and next sibling, int64 [bs, w], -1 for none."""
    child, sibling = np.full((2, *parents.shape), -1, dtype=np.int64)
    rows = np.arange(len(parents))
    for node in range(parents.shape[1] - 1, 0, -1):
        parent = parents[:, node]
        sibling[:, node], child[rows, parent] = child[rows, parent], node
    return torch.from_numpy(child), torch.from_numpy(sibling)


def fill_masks(
    grammars: list[Any],
    rows: list[int],
    tokens: list[list[int]],
    parents: list[list[int]],
    masks: Tensor,
    over: Callable[[], bool] = lambda: False,
) -> tuple[set[int], list[int]]:
    """Fill masks [bs * w, V / 32], a row a node, with what a grammar lets follow each path of a tree, until it is over.

    grammars: of the batch's requests in rows; tokens, parents [bs, w]: their trees. Masks stay as they are where no
    walk comes: behind a forbidden token, and once the grammar has ended. Returns the rows of masks that were made, and
    those of rows that have nodes left.
    """
    width, made = len(tokens[0]), set()
    words = masks.numpy().reshape(len(tokens), width, -1)
    visits = {
        row: (grammar, _visits(grammar, tokens[row], parents[row], words[row]))
        for grammar, row in zip(grammars, rows, strict=True)
    }
    long = False
    while visits and not over():
        at = {row: node for row, (_, visit) in visits.items() if (node := next(visit, None)) is not None}
        visits = {row: visits[row] for row in at}
        filled = [row * width + node for row, node in at.items()]
        long = _fill([grammar for grammar, _ in visits.values()], masks, filled, long)
        made.update(filled)
    for _, visit in visits.values():
        visit.close()
    return made, list(visits)


def _fill(grammars: list[Any], masks: Tensor, rows: Sequence[int], long: bool = False) -> bool:
    """Fill a row of masks for each grammar. Behind one that takes long those of xgrammar are made side by side on
    several cores, whose threads start anew each time. long: whether one took long before; returned with these.
    """
    matchers = [grammar.matcher for grammar in grammars if type(grammar) is XGrammarGrammar]
    before = time.thread_time()  # a busy host's pauses are not the mask's
    for place, (grammar, row) in enumerate(zip(grammars, rows, strict=True)):
        if long and len(grammars) == len(matchers) > place + 1:
            _cores().batch_fill_next_token_bitmask(matchers[place:], masks, list(rows[place:]))
            break
        grammar.fill_vocab_mask(masks, row)
        after = time.thread_time()
        long, before = long or after - before > LONG, after
    return long


@cache
def _cores() -> BatchGrammarMatcher:
    return BatchGrammarMatcher(min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2)))


def _visits(
    grammar: Any, tokens: list[int], parents: list[int], words: np.ndarray
) -> Generator[int, None, None]:
    """Bring a grammar to each node that it allows, and back; words[node] are its mask before the next is asked for."""
    children: list[list[int]] = [[] for _ in tokens]
    for node in range(1, len(tokens)):
        children[parents[node]].append(node)

    def visit(node: int) -> Generator[int, None, None]:
        if grammar.is_terminated():
            return
        yield node
        for child in children[node]:
            if _allows(words[node], tokens[child]):
                grammar.accept_token(tokens[child])
                try:
                    yield from visit(child)
                finally:  # closed on the way, too
                    grammar.rollback(1)

    return visit(0)
