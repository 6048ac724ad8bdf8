"""What the servers under test are asked."""

from __future__ import annotations

import json

from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from transformers import PreTrainedTokenizerBase

from sglang_dflash.cli.load import chat_ids, gsm8k, listed_ids

SHORT, LONG = 48, 8
CONTEXT = 2048  # of the server whose context is small


def chats(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """GSM8K questions as chats."""
    return [chat_ids(tokenizer, question) for question in gsm8k(SHORT)]


def long_chats(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Chats of 1,500 tokens and more: a list of problems to read, and one of them to solve; four chats a list."""
    questions = gsm8k(SHORT + LONG // 4 * 28)[SHORT:]
    prompts = [listed_ids(tokenizer, questions[i // 4 * 28 :][:28], i) for i in range(LONG)]
    assert min(map(len, prompts)) >= 1500
    return prompts


def chats_below(tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> list[list[int]]:
    """Chats of at most so many tokens, as near to it as whole problems come: a list of them, and one to solve."""
    questions = gsm8k(SHORT + tokens // 16)[SHORT:]
    most = max(n for n in range(1, len(questions)) if len(listed_ids(tokenizer, questions[:n], n)) <= tokens)
    return [listed_ids(tokenizer, questions[:most], i % most) for i in range(count)]


_SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "unit": {"type": "string", "maxLength": 12}},
    "required": ["answer", "unit"],
}
_NAMES = {
    "type": "object",
    "properties": {
        "number_of_steps": {"type": "integer"},
        "difficulty": {"enum": ["easy", "moderate", "hard"]},
        "about": {
            "type": "object",
            "properties": {"person_asked": {"type": "string"}, "größe": {"enum": ["klein", "groß"]}},
            "required": ["person_asked", "größe"],
        },
        "remaining_eggs": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["number_of_steps", "difficulty", "about", "remaining_eggs"],
}


# Settings in which a seeded text is told.
SEEDED: list[dict[str, float]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 0},
]


def _params(**values: object) -> dict[str, object]:
    return {"sampling_params": {"temperature": 0, "max_new_tokens": 48, **values}}


# What plain decoding is no truth for: it counts late under overlap, and not at all beside a prefill.
PENALTIES: dict[str, dict[str, float]] = {
    "none, beside them": {},
    "frequency penalty": {"frequency_penalty": 1.9},
    "presence penalty": {"presence_penalty": 1.9},
    "repetition penalty": {"repetition_penalty": 1.3},
    "both": {"frequency_penalty": 0.5, "presence_penalty": 0.5},
    "fewest tokens": {"min_new_tokens": 20},
    "fewest tokens, penalised": {"frequency_penalty": 1.0, "min_new_tokens": 20},
}
SHORT_ANSWER = "What is the capital of France?"  # asked without a fewest, a small model is done after some ten tokens

# Every other greedy setting, which must give what plain decoding gives: name -> changes of the body.
SETTINGS: dict[str, dict[str, object]] = {
    "fewest tokens, and a stop string": _params(min_new_tokens=40, stop=["."]),
    "logit bias": _params(logit_bias={"28": -100.0, "30": -100.0}),
    "json schema": _params(json_schema=json.dumps(_SCHEMA)),
    "json schema of long names": _params(json_schema=json.dumps(_NAMES), max_new_tokens=96),
    "grammar": _params(ebnf='root ::= line line line\nline ::= "Step " [1-3] ": " [a-z ]{3,30} ". "'),
    "regex": _params(regex=r"(Yes|No), because [a-z ]{5,40}\."),
    "stop string": _params(stop=["per day"]),
    "stop strings, the likelier last": _params(stop=["per day", " eggs", "\n", "."]),
    "stop regex": _params(stop_regex=[r"\d+ \w+s\b"], max_new_tokens=96),
    "stop token": _params(stop_token_ids=[30]),
    "stop token before a stop string": _params(stop_token_ids=[28, 30], stop=[" she", " She", "\n", " and"]),
    "end ignored": _params(ignore_eos=True, max_new_tokens=400),
    "one token": _params(max_new_tokens=1),
    "two tokens": _params(max_new_tokens=2),
    "custom processor": {
        **_params(custom_params={"token_ids": [28, 30, 198]}),
        "custom_logit_processor": DisallowedTokensLogitsProcessor.to_str(),
    },
    "log-probabilities": {**_params(), "return_logprob": True, "top_logprobs_num": 5},
    "log-probabilities of the prompt": {
        **_params(),
        "return_logprob": True,
        "logprob_start_len": 3,
        "token_ids_logprob": [28, 30],
    },
}
