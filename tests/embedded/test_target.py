"""The embedded target against transformers' own reading of the same GGUF file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from sglang_dflash import embedded
from sglang_dflash.embedded import cache, weights


@pytest.fixture(scope="module")
def tokenizer(pair: embedded.Pair) -> Any:
    return AutoTokenizer.from_pretrained(pair.target)


def test_the_name_stands_for_the_pair(pair: embedded.Pair) -> None:
    assert embedded.resolve("smollm2-135m") == pair
    assert pair.target == embedded.target_path()
    assert embedded.resolve("meta-llama/Llama-3.1-8B") is None
    assert embedded.resolve(None) is None


def test_the_draft_fits_the_target(pair: embedded.Pair) -> None:
    target_config = json.loads((pair.target / "config.json").read_text())
    draft_config = json.loads((pair.draft / "config.json").read_text())
    for key in ("hidden_size", "vocab_size"):
        assert draft_config[key] == target_config[key]
    assert draft_config["num_target_layers"] == target_config["num_hidden_layers"]
    with safe_open(pair.draft / "model.safetensors", "pt") as f:
        layers = len(draft_config["dflash_config"]["target_layer_ids"])
        hidden = target_config["hidden_size"]
        assert f.get_slice("fc.weight").get_shape() == [hidden, layers * hidden]


def test_logits_equal_transformers_reading(pair: embedded.Pair, tokenizer: Any) -> None:
    ours = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    read = load_gguf_checkpoint(str(weights.installed()), return_tensors=True, model_to_load=ours)
    config = {k: v for k, v in read["config"].items() if k != "_model_name_or_path"}
    reference = LlamaForCausalLM(LlamaConfig(**config))
    rounded = {name: tensor.bfloat16().float() for name, tensor in read["tensors"].items()}
    missing, unexpected = reference.load_state_dict(rounded, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied to the embedding
    ids = torch.tensor([tokenizer.encode("If 3 boxes hold 12 pencils each, how many pencils are there?")])
    with torch.inference_mode():
        got, expected = ours(ids).logits, reference(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert expected.std() > 1  # logits of a model that knows something, not zeros


def test_answers_a_question(pair: embedded.Pair, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"  # and it stops by itself


def test_special_tokens(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert len(tokenizer) == 49152


def test_digits_stand_alone(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a 2026 b") == ["a", "Ġ", "2", "0", "2", "6", "Ġb"]
    # A digit does not take the space before it along, so that two spaces stay one token.
    assert tokenizer.tokenize("a.  40 b") == ["a", ".", "ĠĠ", "4", "0", "Ġb"]


# The vocabulary has no token for the bytes of these controls, nor of planes 4 and up.
WRITABLE = st.characters(codec="utf-8", max_codepoint=0x1FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")


@given(text=st.text(WRITABLE))
def test_text_survives(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_two_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sglang_dflash.cli", "embedded", "--json"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    paths = [json.loads(p.communicate(timeout=120)[0])["target"] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert paths[0] == paths[1] and Path(paths[0]).is_relative_to(tmp_path)
    assert cache.damage(Path(paths[0])) is None
    digest = cache.sha256(Path(paths[0]) / "model.safetensors")
    assert digest == cache.sha256(embedded.target_path() / "model.safetensors")  # the same bytes every time
