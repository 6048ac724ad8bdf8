"""Rows of what masks and penalties take, of real grammars; how long that is here is not asked."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
from loading import load
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_dflash import embedded


@pytest.fixture
def script() -> ModuleType:
    return load("scripts/time_host.py")


def test_a_tree_follows_the_text_and_leaves_it(script: ModuleType) -> None:
    text = list(range(10, 30))
    tokens, parents = script.a_tree(text, 4, 16, random.Random(0))
    assert tokens.index(14) > 0 and parents[tokens.index(14)] == 0
    assert len(set(zip(tokens, parents, strict=True))) == 16
    assert all(parent < node for node, parent in enumerate(parents[1:], start=1))


def test_rows_of_masks_and_penalties(script: ModuleType, pair: embedded.Pair) -> None:
    tokenizer = get_tokenizer(str(pair.target))
    backend = XGrammarGrammarBackend(tokenizer, vocab_size=script.VOCAB, model_eos_token_ids=[script.EOS])
    kind, key, text = script.grammars()["regex"]
    template = getattr(backend, f"dispatch_{kind}")(key)
    row = script.masks_row(template, tokenizer.encode(text), 2, 8)
    assert 1 < row["masks"] < 8 and row["ms"] > 0 and row["singly_ms"] > 0
    assert min(script.penalties_row(2, 30).values()) >= 0
