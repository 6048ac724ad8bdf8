"""What a streaming session keeps of a turn: the tokens whose keys and values are written, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def keep_what_is_written(original: Callable[[Any, Any], bool], sessions: Any, req: Any) -> bool:
    """Around SGLang's `StreamingSession.try_cache_finished_req`: of a finished turn, count only written rows as kept.

    SGLang counts the last emitted token too, as far as a slot is allocated for it. Plain decoding allocates none before
    it reads the token; here slots of a whole window are, and who reads the bonus token is the next step, if there is
    one. The next turn reads the token again.
    """
    written = req.kv.kv_committed_len
    slot = sessions.borrowed_slot(req)
    kept = original(sessions, req)
    if kept:
        slot.kv.kv_committed_len = min(slot.kv.kv_committed_len, written)
    return kept
