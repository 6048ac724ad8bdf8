"""A tiny random target with sliding windows, under a draft with some of its own: made here, served by a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from client import Body, generate
from conftest import ON_GPU, Serve

SCRIPT = Path(__file__).parents[2] / "scripts" / "tiny_models.py"
TOKENS, WINDOW, VOCAB = 40, 16, 96


@pytest.mark.skipif(ON_GPU, reason="window passes on a GPU have no sliding targets yet")
def test_what_a_sliding_target_verifies_is_what_a_prefill_of_it_says(serve: Serve, tmp_path: Path) -> None:
    """Token by token, in log-probability: random models have near-ties, so that texts alone tell little."""
    target, draft = tmp_path / "target", tmp_path / "draft"
    subprocess.run([sys.executable, SCRIPT, "sliding", target, draft], check=True)
    torch.manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (n,)).tolist() for n in (1, WINDOW - 1, WINDOW + 1, 3 * WINDOW, 90, 7)]
    params = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    with serve(
        "--model-path", str(target), "--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft),
        "--speculative-num-draft-tokens", "15", "--speculative-num-steps", "4", "--skip-tokenizer-init",
        "--context-length", "512", "--max-total-tokens", "4096",
    ) as url:  # fmt: skip
        asked: list[Body] = [{"input_ids": ids, "sampling_params": params, "return_logprob": True} for ids in prompts]
        answers = generate(url, asked, len(asked))
        texts = [ids + answer["output_ids"] for ids, answer in zip(prompts, answers, strict=True)]
        once = {"temperature": 0, "max_new_tokens": 1}
        prefills = generate(
            url,
            [
                {"input_ids": ids, "sampling_params": once, "return_logprob": True, "logprob_start_len": 0,
                 "top_logprobs_num": 1}
                for ids in texts
            ],
            1,
        )  # fmt: skip
    for answer, prefill in zip(answers, prefills, strict=True):
        verified = torch.tensor([row[0] for row in answer["meta_info"]["output_token_logprobs"]])
        told = torch.tensor([row[0] for row in prefill["meta_info"]["input_token_logprobs"][-TOKENS:]])
        best = torch.tensor([row[0][0] for row in prefill["meta_info"]["input_top_logprobs"][-TOKENS:]])
        torch.testing.assert_close(verified, told, rtol=0, atol=1e-3)
        torch.testing.assert_close(told, best, rtol=0, atol=1e-3)
    accepted = sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
    assert accepted >= 10, "else little but roots was compared"
