"""What drafting brings: accepted tokens by request and shape, expected from what was accepted before.

A tree's first m nodes are the tree of m nodes, and what is emitted does not depend on what was drafted. So a verified
tree tells exactly what every smaller one would have brought; of larger ones, it tells by how much they bring more on
the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_dflash.budget.shape import Shape

KINDS = 4  # of requests: greedy, sampled; each without and with a grammar
MEMORY = 16  # steps in which a request forgets
BOLD = 0.25  # most that one step counts
SERVER = 0.02  # of a request's step in what requests of a kind accept on the whole: a batch of many tells it at once
RATIOS = 0.01  # of a step in how much more a larger tree brings
USUAL = 0.75  # of drafts at the first position are accepted, before any was seen
MORE = 0.6  # by how much twice as many nodes bring more, in accepted tokens, before any was seen


class Gain:
    """Accepted drafts of each request under each shape. Requests are named by small numbers, each its own at a time."""

    def __init__(self, shapes: Sequence[Shape], requests: int) -> None:
        """requests: their numbers are below this. shapes: ascending, none twice."""
        nodes = np.array([s.nodes for s in shapes])
        # The smallest shape that has room for a node, and for a depth: larger ones are never less deep.
        self._by_node = np.searchsorted(nodes, np.arange(nodes[-1] + 1))
        self._by_depth = np.searchsorted([s.depth for s in shapes], np.arange(1, shapes[-1].depth + 1))
        usual = np.where(nodes > 0, USUAL + MORE * np.log2(np.maximum(nodes, 1)), 0)
        self._usual = np.tile(usual, (KINDS, 1))  # [kinds, shapes]: of requests that have not been seen
        # Of each shape and of the next smaller one, means over steps that tell both: their ratio is what more brings.
        self._told = np.stack([self._usual, np.roll(self._usual, 1, 1)], 1)  # [kinds, 2, shapes]
        self._mean = np.tile(usual, (requests, 1))
        self._idle = np.zeros(requests)  # steps since a request was last seen

    def begin(self, requests: np.ndarray, kinds: np.ndarray) -> None:
        """New requests under these numbers: each accepts as others of its kind do until it is seen."""
        self._mean[requests] = self._usual[kinds]
        self._idle[requests] = MEMORY / 4

    def expected(self, requests: np.ndarray) -> np.ndarray:
        """Accepted drafts in the next step, [requests, shapes]."""
        return self._mean[requests]

    def accepted(self, shape: int, nodes: np.ndarray, lens: np.ndarray) -> np.ndarray:
        """Accepted drafts [requests, shape + 1] of this shape and all smaller ones, had each been verified instead.

        nodes [requests, D + 1]: walked nodes, the root first; lens [requests]: how many of them are walked.
        """
        deep = nodes.shape[1] - 1
        smallest = np.maximum(self._by_node[nodes[:, 1:]], self._by_depth[:deep])
        smallest[np.arange(1, deep + 1) >= lens[:, None]] = shape + 1  # not walked
        return (smallest[:, None] <= np.arange(shape + 1)[:, None]).sum(-1)

    def rest(self, requests: np.ndarray) -> None:
        """These took a step of the smallest shape, which tells nothing of any other."""
        self._idle[requests] += 1

    def learn(self, requests: np.ndarray, kinds: np.ndarray, shape: int, nodes: np.ndarray, lens: np.ndarray) -> None:
        """Learn from what verified trees came to; arguments as in `accepted`, kinds [requests]."""
        if not len(requests):
            return
        seen = self.accepted(shape, nodes, lens)
        there = set(kinds.tolist())
        of_kinds = [(kind, kinds == kind if len(there) > 1 else slice(None)) for kind in there]
        for kind, these in of_kinds:
            mean, told = _mean(seen[these]), self._told[kind, :, 1 : shape + 1]
            told += RATIOS * (np.array((mean[1:], mean[:-1])) - told)
        whole = seen
        if shape + 1 < self._usual.shape[1]:
            this, smaller = self._told[kinds, :, shape + 1 :].swapaxes(0, 1)
            more = this / np.maximum(smaller, 1e-6)
            whole = np.concatenate([seen, seen[:, -1:] * more.cumprod(1)], 1)
        rate = np.minimum(1 - np.exp(-(self._idle[requests] + 1) / MEMORY), BOLD)[:, None]
        self._mean[requests] += rate * (whole - self._mean[requests])
        self._idle[requests] = 0
        for kind, these in of_kinds:
            of_kind = whole[these]
            rate_of_all = min(1 - (1 - SERVER) ** len(of_kind), BOLD)
            self._usual[kind] += rate_of_all * (_mean(of_kind) - self._usual[kind])


def _mean(rows: np.ndarray) -> np.ndarray:
    """Of few rows in less time than NumPy's takes."""
    return np.add.reduce(rows) / len(rows)
