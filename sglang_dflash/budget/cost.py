"""What a step costs: seconds by batch size and shape, expected at first, learned from the steps that are taken."""

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


class Cost:
    """Seconds of a step, by requests and shape.

    Where passes were measured before serving, steps correct that slowly: a hiccup is no cost. Elsewhere what is
    expected only says how costs may compare, and the first step of each shape and size is believed at once.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        tokens = SIZES[:, None] * np.array([[s.verified, s.block if s.nodes else 0] for s in shapes])[:, None]
        passes = 1 + PER_TOKEN * tokens
        self._expected = passes[..., 0] + DRAFT * np.where(tokens[..., 1] > 0, passes[..., 1], 0)  # [shapes, sizes]
        self._factor = np.full(self._expected.shape, np.nan)  # measured over expected, once there is one
        self._measured = False  # whether what is expected was

    def expect(self, shape: int, requests: np.ndarray, seconds: np.ndarray) -> None:
        """Take what a shape's passes took before serving: seconds [sizes] by requests [sizes], ascending."""
        beyond = np.maximum(SIZES / requests[-1], 1)  # in proportion, where larger batches are not known
        self._expected[shape] = np.interp(SIZES, requests, seconds) * beyond
        self._measured = True

    def took(self, requests: int, shape: int, seconds: float) -> None:
        """Learn from a step of so many requests."""
        at = self._nearest(requests)
        if not self._measured and np.isnan(self._factor[shape, at]):
            self._factor[shape, at] = seconds / np.interp(requests, SIZES, self._expected[shape])
            return
        believed = self._believed(at)[shape]  # at first, what is known of shapes and sizes nearby
        surprise = np.log(seconds / (believed * np.interp(requests, SIZES, self._expected[shape])))
        self._factor[shape, at] = believed * np.exp(RATE * np.clip(surprise, -SURPRISE, SURPRISE))

    def seconds(self, requests: int) -> np.ndarray:
        """What a step of so many requests is thought to take, [shapes] float64."""
        factors = self._believed(self._nearest(requests))
        return np.array([np.interp(requests, SIZES, row) for row in self._expected]) * factors

    def guessed(self, requests: int) -> np.ndarray:
        """Shapes [shapes] bool of which no such step was ever timed: what is believed of them comes from others."""
        return np.isnan(self._factor[:, self._nearest(requests)]) & (not self._measured)

    def _believed(self, at: int) -> np.ndarray:
        """Factors of all shapes at a size: each its own, else that of the nearest shape, else of the nearest size."""
        measured = ~np.isnan(self._factor)
        if not measured.any():
            return np.ones(len(self._expected))
        sizes = np.flatnonzero(measured.any(0))
        column = self._factor[:, sizes[np.abs(sizes - at).argmin()]]
        known = np.flatnonzero(~np.isnan(column))
        nearest = np.abs(np.arange(len(column))[:, None] - known).argmin(1)
        return column[known[nearest]]

    def _nearest(self, requests: int) -> int:
        return int(np.abs(np.log2(SIZES) - np.log2(requests)).argmin())
