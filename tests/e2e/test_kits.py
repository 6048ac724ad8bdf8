"""SGLang's own server test kits, scaled down to a laptop, and sessions compared with single requests."""

from __future__ import annotations

import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import requests
from client import Body, generate
from sglang.test.kits.abort_timeout_kit import AbortAllMixin
from sglang.test.kits.json_constrained_kit import JSONConstrainedMixin
from sglang.test.kits.matched_stop_kit import MatchedStopMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang.test.kits.spec_server_kits import SpecGrammarKit, SpecLogprobKit, SpecPenaltyKit
from sglang.test.kits.streaming_session_kit import StreamingSessionKitMixin
from sglang.test.test_utils import run_logprob_check
from turns import KL, kit_of_cache_hits, kit_of_kl, kit_of_sessions, logprobs

from sglang_dflash import embedded

TURN = 24  # tokens a turn of a session adds


class Kit(unittest.TestCase):
    """The server that kits ask; set before each test, `process` too, whose end would be the server's."""

    model = "smollm2-135m"

    @pytest.fixture(autouse=True)
    def _on(self, default_server: str, tokenizer: Any) -> None:
        self.base_url, self.tokenizer = default_server, tokenizer
        self.process = SimpleNamespace(poll=lambda: None if httpx.get(f"{default_server}/health").is_success else 1)


class TestLogprobs(SpecLogprobKit, Kit):
    logprob_match_delta = 0.01

    def test_logprob_mixed(self) -> None:
        """The kit's sweep over lengths, without the long ones."""
        sweep = [
            (length, 4, 0, start, asked, top)
            for length in (120, 300)
            for start in (0, 100)
            for asked in (True, False)
            for top in (0, 5)
        ]
        for case in sweep:
            run_logprob_check(self, case)


class TestPenalties(SpecPenaltyKit, Kit):
    def run_decode(self, params: Body) -> None:
        params = {"temperature": 0, "max_new_tokens": 33, "ignore_eos": True, **params}
        (answer,) = generate(self.base_url, [{"text": "The capital of France is", "sampling_params": params}], 1)
        assert answer["meta_info"]["completion_tokens"] == 33


class TestGrammar(SpecGrammarKit, Kit):
    # Bounded: what the small model likes to write has no end.
    grammar_json_schema = SpecGrammarKit.grammar_json_schema.replace("]+$", "]{1,12}$").replace(
        '"type": "integer"', '"type": "integer", "minimum": 0, "maximum": 9999'
    )


class TestJson(JSONConstrainedMixin, Kit):
    json_schema = JSONConstrainedMixin.json_schema.replace("]+$", "]{1,12}$").replace(
        '"type": "integer"', '"type": "integer", "minimum": 0, "maximum": 9999'
    )

    def test_mix_json_and_other(self) -> None:
        for schema in (None, self.json_schema):
            self._run_decode_json(schema)


class TestStops(MatchedStopMixin, Kit):
    test_finish_stop_eos = None  # names Llama's end of text


class TestAborts(AbortAllMixin, Kit):
    abort_all_num_requests, abort_all_max_new_tokens = 8, 4000


class TestPauses(PauseResumeInPlaceMixin, Kit):
    pause_num_requests, pause_max_new_tokens, pause_duration = 8, 48, 2
    pause_ignore_eos = True


class TestSessions(StreamingSessionKitMixin, Kit):
    # Hundreds of requests, for minutes: below with fewer.
    test_leak_logprob_concurrent = None
    test_stress_concurrent_sessions = None
    # They ask for 100,000 tokens, more than this model's context holds.
    test_first_mid_abort_recovery = None
    test_nth_mid_abort_recovery = None


@pytest.mark.parametrize("prompts", ["short", "long"])
def test_sessions_at_once(prompts: str, default_server: str, tokenizer: Any) -> None:
    kit_of_sessions(default_server, tokenizer, prompts)


@pytest.mark.parametrize("behind", ["prefill", "decode"])
def test_kl_behind_a_cache_hit(
    behind: str, default_server: str, pair: embedded.Pair, short_bodies: list[Body]
) -> None:
    kit_of_kl(default_server, str(pair.target), short_bodies[:3], behind)


def test_turns_hit_what_the_turns_before_left(default_server: str, pair: embedded.Pair, tmp_path: Path) -> None:
    kit_of_cache_hits(default_server, str(pair.target), tmp_path)


@pytest.mark.parametrize("tokens", [9, 14, 15])
def test_a_turn_answers_as_one_request_does(default_server: str, short_bodies: list[Body], tokens: int) -> None:
    """With others beside it, whose prefills come right behind a turn's last step."""
    session = requests.post(
        f"{default_server}/open_session", json={"capacity_of_str_len": 4096, "streaming": True}
    ).json()
    ids: list[int] = []
    for turn in range(4):
        added = short_bodies[turn]["input_ids"][-TURN:]
        params = {"temperature": 0, "max_new_tokens": tokens + turn, "ignore_eos": True}
        body = {"sampling_params": params, "return_logprob": True}
        others = [
            {"input_ids": short_bodies[n]["input_ids"], "sampling_params": {**params, "max_new_tokens": n}}
            for n in range(1, 6)
        ]
        mine = {**body, "input_ids": added, "session_params": {"id": session}}
        ids += added
        in_session = generate(default_server, [mine, *others], 3)[0]
        (alone,) = generate(default_server, [{**body, "input_ids": ids}], 1)
        assert in_session["meta_info"]["prompt_tokens"] == len(ids)
        assert in_session["output_ids"] == alone["output_ids"]
        assert logprobs(in_session) == pytest.approx(logprobs(alone), abs=2e-3)
        ids += in_session["output_ids"]
    requests.post(f"{default_server}/close_session", json={"session_id": session}).raise_for_status()


def test_what_is_emitted_behind_a_cache_hit_is_what_a_prefill_scores(
    default_server: str, short_bodies: list[Body]
) -> None:
    """SGLang's KL kit, on prompts that need no download: three turns of chats, each behind the turns before."""
    chats, emitted = [body["input_ids"] for body in short_bodies[:4]], []
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    for turn in range(3):
        bodies = [{"input_ids": ids, "sampling_params": params, "return_logprob": True} for ids in chats]
        answers = generate(default_server, bodies, 4)
        for ids, answer in zip(chats, answers, strict=True):
            # All is hit but what this turn adds, and the last token, which no step has read.
            assert turn == 0 or answer["meta_info"]["cached_tokens"] >= len(ids) - TURN - 1
            emitted.append((ids + answer["output_ids"], logprobs(answer)))
        chats = [
            [*ids, *a["output_ids"], *body["input_ids"][-TURN:]]
            for ids, a, body in zip(chats, answers, short_bodies[4:8], strict=True)
        ]
    requests.post(f"{default_server}/flush_cache").raise_for_status()
    score = {"sampling_params": {"temperature": 0, "max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    scores = generate(default_server, [{**score, "input_ids": ids} for ids, _ in emitted], 4)
    for (_, got), scored in zip(emitted, scores, strict=True):
        entries = scored["meta_info"]["input_token_logprobs"][-len(got) :]
        ratio = np.array([entry[0] for entry in entries]) - np.array(got)
        assert (np.exp(ratio) - 1 - ratio).mean() < KL
