"""SGLang's kits for caches and sessions, of any server that is up: smaller, and each turn of a session compared."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import requests
from client import Body, generate
from sglang.test import kl_test_utils
from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test
from sglang.test.server_fixtures import streaming_session_fixture as sessions_kit

from sglang_dflash.cli.load import gsm8k

KL = 1e-5  # between what was emitted and what a prefill scores it
# Of SGLang's kit of sessions: how many at once, and how long.
FEWER = {
    "CONCURRENT_LOGPROB_SESSIONS": 3, "CONCURRENT_LOGPROB_TURNS": 3, "CONCURRENT_LOGPROB_ROUNDS": 1,
    "STRESS_NUM_SESSIONS": 3, "STRESS_NUM_NON_STREAMING": 2, "STRESS_NUM_TURNS": 3,
}  # fmt: skip

Turn = tuple[list[int], int, Body]
"""All ids that a turn of a session answers, the most tokens it may answer, and its answer."""


def kit_of_sessions(url: str, tokenizer: Any, prompts: str) -> None:
    """Sessions at once, each turn answering as one request with the same ids does: text, ids and log-probabilities.

    prompts: "short", with log-probabilities of prompts and answers, or "long", without and beside other requests.
    """
    requests.post(f"{url}/flush_cache", params={"timeout": 30}).raise_for_status()
    with pytest.MonkeyPatch.context() as patch:
        for name, count in FEWER.items():
            patch.setattr(sessions_kit, name, count)
        turns = _recorded(patch)
        if prompts == "long":
            asyncio.run(sessions_kit._stress_run_all(url, tokenizer))
        else:
            asked = {"return_logprob": True, "logprob_start_len": 0}
            asyncio.run(sessions_kit._concurrent_logprob_run(url, tokenizer, **asked))
    assert len(turns) == 9
    single = [
        {"input_ids": ids, "return_logprob": True, "sampling_params": {**_PARAMS, "max_new_tokens": tokens}}
        for ids, tokens, _ in turns
    ]
    for (ids, _, answer), alone in zip(turns, generate(url, single, 4), strict=True):
        assert answer["meta_info"]["prompt_tokens"] == len(ids)
        assert answer["output_ids"] == alone["output_ids"]
        assert answer["text"] == alone["text"]
        if prompts == "short":
            assert logprobs(answer) == pytest.approx(logprobs(alone), abs=2e-3)
    assert requests.get(f"{url}/health").ok  # it checks its pools whenever it falls idle


_PARAMS = {"temperature": 0, "no_stop_trim": True, "skip_special_tokens": False}  # the kit's


def _recorded(patch: pytest.MonkeyPatch) -> list[Turn]:
    """The kit's turns from now on."""
    turns: list[Turn] = []
    said: dict[str, list[int]] = {}
    ask = sessions_kit._async_generate

    async def asked(url: str, http: Any, input_ids: list[int], **rest: Any) -> Body:
        answer = await ask(url, http, input_ids, **rest)
        if session := rest.get("session_params"):
            ids = said.get(session["id"], []) + input_ids
            turns.append((ids, rest.get("max_new_tokens", 8), answer))
            said[session["id"]] = ids + answer["output_ids"]
        return answer

    patch.setattr(sessions_kit, "_async_generate", asked)
    return turns


def kit_of_kl(url: str, model: str, bodies: list[Body], behind: str) -> None:
    """What is emitted behind a hit of the cache is what a prefill scores; behind: "prefill" or "decode", who filled it.

    The kit downloads its prompts: here it is given ours.
    """
    helper = getattr(kl_test_utils, f"test_input_output_logprobs_match_{behind}_cache_hit_helper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kl_test_utils, "get_input_ids", lambda **_: [body["input_ids"] for body in bodies])
        helper(url, {model: {"kl_div": KL}}, model, max_samples=len(bodies), max_new_tokens=16)


def kit_of_cache_hits(url: str, model: str, folder: Path) -> None:
    """Chats of three turns: each hits all that the turns before left, but for the last token and an open page."""
    prompts = folder / "prompts.json"  # as ShareGPT's, which the kit would download
    prompts.write_text(json.dumps([{"conversations": [{"value": text}] * 2} for text in gsm8k(16)]))
    run_multiturn_cache_hit_test(
        url, model, num_clients=3, num_rounds=3, request_length=80, output_length=16, dataset_path=str(prompts)
    )


def logprobs(answer: Body) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
