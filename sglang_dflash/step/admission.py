"""Who is admitted and when: requests that a tree's step cannot serve are refused before they are queued, and prompts
wait for others where a pass over several saves more than that costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_batch import NextBatchPlan


def refusal(original: Callable[[Any, bool], str | None], req: Any, enable_overlap: bool) -> str | None:
    """Why a request is not served, or None; around SGLang's `validate_dflash_request`, which allows these.

    The client gets it as HTTP 400.
    """
    for asked in ("return_hidden_states", "return_sampling_mask"):
        if value := getattr(req, asked):
            return (
                f"{asked} is {value!r}, which DFLASH cannot give of the tokens it drafts: leave it out, or ask a "
                "server without --speculative-algorithm"
            )
    seed = req.sampling_params.sampling_seed
    if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**63):
        req.sampling_params.sampling_seed = None  # SGLang batches it all the same, to answer it
        return f"the seed is {seed!r}: give a whole number from -2**63 to 2**63 - 1, or none"
    return original(req, enable_overlap)


def gather(original: Callable[[Any, Any], Any], scheduler: Any, running_batch: Any) -> Any:
    """Around SGLang's choice of prompts to read before the next step: none of them while it pays to wait for more.

    Ranks would not agree, as clocks decide; a prompt of which a part is read goes on; and where prompts share a step's
    pass, there is none to save.
    """
    if scheduler.tp_size > 1 or scheduler.chunked_req is not None or scheduler.is_mixed_chunk:
        return original(scheduler, running_batch)
    running = len(running_batch.reqs)
    places = scheduler.get_num_allocatable_reqs(running, running_batch=running_batch)
    there = max(0, min(len(scheduler.waiting_queue), places))
    if scheduler.draft_worker.planner.gather.waits(time.perf_counter(), running, there):
        return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
    return original(scheduler, running_batch)
