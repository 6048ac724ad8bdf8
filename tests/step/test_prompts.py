"""Prompts that join running requests: who may, and what a pass reads of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_dflash.step.prompts import Prompt, Prompts, PromptWindows

W = 4


def request(number: int, **other: Any) -> Any:
    plain = dict.fromkeys(
        ("multimodal_inputs", "session", "beam_group", "token_indices_to_pool", "discard_output_reason")
    )
    params = SimpleNamespace(max_new_tokens=other.pop("max_new_tokens", 9))
    kv = SimpleNamespace(req_pool_idx=number, kv_committed_len=0)
    return Req(sampling_params=params, kv=kv, **{**plain, "inflight_middle_chunks": 0, **other})


class Req(SimpleNamespace):
    """SGLang's are told apart by identity."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def prefill(reqs: list[Any], prefixes: list[int], lens: list[int], **other: Any) -> Any:
    """A batch as SGLang prepares it: request i's tokens are 100 * i and on."""
    for req, prefix, length in zip(reqs, prefixes, lens, strict=True):
        req.kv.kv_committed_len = prefix + length
    ids = [100 * i + np.arange(prefix, prefix + n) for i, (prefix, n) in enumerate(zip(prefixes, lens, strict=True))]
    seq_lens = torch.tensor(prefixes) + torch.tensor(lens)
    numbers = torch.tensor([req.kv.req_pool_idx for req in reqs])
    given: dict[str, Any] = {
        "reqs": reqs, "prefix_lens": prefixes, "extend_lens": lens, "seq_lens": seq_lens, "seq_lens_cpu": seq_lens,
        "prefill_input_ids_cpu": torch.from_numpy(np.concatenate(ids)), "req_pool_indices": numbers,
        "req_pool_indices_cpu": numbers, "return_logprob": False, "has_grammar": False, "hicache_consumer_index": -1,
        "device": "cpu",
    }  # fmt: skip
    nothing = dict.fromkeys(("chunked_req", "decoding_reqs", "input_embeds", "replace_embeds"))
    return SimpleNamespace(**{**nothing, **given, **other})


class Running(SimpleNamespace):
    def is_empty(self) -> bool:
        return not self.reqs

    def merge_batch(self, new: Any) -> None:
        self.reqs, self.merged = self.reqs + new.reqs, new


@pytest.fixture
def running() -> Running:
    return Running(reqs=[request(1)])


class Planner:
    def __init__(self, room: int = 99) -> None:
        self.room = room

    def has_room(self, requests: int, lengths: list[int]) -> bool:
        return requests + sum(lengths) <= self.room


def join(prompts: Prompts, new: Any, running: Running) -> bool:
    return prompts.join(new, running, None, None)


def test_what_joins_is_a_request_whose_last_prompt_token_is_its_bonus_token(running: Running) -> None:
    prompts = Prompts(Planner(), True)  # type: ignore[arg-type]
    first, second = request(5), request(6)
    assert join(prompts, prefill([first, second], [3, 7], [4, 1]), running)
    assert running.reqs[1:] == [first, second]
    assert running.merged.spec_info.bonus_tokens.tolist() == [6, 107]
    assert running.merged.seq_lens.tolist() == running.merged.spec_info.new_seq_lens.tolist() == [6, 7]
    assert [req.kv.kv_committed_len for req in (first, second)] == [6, 7]
    taken = prompts.take(running.reqs)
    assert [(req, p.begin, p.tokens.tolist()) for req, p in taken.items()] == [(first, 3, [3, 4, 5]), (second, 7, [])]
    assert prompts.take(running.reqs) == {}


@pytest.mark.parametrize(
    "other",
    [
        {"session": "s"},
        {"multimodal_inputs": "i"},
        {"beam_group": "b"},
        {"max_new_tokens": 0},
        {"inflight_middle_chunks": 1},  # else one that asks for one token was lost, when the chunk's result came
    ],
    ids=lambda x: next(iter(x)),
)
def test_another_kind_of_request_has_a_pass_of_its_own(running: Running, other: Any) -> None:
    prompts = Prompts(Planner(), True)  # type: ignore[arg-type]
    new = prefill([request(5), request(6, **other)], [0, 0], [4, 4])
    assert not join(prompts, new, running)
    assert len(running.reqs) == 1 and new.seq_lens.tolist() == [4, 4] and prompts.take(new.reqs) == {}


@pytest.mark.parametrize(
    "other",
    [
        {"chunked_req": "r"},
        {"decoding_reqs": ["r"]},
        {"return_logprob": True},
        {"has_grammar": True},
        {"hicache_consumer_index": 0},
    ],
)
def test_another_kind_of_batch_has_a_pass_of_its_own(running: Running, other: Any) -> None:
    prompts = Prompts(Planner(), True)  # type: ignore[arg-type]
    assert not join(prompts, prefill([request(5)], [0], [4], **other), running)


def test_nobody_joins_an_empty_batch_or_where_no_pass_can_read_it(running: Running) -> None:
    new = prefill([request(5)], [0], [4])
    assert not join(Prompts(Planner(), True), new, Running(reqs=[]))  # type: ignore[arg-type]
    assert not join(Prompts(Planner(), False), new, running)  # type: ignore[arg-type]
    prompts = Prompts(Planner(room=5), True)  # type: ignore[arg-type]
    assert join(prompts, new, running)
    assert not join(prompts, prefill([request(6)], [0], [1]), running)  # what waits to be read counts
    prompts.leave(new.reqs)  # it was retracted, and prefilled
    running.reqs = running.reqs[:1]
    assert join(prompts, prefill([request(6)], [0], [4]), running)


def test_windows_of_a_prompt_are_chains_behind_one_another() -> None:
    table = torch.arange(80, dtype=torch.int32).view(8, 10) + 1000
    prompts = {request(5): Prompt(2, np.arange(6) + 50), request(7): Prompt(0, np.array([9], dtype=np.int64))}
    read = PromptWindows.of(prompts, W, 1, table)
    assert read is not None
    assert read.tokens.tolist() == [[50, 51, 52, 53], [54, 55, 0, 0], [9, 0, 0, 0]]
    assert read.positions.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [0, 1, 2, 3]]
    assert read.slots.tolist() == [[1052, 1053, 1054, 1055], [1056, 1057, 0, 0], [1070, 0, 0, 0]]
    assert (read.requests.tolist(), read.prefix_lens.tolist()) == ([5, 5, 7], [2, 6, 0])
    assert read.host_lens.tolist() == [6, 10, 4]
    assert read.rows[2].equal(torch.ones(3, W, W, dtype=torch.bool).tril())


def test_few_windows_are_filled_up_with_some_of_nobody() -> None:
    table = torch.ones(8, 10, dtype=torch.int32)
    read = PromptWindows.of({request(5): Prompt(0, np.arange(4))}, W, 6, table)
    assert read is not None and len(read.requests) == 6
    assert read.requests[1:].sum() == read.slots[1:].sum() == read.prefix_lens[1:].sum() == 0
    assert PromptWindows.of({request(5): Prompt(3, np.arange(0))}, W, 2, table) is None
