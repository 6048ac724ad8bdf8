"""Whether prompts wait a step or two for others, to be read in one pass with them.

A pass reads all weights for however few tokens, so that two short prompts take less time in one pass than in two, and
decoding requests wait for either. A prompt that waits leaves its place in the batch empty meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

STEPS = 2  # that a prompt waits at most; more of them gain little, and whoever asks waits as well
RECENT = 16  # prompts that tell how often they come
RATE = 0.1  # of a new pass in how long prompts are


class Gather:
    """Says when a pass over prompts begins: by the economic order quantity (Harris, 1913).

    Prompts come every t seconds, n requests decode, and a pass fewer saves s seconds. While m prompts wait for the next
    one they lose m t / n seconds of the batch's work, so that passes over m + 1 are better than those over m as long as
    m (m + 1) <= 2 s n / t.
    """

    def __init__(self) -> None:
        self._sizes = self._seconds = np.zeros(0)  # of passes, in tokens
        self._came: deque[float] = deque(maxlen=RECENT)
        self._usual = 0.0  # tokens of a prompt
        self._there = 0  # prompts that were left waiting
        self._waited = 0  # steps

    def expect(self, passes: Mapping[int, Mapping[int, float]]) -> None:
        """Seconds of passes by width, then by requests, measured before serving. Without them no prompt waits."""
        by_tokens: dict[int, float] = {}
        for width, by_requests in passes.items():
            for requests, seconds in by_requests.items():
                by_tokens[width * requests] = min(seconds, by_tokens.get(width * requests, seconds))
        self._sizes = np.array(sorted(by_tokens))
        self._seconds = np.maximum.accumulate([by_tokens[size] for size in self._sizes])

    def waits(self, now: float, running: int, there: int) -> bool:
        """Whether prompts that could be read now wait through a step. now: seconds; running: requests that decode;
        there: prompts, of which there are places for all.
        """
        self._came.extend([now] * (there - self._there))
        self._there = there
        if not there:
            self._waited = 0
        if not (there and running) or self._waited == STEPS:
            return False
        waits = there * (there + 1) <= 2 * self._saved() * running * self._rate(now)
        self._waited += waits
        return waits

    def read(self, prompts: int, tokens: int) -> None:
        """A pass over so many prompts, of so many tokens in all, has begun."""
        self._there = max(0, self._there - prompts)
        self._waited = 0
        each = tokens / prompts
        self._usual += (RATE if self._usual else 1) * (each - self._usual)

    def _rate(self, now: float) -> float:
        """Prompts a second, lately."""
        seconds = now - self._came[0]
        return len(self._came) / seconds if seconds > 0 else 0.0

    def _saved(self) -> float:
        """Seconds by which two passes over a usual prompt are longer than one over two."""
        if not (len(self._sizes) and self._usual):
            return 0.0
        one, two = (self._pass(tokens) for tokens in (self._usual, 2 * self._usual))
        return max(0.0, 2 * one - two)

    def _pass(self, tokens: float) -> float:
        beyond = max(1.0, tokens / self._sizes[-1])  # in proportion, where larger passes are not known
        return float(np.interp(tokens, self._sizes, self._seconds)) * beyond
