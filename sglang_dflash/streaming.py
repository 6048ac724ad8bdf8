"""What clients are told of answers under way, and when.

A piece of an answer takes the one thread of SGLang's server process 0.04 to 0.1 ms, and its detokenizer and a client
about as much. At 256 requests and a step every 13 ms that were 20,000 pieces a second, with which they lag behind, and
so does a next request on its way to the scheduler. So there are no more pieces than leave that thread half of its time:
where many answers are under way each has its turn, with all that steps have brought it since the last one.

Those whose answer begins or ends wait for it more: they are told at once, and first. Requests that give a
`stream_interval` have it as SGLang does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

A_SECOND = 5000  # pieces of answers in their midst, at most


class Teller:
    """Whom a step's results are told."""

    def __init__(self) -> None:
        self._before = 0.0  # when turns were given last, in seconds

    def tell(self, original: Callable[..., None], streamer: Any, reqs: Sequence[Any], *args: Any, **how: Any) -> None:
        """Around the scheduler's telling of a batch's requests: clients are told in the order in which these are."""
        told: list[Any] = []
        midst: list[Any] = []
        for req in reqs:
            streams = req.stream and req.sampling_params.stream_interval is None
            (midst if streams and req.send_token_offset and not req.finished() else told).append(req)
        if midst:
            told += self._whose_turn_it_is(midst, time.monotonic())
        original(streamer, told, *args, **how)

    def _whose_turn_it_is(self, midst: Sequence[Any], now: float) -> list[Any]:
        """Each has one in the time that so many pieces may take, and when in it goes by its name: not all at once."""
        turns_a_second = A_SECOND / len(midst)
        before, after = self._before * turns_a_second, now * turns_a_second
        self._before = now
        return [req for req in midst if _turns(req, after) > _turns(req, before)]


def _turns(req: Any, of_each: float) -> int:
    """How many turns a request has had where each has had so many, give or take one."""
    return int(of_each + crc32(req.rid.encode()) / 2**32)
