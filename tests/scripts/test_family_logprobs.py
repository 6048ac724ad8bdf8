"""What is asked of servers of tiny targets, and the figures of an answer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

import pytest
from loading import ROOT, load
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return load("scripts/family_logprobs.py")


def test_every_run_asks_the_same(script: ModuleType) -> None:
    assert [len(body["input_ids"]) for body in script.prompts(with_images=False)] == list(script.LENS)
    assert script.prompts(with_images=True) == script.prompts(with_images=True)
    pictures = [body["input_ids"].count(script.IMAGE[1]) for body in script.prompts(with_images=True)]
    assert pictures == [0, 0, 0, 0, 0, 1, 2]


def test_an_answer_stands_beside_the_end_of_the_text_that_was_read_again(script: ModuleType) -> None:
    said = {"output_token_logprobs": [(-1.0,), (-2.0,)], "prompt_tokens": 3, "cached_tokens": 0}
    read = {"input_token_logprobs": [(None,), (-9.0,), (-9.0,), (-1.25,), (-2.0,)]}
    row = script.row({"meta_info": said, "output_ids": [5, 6]}, {"meta_info": read})
    assert row == {"prompt": 3, "cached": 0, "accepted": 0, "mean": 0.125, "largest": 0.25, "ids": [5, 6]}
    assert script.summary([row, {**row, "mean": 0.375, "largest": 0.5}]) == "0.2500 on average, 0.500 at most"


def test_cases_give_options_that_sglang_has(script: ModuleType, tmp_path: Path) -> None:
    load_plugins()
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    for family, drafts, own in (script.CASES | script.SHARED).values():
        parsed = parser.parse_args(script.arguments(tmp_path, tmp_path, "bfloat16", drafts, own))
        assert family in list(script.tiny_models.Family) and (parsed.speculative_algorithm == "DFLASH") is drafts
