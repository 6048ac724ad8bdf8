"""What a step costs: seconds by batch size and shape, expected at first, learned from the steps that are taken.

Batches are of several sorts (plain ones; some with grammars, with penalties): what else the host does for them is in
the times of their own steps. And grammars differ a thousandfold in what a mask costs: so the host's time for those that
wait for a pass is measured where they are made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from sglang_dflash.budget.shape import Shape

SIZES = 1 << np.arange(13)  # batch sizes that are told apart; between two, costs are interpolated
RATE = 0.1  # of a new measurement in what is believed
FASTER = 0.3  # of one that was faster: a host's hiccups shorten no step
SURPRISE = 0.7  # most that one measurement counts, in natural logarithms: a hiccup is no cost
# Where nothing was measured before serving: a token's share of what a pass costs however few it reads, and a draft
# pass's of the target's. So on a CPU, about: a GPU measures.
PER_TOKEN, DRAFT = 0.03, 0.1
SORTS = 4  # of batches: the first is the plain one
CHECKS = 0.25  # of a step in what a request's grammar is thought to cost


class Cost:
    """Seconds of a step, by requests, shape and sort of batch.

    Steps correct slowly what is believed, as a hiccup is no cost; but none makes a step faster, so one that is faster
    is soon believed. Where passes were measured before serving, what a step takes longer than expected, for its
    contexts or for a host that does not keep up, any other shape is thought to take as well. Elsewhere what is expected
    only says how costs may compare, and the first step of each shape and size is believed at once.

    Steps of other sorts correct no plain one's: they have factors of their own, over what a plain step and the host's
    checks of its walks against grammars are thought to take. These go by requests: a walk is short in a large tree too.
    """

    def __init__(self, shapes: Sequence[Shape], requests: int) -> None:
        """requests: their numbers are below this."""
        tokens = SIZES[:, None] * np.array([[s.verified, s.block if s.nodes else 0] for s in shapes])[:, None]
        passes = 1 + PER_TOKEN * tokens
        self._expected = passes[..., 0] + DRAFT * np.where(tokens[..., 1] > 0, passes[..., 1], 0)  # [shapes, sizes]
        self._factors = np.full((SORTS, *self._expected.shape), np.nan)  # measured over expected, once there is one
        self._measured = False  # whether what is expected was
        self._checks = np.zeros(requests)  # seconds a step, by request
        self._usual_checks = math.nan
        self._forget()

    def expect(self, shape: int, requests: np.ndarray, seconds: np.ndarray) -> None:
        """Take what a shape's passes took before serving: seconds [sizes] by requests [sizes], ascending."""
        beyond = np.maximum(SIZES / requests[-1], 1)  # in proportion, where larger batches are not known
        self._expected[shape] = np.interp(SIZES, requests, seconds) * beyond
        self._measured = True
        self._forget()

    def _forget(self) -> None:
        """What every step asks for and few change: what is expected by requests, and by sort and size where factors are
        known and of which shapes none is.
        """
        self._by_requests: dict[int, np.ndarray] = {}
        self._known: dict[tuple[int, int], tuple[int, np.ndarray] | None] = {}
        self._guessed: dict[tuple[int, int], np.ndarray] = {}

    def begin(self, requests: np.ndarray, checked: np.ndarray) -> None:
        """New requests under these numbers; checked [requests] bool: those that have a grammar."""
        self._checks[requests] = np.where(checked, self._usual_checks, 0) if self._any_checks else 0

    def checks_took(self, requests: np.ndarray, seconds: float) -> None:
        """Learn from the checks of a step, of these requests."""
        each = seconds / len(requests)
        if not self._any_checks:
            self._checks[requests] = self._usual_checks = each
        self._checks[requests] += CHECKS * (each - self._checks[requests])
        self._usual_checks += CHECKS * (each - self._usual_checks)

    def took(self, requests: int, shape: int, seconds: float, sort: int = 0, checks: float = 0.0) -> None:
        """Learn from a step of so many requests, of whose time the host's checks took so many seconds."""
        at = _nearest(requests)
        if not self._measured and np.isnan(self._factors[0]).all():
            sort, seconds = 0, max(seconds - checks, seconds / 2)  # any step tells the scale of all
        expected = self._without_factor(requests, sort, checks)
        own = self._factors[sort]
        first = math.isnan(own[shape, at])
        if not self._measured and np.isnan(self._factors[[0, sort], shape, at]).all():
            own[shape, at] = seconds / expected[shape]
            self._forget()
            return
        believed = self._believed(expected, sort, at)[shape]  # at first, by what is known of shapes and sizes nearby
        surprise = math.log(seconds / believed)
        if first and surprise < 0:  # it takes the place of what was believed
            change = surprise
        else:
            change = (FASTER if surprise < 0 else RATE) * min(max(surprise, -SURPRISE), SURPRISE)
        own[shape, at] = believed / expected[shape] * math.exp(change)
        if first:
            self._forget()

    def seconds(self, requests: int, sort: int = 0, checks: float = 0.0) -> np.ndarray:
        """What a step of so many requests is thought to take, [shapes] float64; checks: seconds of it."""
        return self._believed(self._without_factor(requests, sort, checks), sort, _nearest(requests))

    def checks(self, requests: np.ndarray) -> float:
        """Seconds that checks of these requests are thought to take."""
        return float(self._checks[requests].sum()) if self._any_checks else 0.0

    def guessed(self, requests: int, sort: int = 0) -> np.ndarray:
        """Shapes [shapes] bool of which no such step was ever timed: what is believed of them comes from others."""
        key = sort, _nearest(requests)
        if key not in self._guessed:
            self._guessed[key] = np.asarray(np.isnan(self._factors[[0, sort], :, key[1]]).all(0))
        return self._guessed[key]

    @property
    def _any_checks(self) -> bool:
        return not math.isnan(self._usual_checks)

    def _without_factor(self, requests: int, sort: int, checks: float) -> np.ndarray:
        """What the factors of a sort are over, [shapes]."""
        expected = self._by_requests.get(requests)
        if expected is None:
            expected = np.array([np.interp(requests, SIZES, row) for row in self._expected])
            self._by_requests[requests] = expected
        return expected if sort == 0 else self._believed(expected, 0, _nearest(requests)) + checks

    def _believed(self, expected: np.ndarray, sort: int, at: int) -> np.ndarray:
        """Seconds of each shape, expected [shapes] by a sort's factors at a size: its own, else those of the nearest
        shape, else of the nearest size; no more than a larger shape's, which has all the same to do.
        """
        if (sort, at) not in self._known:
            self._known[sort, at] = self._nearest_known(sort, at)
        known = self._known[sort, at]
        if known is None:
            return expected
        size, nearest = known
        factor = self._factors[sort, nearest, size]
        seconds = expected * factor
        if self._measured:
            seconds = np.where(factor > 1, expected + expected[nearest] * (factor - 1), seconds)
        return np.minimum.accumulate(seconds[::-1])[::-1]

    def _nearest_known(self, sort: int, at: int) -> tuple[int, np.ndarray] | None:
        """The nearest size of which a factor is known, and for each shape the nearest one of which it is there."""
        unknown = np.isnan(self._factors[sort])
        sizes = np.flatnonzero(~unknown.all(0))
        if not len(sizes):
            return None
        size = int(sizes[np.abs(sizes - at).argmin()])
        known = np.flatnonzero(~unknown[:, size])
        return size, known[np.abs(np.arange(len(unknown))[:, None] - known).argmin(1)]


@functools.cache
def _nearest(requests: int) -> int:
    """The place in SIZES of the one nearest to so many requests."""
    return int(np.abs(np.log2(SIZES) - np.log2(requests)).argmin())
