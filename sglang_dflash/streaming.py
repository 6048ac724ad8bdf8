"""What clients are told of answers under way: where telling falls behind, what several steps brought in one piece.

SGLang's server process takes in a step's results and tells each client of them, some 0.1 ms a client: it lags behind
256 requests whose steps take less than 25 ms, and with it whatever else it does, a next request's way to the scheduler
among it. A client is told at once all that has been taken in. But SGLang lets clients be told after every 16th result
(--batch-notify-size) and behind each step's, so that each step is told of by itself however many wait. Where no two
do that is right: clients are told sooner, and ask anew sooner.

Those whose answer begins or ends wait for it more than those in the midst of theirs: a step's results name them first.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from sglang.srt.runtime_context import get_serving

ALL_NOTICES = 1 << 30  # as --batch-notify-size
LONGEST = 0.25  # seconds until clients are told all the same: what comes may take as long to take in as to compute
TURN = 0.001  # seconds, in which whoever can go on does


class Receiver:
    """Where a server process receives what steps brought: while several wait, no client is told of any."""

    def __init__(self) -> None:
        self._turn = time.monotonic()
        self._behind = False

    async def receive(self, original: Callable[..., Any], socket: Any, flags: int = 0) -> Any:
        """Around SGLang's receiving of one step's results."""
        if time.monotonic() - self._turn > LONGEST:
            await asyncio.sleep(TURN)
            self._turn = time.monotonic()
        waited = _some_wait(socket)
        results = await original(_AtOnce(socket), flags)
        self._behind = waited and (self._behind or _some_wait(socket))
        return results

    async def take_in(self, original: Callable[..., Any], manager: Any, results: Any) -> None:
        """Around SGLang's taking in of one step's results."""
        serving = get_serving()
        size = ALL_NOTICES if self._behind else serving.batch_notify_size
        with serving.override(batch_notify_size=size):
            await original(manager, results)


def begun_and_ended_first(
    original: Callable[..., None], streamer: Any, reqs: Sequence[Any], *args: Any, **how: Any
) -> None:
    """Around the scheduler's telling of a batch's requests: clients are told in the order in which these are."""
    original(streamer, sorted(reqs, key=lambda req: not (req.finished() or req.send_token_offset == 0)), *args, **how)


def _some_wait(socket: Any) -> bool:
    return bool(socket.get(zmq.EVENTS) & zmq.POLLIN)


class _AtOnce:
    """A socket whose objects, where some wait, are there at once; pyzmq's come after a turn of the event loop."""

    def __init__(self, socket: Any) -> None:
        self.recv = socket.recv

    async def recv_pyobj(self, flags: int = 0) -> Any:
        return pickle.loads(await self.recv(flags))
