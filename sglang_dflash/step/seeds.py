"""A seed for every request, so that what it samples is its own, in any batch and under any draft."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.runtime_context import get_device


def give_seeds(original: Callable[..., Any], cls: Any, batch: Any, vocab_size: int) -> Any:
    """Around SGLang's gathering of a batch's settings: a seed for every request, the user's or one drawn for it.

    SGLang has them in its deterministic mode alone. A seed once drawn stays the request's own, so what a retracted
    request samples again is the same.
    """
    info = original(cls, batch, vocab_size)
    for req in batch.reqs:
        if req.sampling_params.sampling_seed is None:
            req.sampling_params.sampling_seed = _server_seeds().getrandbits(63)
    temperatures = info.temperatures
    seeds = torch.tensor([req.sampling_params.sampling_seed for req in batch.reqs], pin_memory=temperatures.is_cuda)
    info.sampling_seed = seeds.to(temperatures.device, non_blocking=True)
    return info


@functools.cache
def _server_seeds() -> random.Random:
    """The stream that the server's --random-seed begins."""
    return random.Random(get_device().random_seed)


async def seed_each_sample(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around the sending of a request to the scheduler: of n samples the second gets the seed after the user's, and so
    on. SGLang sends them all with one object of settings.
    """
    params = request.sampling_params
    if getattr(params, "n", 1) == 1 or params.sampling_seed is None or params.max_new_tokens == 0:
        return await original(manager, request)  # no tokens: what SGLang prefills for the samples to come
    request.sampling_params = copy.copy(params)
    params.sampling_seed = (params.sampling_seed + 1 + 2**63) % 2**64 - 2**63
    return await original(manager, request)
