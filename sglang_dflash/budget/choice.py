"""Which shape a step takes: the one that makes most tokens a second, and now and then another one, to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_dflash.budget.cost import Cost
from sglang_dflash.budget.gain import Gain
from sglang_dflash.budget.shape import Shape

PROBES = 0.005  # most of the time that may go to steps of other shapes than the best
# A shape is tried no more often than every so many steps: a larger one or one whose cost is a guess, every 16. Of a
# smaller one the cost alone may have changed: the less a step of it is thought to lose, the sooner it is tried.
RARE = 16, 1000
SAVED = 2.0  # most that is saved for probes, in costs of the best step: after a long quiet time they come singly


@dataclass(frozen=True)
class Choice:
    """A step's shape, by its index, for these requests, and what it is thought to bring.

    requests, kinds [bs]: their numbers and kinds; drafting [bs] bool: those that may accept drafts. sort: of the batch,
    by what a step of it costs. tokens: emitted by the whole batch.
    """

    shape: int
    requests: np.ndarray
    kinds: np.ndarray
    drafting: np.ndarray
    sort: int
    tokens: float


class Budget:
    """Chooses shapes by what steps were seen to cost and to bring."""

    def __init__(self, shapes: Sequence[Shape], requests: int) -> None:
        """shapes: ascending by nodes; the smallest may be taken by any batch. requests: as in `Gain`."""
        self.shapes = shapes
        self.cost, self.gain = Cost(shapes, requests), Gain(shapes, requests)
        self._saved = 0.0
        self._unseen = np.zeros(len(shapes))  # steps since each shape was last taken
        self._most = np.array([shape.most for shape in shapes])
        self._places = np.arange(len(shapes))

    def choose(self, requests: np.ndarray, kinds: np.ndarray, drafting: np.ndarray, sort: int = 0) -> Choice:
        """The next step's shape; arguments as in `Choice`."""
        bs = len(requests)
        tokens = bs + self.gain.expected(requests[drafting]).sum(0)
        if len(self.shapes) == 1:
            return Choice(0, requests, kinds, drafting, sort, float(tokens[0]))
        allowed = bs <= self._most
        seconds = self.cost.seconds(bs, sort, self.cost.checks(requests))
        rates = np.where(allowed, tokens / seconds, -np.inf)
        shape = int(rates.argmax())
        self._saved = min(self._saved + PROBES * seconds[shape], SAVED * seconds[shape])
        if drafting.any():
            guessed = self.cost.guessed(bs, sort)
            lost = seconds * (1 - rates / rates[shape])
            known = (self._places < shape) & ~guessed
            pause = np.where(known, np.clip(RARE[1] * lost / seconds[shape], *RARE), RARE[0])
            due = allowed & (self._unseen >= pause)
            shape = self._probe(shape, due, guessed, lost, seconds[shape])
        self._unseen += 1
        self._unseen[shape] = 0
        return Choice(shape, requests, kinds, drafting, sort, float(tokens[shape]))

    def _probe(self, best: int, due: np.ndarray, guessed: np.ndarray, lost: np.ndarray, seconds: float) -> int:
        """Another shape, of those that were long not seen, where what was saved pays for the seconds that it loses.
        Nothing else is paid for while the cost of one is a guess: that one may be the dearest, and the best.

        seconds: of a step of the best.
        """
        first = due & guessed & (lost <= SAVED * seconds)
        due = (first if first.any() else due) & (lost <= self._saved)
        if not due.any():
            return best
        shape = int(np.where(due, self._unseen, -1).argmax())
        self._saved -= lost[shape]
        return shape

    def took(self, choice: Choice, seconds: float, checks: float) -> None:
        """How long a step was, the host's checks in it included; where there is one shape, that decides nothing."""
        if len(self.shapes) > 1:
            self.cost.took(len(choice.requests), choice.shape, seconds, choice.sort, checks)

    def learn(self, choice: Choice, nodes: np.ndarray | None, lens: np.ndarray) -> None:
        """What a step's requests accepted: nodes, lens as in `Gain.accepted`; a request that had ended has lens 0.
        Of the smallest shape nodes may be None.
        """
        there = choice.drafting & (lens > 0)
        if choice.shape == 0 or nodes is None:
            self.gain.rest(choice.requests[there])
            return
        self.gain.learn(choice.requests[there], choice.kinds[there], choice.shape, nodes[there], lens[there])
