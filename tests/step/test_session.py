"""What a streaming session keeps, on SGLang's own session over a fake cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT, ReqKvInfo
from sglang.srt.session.streaming_session import SessionSlot, StreamingSession

from sglang_dflash.step.session import keep_what_is_written

PROMPT, RESERVED = 10, 64


class FakeReq(SimpleNamespace):
    def detach_kv(self) -> None:
        self.kv = ReqKvInfo()


def finish(outputs: int, written: int, finished_len: int, reason: Any = None) -> tuple[bool, SessionSlot, list]:
    """A turn of 10 prompt tokens ends after so many outputs, with so many rows written and 64 allocated."""
    freed: list[tuple[int, int]] = []
    cache = SimpleNamespace(page_size=1, free_kv_row=lambda kv, spans: freed.extend(spans))
    sessions = StreamingSession(cache)
    slot = SessionSlot(kv=ReqKvInfo(kv_committed_len=written, kv_allocated_len=RESERVED))
    sessions.slots["s"] = slot
    session = SimpleNamespace(
        session_id="s", streaming=True, finish_req=lambda req: None, abort_req=lambda: None
    )
    req = FakeReq(
        session=session,
        kv=slot.kv,
        finished_reason=reason,
        finished_len=finished_len,
        origin_input_ids=[0] * PROMPT,
        output_ids=[0] * outputs,
        release_mm_inputs_on_abort=lambda: None,
        rid="r",
        lock=None,
    )
    return keep_what_is_written(StreamingSession.try_cache_finished_req, sessions, req), slot, freed


def test_the_bonus_token_is_not_kept() -> None:
    """14 tokens emitted, of which the last was never read: its slot is there, its key and value are not."""
    kept, slot, freed = finish(outputs=14, written=PROMPT + 13, finished_len=14)
    assert kept
    assert slot.kv.kv_committed_len == PROMPT + 13
    assert freed == [(PROMPT + 14, RESERVED)]
    assert slot.kv.kv_allocated_len == PROMPT + 14  # the slot of the token read again is freed by the next turn


@pytest.mark.parametrize("finished_len", [1, 9, 13])
def test_a_turn_that_ends_within_a_step_keeps_all_it_emitted(finished_len: int) -> None:
    _, slot, _ = finish(outputs=14, written=PROMPT + 13, finished_len=finished_len)
    assert slot.kv.kv_committed_len == PROMPT + finished_len


def test_an_aborted_turn_keeps_nothing() -> None:
    kept, slot, _ = finish(outputs=14, written=PROMPT + 13, finished_len=14, reason=FINISH_ABORT("gone"))
    assert not kept
    assert slot.kv.kv_committed_len == PROMPT + 13  # as it was: the request releases it
