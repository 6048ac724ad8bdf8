"""A run ends where plain decoding would have ended it, with SGLang's own requests and finish rules."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from transformers import PreTrainedTokenizerBase

from sglang_dflash import embedded
from sglang_dflash.step.results import StepResult, count_live, emitted, keep, settle_runs

TEXT = "Take 3 apples a day.\nThen add: 4 + 5 = 9.\n\nAnd stop, please; or go on (as you like)."

PROCESSOR = object.__new__(SchedulerBatchResultProcessor)  # what is asked of it here needs no state


@pytest.fixture(scope="module")
def tokenizer(pair: embedded.Pair) -> PreTrainedTokenizerBase:
    return get_tokenizer(str(pair.target))


def request(tokenizer: Any, **params: Any) -> Req:
    sampling = SamplingParams(**{"max_new_tokens": 100, **params})
    sampling.normalize(tokenizer)
    req = Req("r", "", [1, 2], sampling, eos_token_ids={0}, vocab_size=49152)
    req.tokenizer = tokenizer
    return req


def one_by_one(req: Req, ids: list[int]) -> tuple[list[int], Any]:
    """Plain decoding: its tokens and why it ended."""
    for token in ids:
        req.output_ids.append(token)
        req.update_finish_state()
        if req.finished():
            break
    return list(req.output_ids_through_stop), req.finished_reason and req.finished_reason.to_json()


def in_runs(req: Req, ids: list[int], rng: random.Random) -> tuple[list[int], Any]:
    """Speculative decoding, as SGLang reads a run after ours has cut it."""
    at = 0
    while at < len(ids) and not req.finished():
        run = ids[at : at + rng.randint(1, 9)]
        run = run[: emitted(req, run)]
        req.output_ids.extend(run)
        req.update_finish_state(len(run))
        at += len(run)
    return list(req.output_ids), req.finished_reason and req.finished_reason.to_json()


@pytest.mark.parametrize(
    "params",
    [
        {"stop": ["\n"]},
        {"stop": ["9.", " a", "\n"]},
        {"stop": ["please", "add"], "stop_regex": [r"\d \+ \d"]},
        {"stop_regex": [r"stop, \w+;", r"= \d"]},
        {"stop_token_ids": "4"},
        {"stop_token_ids": "9", "stop": [".\n\nAnd", " ="]},
        {"stop_token_ids": "4", "ignore_eos": True},
        {"stop": ["never"]},
    ],
    ids=str,
)
def test_runs_end_where_plain_decoding_ends(tokenizer: PreTrainedTokenizerBase, params: dict[str, Any]) -> None:
    ids = tokenizer.encode(TEXT)
    if digit := params.get("stop_token_ids"):
        params = {**params, "stop_token_ids": [tokenizer.encode(digit)[-1]]}
    for end in (None, 11, 23):
        told = [*ids[:end], *([] if end is None else [0]), *ids[:8]]
        expected = one_by_one(request(tokenizer, **params), told)
        for seed in range(6):
            assert in_runs(request(tokenizer, **params), told, random.Random(seed)) == expected


def test_what_is_behind_an_end_counts_nowhere(tokenizer: PreTrainedTokenizerBase) -> None:
    ended, retracted, stops, goes_on = (request(tokenizer, stop=["\n"]) for _ in range(4))
    ended.output_ids.extend(tokenizer.encode("a\n"))
    ended.update_finish_state(len(ended.output_ids))
    retracted.is_retracted = True
    run = tokenizer.encode("so\nit is")
    batch = SimpleNamespace(reqs=[ended, retracted, stops, goes_on], has_grammar=False)
    result = StepResult(
        next_token_ids=torch.tensor([run] * 3 + [tokenizer.encode("and it is so far")[: len(run)]]).flatten(),
        accept_lens=torch.tensor([4, 4, 4, 3], dtype=torch.int32),
        speculative_output_stride=len(run),
    )

    def original(processor: Any, result: Any, batch: Any) -> list[list[int]]:
        result.num_correct_drafts = int((result.accept_lens - 1).sum())  # as SGLang adds them up
        return [run[:length] for length in result.accept_lens.tolist()]

    counted: list[list[int]] = []
    result.learn = lambda nodes, lens, reqs: counted.extend([lens.tolist(), [len(req.output_ids) for req in reqs]])
    assert settle_runs(original, PROCESSOR, result, batch) == [[], [], run[:2], run[:3]]
    assert counted == [[0, 0, 2, 3], [len(ended.output_ids), 0, 0, 0]]
    assert (result.num_correct_drafts, result.get_num_generated_tokens(4)) == (3, 5)
    told: list[Any] = []
    count_live(lambda *args, **more: told.append((*args, more)), None, 4, 3, num_accept_tokens=5, num_cap_tokens=0)
    assert told == [(None, 2, 3, 5, {"num_cap_tokens": 0})]


@pytest.mark.parametrize("params", [{}, {"stop": [": 4", "pples"]}, {"stop_token_ids": "2"}], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_under_a_grammar_ends_where_plain_decoding_ends(
    tokenizer: PreTrainedTokenizerBase, params: dict[str, Any], overlap: bool
) -> None:
    """Under overlap the grammar takes a run before it is settled. Behind the grammar's end there is a draft more."""
    told = [*tokenizer.encode('{"a": 423, "b": "apples"}'), 0, *tokenizer.encode(" and so on")]
    if digit := params.get("stop_token_ids"):
        params = {"stop_token_ids": [tokenizer.encode(digit)[-1]]}
    backend = XGrammarGrammarBackend(tokenizer, vocab_size=49152, model_eos_token_ids=[0])
    properties = {"a": {"type": "integer"}, "b": {"type": "string"}}
    grammar = backend.dispatch_json(json.dumps({"type": "object", "properties": properties, "required": ["a", "b"]}))
    expected = one_by_one(request(tokenizer, **params), told)
    for seed in range(6):
        req, rng, at = request(tokenizer, **params), random.Random(seed), 0
        req.grammar = grammar.copy()
        while not req.finished():
            run = told[at : at + rng.randint(1, 9)]
            batch = SimpleNamespace(reqs=[req], has_grammar=True, forward_mode=ForwardMode.DECODE)
            result = StepResult(
                next_token_ids=torch.tensor([*run, 7]),
                accept_lens=torch.tensor([len(run)], dtype=torch.int32),
                speculative_output_stride=len(run) + 1,
                speculative_num_draft_tokens=len(run) + 1,
            )
            if overlap:
                PROCESSOR.advance_grammar_fsm(result, batch)
            (kept,) = settle_runs(as_sglang_reads, PROCESSOR, result, batch)
            assert len(kept) == int(result.accept_lens)
            req.output_ids.extend(kept)
            req.update_finish_state(len(kept))
            at += len(kept)
        assert (list(req.output_ids), req.finished_reason.to_json()) == expected


