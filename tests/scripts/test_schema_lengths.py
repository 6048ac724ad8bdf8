"""What is asked with and without a schema, and the figures of a round."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
from loading import load
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar, XGrammarGrammarBackend
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_dflash import embedded


@pytest.fixture
def script() -> ModuleType:
    return load("scripts/schema_lengths.py")


def test_the_same_is_asked_with_a_schema_and_without(script: ModuleType, pair: embedded.Pair) -> None:
    backend = XGrammarGrammarBackend(get_tokenizer(str(pair.target)), vocab_size=49152, model_eos_token_ids=[0])
    for name in script.SCHEMAS:
        free, under = (script.bodies(name, with_schema, 2) for with_schema in (False, True))
        assert [body["messages"] for body in free] == [body["messages"] for body in under]
        assert not any("json_schema" in body["sampling_params"] for body in free)
        grammar = backend.dispatch_json(under[0]["sampling_params"]["json_schema"])
        assert type(grammar) is XGrammarGrammar
        assert all(field in script.SCHEMAS[name][1] for field in json.loads(grammar.key_string)["properties"])


def test_the_prefill_s_token_is_no_step_s(script: ModuleType) -> None:
    answers = [{"meta_info": {"completion_tokens": tokens, "spec_verify_ct": 5}} for tokens in (11, 21)]
    assert script.row(answers, 4.0) == {"tokens": 32, "steps": 10, "tokens_a_step": 3.0, "tok_s": 8.0}
