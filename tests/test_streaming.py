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
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import BatchStrOutput, GenerateReqInput, sock_send
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.runtime_context import get_context, get_parallel, get_serving
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
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


def test_answers_that_begin_or_end_are_told_first() -> None:
    """By SGLang's own telling of a batch, whose order is that of what clients are told."""
    told: list[Any] = []
    with get_context().override_server_args() as args, get_parallel().override(dp_rank=None, attn_tp_rank=0):
        streamer = SchedulerOutputStreamer(
            send_to_detokenizer=SimpleNamespace(send_output=told.append), tree_cache=None, server_args=args,
            is_generation=True, spec_algorithm=SpeculativeAlgorithm.DFLASH,
            disaggregation_mode=DisaggregationMode.NULL, enable_hicache_storage=lambda: False,
        )  # fmt: skip
        reqs = [request(name) for name in ("a", "b", "ends", "c", "begins", "begins and ends")]
        for req in reqs:
            req.output_ids.append(7)
        tell = functools.partial(streaming.begun_and_ended_first, SchedulerOutputStreamer.stream_output, streamer)
        tell([*reqs[:4]], False)
        for req in reqs:
            req.output_ids.append(8)
        reqs[2].finished_reason = reqs[5].finished_reason = FINISH_LENGTH(2)
        tell(reqs, False)
        tell(reqs, False)  # of what has ended nothing more
    assert [output.rids for output in told] == [
        ["a", "b", "ends", "c"],
        ["ends", "begins", "begins and ends", "a", "b", "c"],
        ["a", "b", "c", "begins"],
    ]
    assert [list(ids) for ids in told[1].output_ids] == [[8], [7, 8], [7, 8], [8], [8], [8]]


def request(name: str) -> Req:
    params = SamplingParams(max_new_tokens=9)
    params.normalize(None)
    return Req(name, "", array("q", [1, 2]), params, stream=True, vocab_size=100)
