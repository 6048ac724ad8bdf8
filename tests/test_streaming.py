"""SGLang's own loop between its detokenizer and its clients, of results that wait for it."""

from __future__ import annotations

import asyncio
import functools
import inspect
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import BatchStrOutput, GenerateReqInput, sock_send
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.runtime_context import get_context, get_serving
from sglang.srt.utils.watchdog import Watchdog

from sglang_dflash import streaming

CLIENTS, STEPS = 40, 6


class Manager(TokenizerManager):
    """What the loop needs of it."""

    def __init__(self, socket: Any) -> None:
        self.recv_from_detokenizer = socket
        self.soft_watchdog = Watchdog.create("test", None, soft=True)
        self.rid_to_state = {}
        self.enable_metrics = self.enable_lora = self.incremental_streaming_output = False
        self.dump_requests_folder = self.crash_dump_folder = ""
        self.config_value = {"weight_version": "0"}.get
        self.request_logger = SimpleNamespace(log_finished_request=lambda *_, **__: None)
        self.request_metrics_exporter_manager = SimpleNamespace(exporter_enabled=lambda: False)


def results(step: int, last: int) -> BatchStrOutput:
    """A step's: of each client's answer one word more."""
    unasked: dict[str, Any] = dict.fromkeys(field.name for field in msgspec.structs.fields(BatchStrOutput))
    counts = dict.fromkeys(("prompt_tokens", "reasoning_tokens", "cached_tokens", "retraction_counts"), [1] * CLIENTS)
    return BatchStrOutput(**unasked | counts | {
        "rids": [str(i) for i in range(CLIENTS)],
        "output_strs": [f" {step}"] * CLIENTS,
        "output_ids": [array("q", [step])] * CLIENTS,
        "finished_reasons": [{"type": "length", "length": last + 1} if step == last else None] * CLIENTS,
        "completion_tokens": [step + 1] * CLIENTS,
    })  # fmt: skip


@contextmanager
def sockets(path: Path) -> Iterator[tuple[Any, Any]]:
    """Where a server process receives results, and where they are sent."""
    context = zmq.asyncio.Context()
    pull, push = context.socket(zmq.PULL), zmq.Context.instance().socket(zmq.PUSH)
    pull.bind(f"ipc://{path}/results")
    push.connect(f"ipc://{path}/results")
    yield pull, push
    push.close()
    context.destroy()


async def pieces(steps: int, path: Path) -> list[list[str]]:
    """What each client is told, when so many steps' results wait before the first is taken in."""
    with sockets(path) as (pull, push):
        manager = Manager(pull)
        clients = [asyncio.create_task(client(manager, str(i))) for i in range(CLIENTS)]
        await asyncio.sleep(0)
        for step in range(steps):
            sock_send(push, results(step, steps - 1))
        await asyncio.sleep(0.5)  # they have come
        loop = asyncio.create_task(manager.handle_loop())
        told = asyncio.gather(*clients)
        await asyncio.wait([loop, told], return_when=asyncio.FIRST_COMPLETED)
        assert loop.cancel(), loop.result()
    return told.result()


async def client(manager: Manager, rid: str) -> list[str]:
    request = GenerateReqInput(text="x", rid=rid, stream=True)
    state = ReqState([], False, asyncio.Event(), request, time_stats=APIServerReqTimeStats())
    manager.rid_to_state[rid] = state
    return [out["text"] async for out in manager._wait_one_response(request)]


@pytest.fixture(autouse=True)
def sglangs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that ask for DFLASH may have hooked this process."""
    for owner, name in ((tokenizer_manager, "async_sock_recv"), (TokenizerManager, "_handle_batch_output")):
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))


@pytest.fixture
def told_together(monkeypatch: pytest.MonkeyPatch, sglangs_own: None) -> Iterator[None]:
    """As a server with this package is."""
    receiver = streaming.Receiver()
    receive = functools.partial(receiver.receive, tokenizer_manager.async_sock_recv)
    take_in = functools.partialmethod(_take_in, receiver, TokenizerManager._handle_batch_output)
    monkeypatch.setattr(tokenizer_manager, "async_sock_recv", receive)
    monkeypatch.setattr(TokenizerManager, "_handle_batch_output", take_in)
    with get_context().override_server_args():
        yield


async def _take_in(manager: Any, receiver: streaming.Receiver, original: Any, results: Any) -> None:
    await receiver.take_in(original, manager, results)


def test_results_that_wait_are_told_together(told_together: None, tmp_path: Path) -> None:
    whole = "".join(f" {step}" for step in range(STEPS))
    assert asyncio.run(pieces(STEPS, tmp_path)) == [[whole]] * CLIENTS


def test_sglang_tells_them_one_by_one(tmp_path: Path) -> None:
    with get_context().override_server_args():
        told = asyncio.run(pieces(STEPS, tmp_path))
    assert min(map(len, told)) > STEPS / 2


def test_where_no_two_steps_wait_clients_are_told_as_sglang_tells_them(tmp_path: Path) -> None:
    async def sizes() -> list[int]:
        receiver, seen = streaming.Receiver(), []

        async def take_in(manager: Any, taken: Any) -> None:
            seen.append(get_serving().batch_notify_size)

        with sockets(tmp_path) as (pull, push):
            receive = functools.partial(receiver.receive, tokenizer_manager.async_sock_recv, pull)
            for waiting in (2, 0, 1):
                coming = asyncio.create_task(receive())
                await asyncio.sleep(0.1)  # nothing is there yet
                for step in range(1 + waiting):
                    sock_send(push, results(step, STEPS))
                await asyncio.sleep(0.2)  # they have come
                await receiver.take_in(take_in, None, await coming)
                for _ in range(waiting):
                    await receiver.take_in(take_in, None, await receive())
        return seen

    with get_context().override_server_args(batch_notify_size=7):
        together = streaming.ALL_NOTICES
        assert asyncio.run(sizes()) == [7, together, together, 7, 7, 7]
        assert get_serving().batch_notify_size == 7


def test_clients_are_told_while_ever_more_waits(
    told_together: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LONGEST", 0.01)
    told = asyncio.run(pieces(200, tmp_path))
    assert min(map(len, told)) > 2
