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
        self._unseen = [0] * len(shapes)  # steps since each shape was last taken
        # Requests of the last batch, and what a step of each shape was thought to bring and to take.
        self._last: tuple[int, list[float], list[float]] = 0, [], []

    def choose(
        self,
        requests: np.ndarray,
        kinds: np.ndarray,
        drafting: np.ndarray,
        sort: int = 0,
        fits: Sequence[bool] | None = None,
    ) -> Choice:
        """The next step's shape; arguments as in `Choice`. fits: which shapes this step may have, one at least; None:
        those that have room for all requests.
        """
        bs = len(requests)
        fits = fits or [bs <= shape.most for shape in self.shapes]
        tokens = (bs + self.gain.expected(requests[drafting]).sum(0)).tolist()
        shape = 0
        if len(self.shapes) > 1:
            seconds = self.cost.seconds(bs, sort, self.cost.checks(requests)).tolist()
            self._last = bs, tokens, seconds
            rates = [made / took if fit else 0.0 for made, took, fit in zip(tokens, seconds, fits, strict=True)]
            shape = self._best_or_probe(bs, sort, rates, seconds, bool(drafting.any()))
        return Choice(shape, requests, kinds, drafting, sort, tokens[shape])

    def reads_beside(self, fits: Sequence[bool]) -> bool:
        """Whether prompts should be read in the next step's pass, of a shape that fits, beside a batch like the last
        one; or in a pass of their own before it, which takes at least what one of a lone root does: weights are read.

        What their tokens take beyond that is the same in both.
        """
        bs, tokens, seconds = self._last
        if not tokens:
            return len(fits) == 1 and fits[0]
        own = float(self.cost.seconds(1)[0])
        steps = [*zip(self.shapes, fits, tokens, seconds, strict=True)]
        beside = max(made / took if fit else 0.0 for _, fit, made, took in steps)
        return beside >= max(made / (took + own) for shape, _, made, took in steps if bs <= shape.most)

    def _best_or_probe(self, bs: int, sort: int, rates: list[float], seconds: list[float], drafts: bool) -> int:
        """In plain numbers: with arrays of so few shapes it takes twice as long, and a step waits for it."""
        best = rates.index(max(rates))
        self._saved = min(self._saved + PROBES * seconds[best], SAVED * seconds[best])
        shape = self._probe(best, rates, seconds, self.cost.guessed(bs, sort)) if drafts else best
        self._unseen = [steps + 1 for steps in self._unseen]
        self._unseen[shape] = 0
        return shape

    def _probe(self, best: int, rates: list[float], seconds: list[float], guessed: np.ndarray) -> int:
        """Another shape, of those that were long not seen, where what was saved pays for the seconds that it loses.
        While the cost of one is a guess nothing else is paid for, but what loses no more than a step saves: that one
        may be the dearest, and the best.
        """
        lost = [took * (1 - rate / rates[best]) for took, rate in zip(seconds, rates, strict=True)]

        def pause(shape: int) -> float:
            known = shape < best and not guessed[shape]
            return min(max(RARE[1] * lost[shape] / seconds[best], RARE[0]), RARE[1]) if known else RARE[0]

        due = [i for i, steps in enumerate(self._unseen) if rates[i] > 0 and steps >= pause(i)]
        if any(guessed[i] and lost[i] <= SAVED * seconds[best] for i in due):
            due = [i for i in due if guessed[i] or lost[i] <= PROBES * seconds[best]]
        paid = [i for i in due if lost[i] <= self._saved]
        if not paid:
            return best
        shape = max(paid, key=self._unseen.__getitem__)
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
