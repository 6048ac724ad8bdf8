"""Tiny random targets of families that no small checkpoint is at hand of: made here, served by a real server."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from client import Body, generate
from conftest import ON_GPU, Serve
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GptOssForCausalLM

SCRIPT = Path(__file__).parents[2] / "scripts" / "tiny_models.py"
TOKENS, WINDOW, WORDS, CHUNK = 40, 16, 92, 64
IMAGE = [92, 94, 93]  # its beginning, its place, its end
RETRACT = {"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "12"}
SLIDING = {
    **RETRACT, "SGLANG_SWA_EVICTION_INTERVAL": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}  # fmt: skip
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}

pytestmark = pytest.mark.skipif(ON_GPU, reason="in float32 on a CPU alone; on a GPU: scripts/family_logprobs.py")


def make(family: str, folder: Path) -> tuple[Path, list[str]]:
    """A family's target, and a server's arguments for it and its draft."""
    target, draft = folder / "target", folder / "draft"
    subprocess.run([sys.executable, SCRIPT, family, target, draft], check=True)
    return target, [
        "--model-path", str(target), "--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft),
        "--speculative-num-draft-tokens", "15", "--speculative-num-steps", "4", "--skip-tokenizer-init",
        "--context-length", "512", "--max-total-tokens", "4096",
    ]  # fmt: skip


def some_prompts(*lens: int) -> list[list[int]]:
    torch.manual_seed(0)
    return [torch.randint(3, WORDS, (n,)).tolist() for n in lens]


def slots_of_pools(url: str) -> tuple[int, int]:
    """A server's, of layers that see all and of those that slide."""
    (state,) = httpx.get(f"{url}/server_info", timeout=60).json()["internal_states"]
    return state["memory_usage"]["token_capacity"], state["memory_usage"]["token_capacity_swa"]


def verified(answer: Body) -> torch.Tensor:
    return torch.tensor([row[0] for row in answer["meta_info"]["output_token_logprobs"]])


def test_sliding_windows_sinks_and_clamped_experts_say_what_transformers_does(serve: Serve, tmp_path: Path) -> None:
    """Token by token, in log-probability: random models have near-ties, so that texts alone tell little. Then each text
    again with more behind it, by the prefix cache.

    Sliding layers keep little in a pool of their own: what slides out of the window is taken back at once. After each
    step every slot of both pools is accounted for, under retraction.
    """
    target, arguments = make("gpt-oss", tmp_path)
    prompts = some_prompts(1, WINDOW - 1, WINDOW + 1, 3 * WINDOW, 90, 7)
    with serve(*arguments, "--page-size", str(WINDOW), "--swa-full-tokens-ratio", "0.2", env=SLIDING) as url:
        assert slots_of_pools(url) == (4096, 816)
        asked: list[Body] = [{"input_ids": ids, "sampling_params": GREEDY, "return_logprob": True} for ids in prompts]
        answers = generate(url, asked, len(asked))
        texts = [ids + answer["output_ids"] for ids, answer in zip(prompts, answers, strict=True)]
        longer: list[Body] = [{**body, "input_ids": [*ids, 5, 6]} for body, ids in zip(asked, texts, strict=True)]
        again = generate(url, longer, len(longer))
    model = GptOssForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    for body, answer in zip([*asked, *longer], [*answers, *again], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([body["input_ids"] + answer["output_ids"]])).logits
        logp = logits[0, :-1].log_softmax(-1)[-TOKENS:]
        told = logp.gather(1, torch.tensor(answer["output_ids"])[:, None])[:, 0]
        torch.testing.assert_close(verified(answer), told, rtol=0, atol=1e-3)
        torch.testing.assert_close(told, logp.amax(1), rtol=0, atol=1e-3)
    assert accepted_by(answers + again) >= 20, "else little but roots was compared"
    kept = [answer["meta_info"]["cached_tokens"] for answer in again]
    assert kept == [len(ids) // WINDOW * WINDOW for ids in texts]


def picture(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), torch.randint(256, (width * height * 3,), dtype=torch.uint8).numpy())


def sent(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


class Transformers:
    """A target with images as transformers runs it, the whole text at once."""

    def __init__(self, target: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32).eval()
        self.pixels: Any = AutoProcessor.from_pretrained(target).image_processor

    def logp(self, ids: list[int], images: list[Image.Image]) -> torch.Tensor:
        """Log-probabilities [TOKENS, vocabulary] of the last tokens, behind those before them."""
        given = dict(self.pixels(images, return_tensors="pt")) if images else {}
        sizes = iter(given.get("image_grid_thw", torch.empty(0, 3)).prod(-1).tolist())
        place = IMAGE[1]
        tokens = torch.tensor([[t for i in ids for t in ([place] * (next(sizes) // 4) if i == place else [i])]])
        if images:
            given["mm_token_type_ids"] = (tokens == place).int()
        with torch.no_grad():
            logits: torch.Tensor = self.model(tokens, **given).logits
        return logits[0, :-1].log_softmax(-1)[-TOKENS:]


def test_gated_delta_nets_say_what_transformers_does(serve: Serve, tmp_path: Path) -> None:
    """Of words and of images, under retraction; then each text again with more behind it, from the states that the
    prefix cache has kept.
    """
    target, arguments = make("qwen3.5-vl", tmp_path)
    words, (before, between, after) = some_prompts(1, CHUNK - 16, CHUNK + 1, 2 * CHUNK - 30), some_prompts(5, 60, 3)
    images: list[list[Image.Image]] = [[], [], [], [], [picture(96, 64)], [picture(128, 160), picture(64, 64)]]
    prompts = [*words, before + IMAGE + after, IMAGE + between + IMAGE + after]
    asked: list[Body] = [
        {"input_ids": ids, "sampling_params": GREEDY, "return_logprob": True, "image_data": [*map(sent, own)]}
        for ids, own in zip(prompts, images, strict=True)
    ]
    with serve(*arguments, "--mamba-track-interval", str(CHUNK), env=RETRACT) as url:
        answers = generate(url, asked, len(asked))
        texts = [ids + answer["output_ids"] for ids, answer in zip(prompts, answers, strict=True)]
        longer: list[Body] = [{**body, "input_ids": [*ids, 5, 6]} for body, ids in zip(asked, texts, strict=True)]
        again = generate(url, longer, len(longer))
    model = Transformers(target)
    for body, own, answer in zip([*asked, *longer], images * 2, [*answers, *again], strict=True):
        logp = model.logp(body["input_ids"] + answer["output_ids"], own)
        told = logp.gather(1, torch.tensor(answer["output_ids"])[:, None])[:, 0]
        torch.testing.assert_close(verified(answer), told, rtol=0, atol=1e-4)
        torch.testing.assert_close(told, logp.amax(1), rtol=0, atol=1e-4)
    assert accepted_by(answers + again) >= 20, "else little but roots was compared"
    kept = [answer["meta_info"]["cached_tokens"] for answer in again]
    whole = [answer["meta_info"]["prompt_tokens"] - 2 for answer in again]
    assert kept == [tokens // CHUNK * CHUNK for tokens in whole]  # some crossed their last in a window


def accepted_by(answers: list[Body]) -> int:
    return sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
