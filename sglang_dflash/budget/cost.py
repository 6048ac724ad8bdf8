"""What a step costs: seconds by batch size and shape, expected at first, learned from the steps that are taken.

Batches are of several sorts (plain ones; some with grammars, with penalties): what else the host does for them is in
the times of their own steps. And grammars differ a thousandfold in what a mask costs: so the host's time for those that
wait for a pass is measured where they are made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_dflash.budget.shape import Shape

SIZES = 1 << np.arange(13)  # batch sizes that are told apart; between two, costs are interpolated
RATE = 0.1  # of a new measurement in what is believed
SURPRISE = 0.7  # most that one measurement counts, in natural logarithms: a hiccup is no cost
# Where nothing was measured before serving: a token's share of what a pass costs however few it reads, and a draft
# pass's of the target's. So on a CPU, about: a GPU measures.
PER_TOKEN, DRAFT = 0.03, 0.1
SORTS = 4  # of batches: the first is the plain one
CHECKS = 0.25  # of a step in what a request's grammar is thought to cost


class Cost:
    """Seconds of a step, by requests, shape and sort of batch.

    Where passes were measured before serving, steps correct that slowly: a hiccup is no cost. But none makes a step
    faster, so a shape's first steps that are faster than believed are believed at once. What one takes longer than
    expected, for its contexts or for a host that does not keep up, any other shape is thought to take as well.
    Elsewhere what is expected only says how costs may compare, and the first step of each shape and size is believed at
    once.

    Steps of other sorts correct no plain one's: they have factors of their own, over what a plain step and the host's
    checks of its walks against grammars are thought to take. These go by requests: a walk is short in a large tree too.
    """

    def __init__(self, shapes: Sequence[Shape], requests: int) -> None:
        """requests: their numbers are below this."""
        tokens = SIZES[:, None] * np.array([[s.verified, s.block if s.nodes else 0] for s in shapes])[:, None]
        passes = 1 + PER_TOKEN * tokens
        self._expected = passes[..., 0] + DRAFT * np.where(tokens[..., 1] > 0, passes[..., 1], 0)  # [shapes, sizes]
        self._factors = np.full((SORTS, *self._expected.shape), np.nan)  # measured over expected, once there is one
        self._times = np.zeros(self._factors.shape)  # how often
        self._measured = False  # whether what is expected was
        self._checks = np.zeros(requests)  # seconds a step, by request
        self._usual_checks = np.nan

    def expect(self, shape: int, requests: np.ndarray, seconds: np.ndarray) -> None:
        """Take what a shape's passes took before serving: seconds [sizes] by requests [sizes], ascending."""
        beyond = np.maximum(SIZES / requests[-1], 1)  # in proportion, where larger batches are not known
        self._expected[shape] = np.interp(SIZES, requests, seconds) * beyond
        self._measured = True

    def begin(self, requests: np.ndarray, checked: np.ndarray) -> None:
        """New requests under these numbers; checked [requests] bool: those that have a grammar."""
        self._checks[requests] = np.where(checked, np.nan_to_num(self._usual_checks), 0)

    def checks_took(self, requests: np.ndarray, seconds: float) -> None:
        """Learn from the checks of a step, of these requests."""
        each = seconds / len(requests)
        if np.isnan(self._usual_checks):
            self._checks[requests] = self._usual_checks = each
        self._checks[requests] += CHECKS * (each - self._checks[requests])
        self._usual_checks += CHECKS * (each - self._usual_checks)

    def took(self, requests: int, shape: int, seconds: float, sort: int = 0, checks: float = 0.0) -> None:
        """Learn from a step of so many requests, of whose time the host's checks took so many seconds."""
        at = self._nearest(requests)
        if not self._measured and np.isnan(self._factors[0]).all():
            sort, seconds = 0, max(seconds - checks, seconds / 2)  # any step tells the scale of all
        expected = self._without_factor(requests, sort, checks)
        own = self._factors[sort]
        if not self._measured and np.isnan(self._factors[[0, sort], shape, at]).all():
            own[shape, at] = seconds / expected[shape]
            return
        believed = self._believed(expected, sort, at)[shape]  # at first, by what is known of shapes and sizes nearby
        surprise, times = np.log(seconds / believed), self._times[sort]
        rate = max(RATE, 1 / (1 + times[shape, at])) if surprise < 0 and self._measured else RATE
        times[shape, at] += 1
        own[shape, at] = believed / expected[shape] * np.exp(rate * min(surprise, SURPRISE))

    def seconds(self, requests: int, sort: int = 0, checks: float = 0.0) -> np.ndarray:
        """What a step of so many requests is thought to take, [shapes] float64; checks: seconds of it."""
        return self._believed(self._without_factor(requests, sort, checks), sort, self._nearest(requests))

    def checks(self, requests: np.ndarray) -> float:
        """Seconds that checks of these requests are thought to take."""
        return float(self._checks[requests].sum())

    def guessed(self, requests: int, sort: int = 0) -> np.ndarray:
        """Shapes [shapes] bool of which no such step was ever timed: what is believed of them comes from others."""
        return np.asarray(np.isnan(self._factors[[0, sort], :, self._nearest(requests)]).all(0))

    def _without_factor(self, requests: int, sort: int, checks: float) -> np.ndarray:
        """What the factors of a sort are over, [shapes]."""
        expected = np.array([np.interp(requests, SIZES, row) for row in self._expected])
        return expected if sort == 0 else self._believed(expected, 0, self._nearest(requests)) + checks

    def _believed(self, expected: np.ndarray, sort: int, at: int) -> np.ndarray:
        """Seconds of each shape, expected [shapes] by a sort's factors at a size: its own, else those of the nearest
        shape, else of the nearest size.
        """
        factors = self._factors[sort]
        sizes = np.flatnonzero(~np.isnan(factors).all(0))
        if not len(sizes):
            return expected
        column = factors[:, sizes[np.abs(sizes - at).argmin()]]
        known = np.flatnonzero(~np.isnan(column))
        nearest = known[np.abs(np.arange(len(column))[:, None] - known).argmin(1)]
        factor = column[nearest]
        longer = expected + expected[nearest] * (factor - 1)
        return np.where((factor > 1) & self._measured, longer, expected * factor)

    def _nearest(self, requests: int) -> int:
        return int(np.abs(np.log2(SIZES) - np.log2(requests)).argmin())