def test_a_step_whose_grammar_breaks_counts_and_keeps_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    req = request(tokenizer)
    req.grammar = XGrammarGrammarBackend(tokenizer, vocab_size=49152).dispatch_regex("[0-9]+").copy()
    batch = SimpleNamespace(reqs=[req], has_grammar=True, forward_mode=ForwardMode.DECODE)
    result = StepResult(
        next_token_ids=torch.tensor(tokenizer.encode("no number")),
        accept_lens=torch.tensor([2], dtype=torch.int32),
        speculative_output_stride=2,
        speculative_num_draft_tokens=2,
    )
    assert settle_runs(as_sglang_reads, PROCESSOR, result, batch) == [[]]
    assert result.accept_lens.tolist() == [1] and req.to_finish is not None


def test_prompts_that_a_step_has_read_are_told_as_those_of_a_pass_of_their_own(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Of a first token alone no step is counted."""
    kept: list[tuple[Any, int]] = []
    cache = SimpleNamespace(checkpoint=lambda req, up_to: kept.append((req, up_to)))
    reqs = [request(tokenizer) for _ in range(4)]
    first, lucky, ended, retracted = reqs
    lens = dict(zip(reqs, [1, 2, 0, 0], strict=True))
    for req in reqs:
        req.extend_end, req.prefix_len, req.spec_verify_ct, req.spec_correct_drafts_histogram = 2, 0, 1, [1]
    ended.finished_reason, retracted.is_retracted = object(), True
    keep(reqs, lens, cache)
    assert kept == [(first, 2), (lucky, 2)]
    assert [req.spec_verify_ct for req in reqs] == [0, 1, 1, 1]
    assert [req.spec_correct_drafts_histogram for req in reqs] == [[0], [1], [1], [1]]
    assert [req.time_stats.prefill_finished_time > 0 for req in reqs] == [True, True, False, False]


def as_sglang_reads(processor: Any, result: Any, batch: Any) -> list[list[int]]:
    result.num_correct_drafts = int((result.accept_lens - 1).sum())
    return list(result.grammar_retained_tokens)
