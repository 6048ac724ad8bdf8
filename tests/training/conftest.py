"""A two-layer toy target with random weights, and a data set it might have answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sglang_dflash.training.data import Answers, Document, write_shard
from sglang_dflash.training.target import Target

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "vocab_size": 61,
}


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """A tied Llama of CONFIG's shape."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, wide, kv = 32, 48, 32, 16

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {"model.embed_tokens.weight": matrix(61, hidden), "model.norm.weight": torch.ones(hidden)}
    for i in range(2):
        shapes = {
            "self_attn.q_proj": (wide, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, wide),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        weights |= {f"model.layers.{i}.{n}.weight": matrix(*s) for n, s in shapes.items()}
        weights |= {
            f"model.layers.{i}.{n}.weight": torch.rand(hidden, generator=generator) + 0.5
            for n in ("input_layernorm", "post_attention_layernorm")
        }
    return weights


@pytest.fixture
def target() -> Target:
    return Target(CONFIG, random_weights()).eval()


@pytest.fixture
def make_answers(tmp_path: Path) -> Callable[..., Answers]:
    """make_answers(documents, seed=0): answers that count upwards, so that there is something to learn."""

    def make(documents: int, seed: int = 0) -> Answers:
        rng, made = np.random.default_rng(seed), []
        for i in range(documents):
            prompt, answer = int(rng.integers(2, 9)), int(rng.integers(12, 40))
            start = int(rng.integers(0, 61))
            tokens = [(start + 3 * j) % 61 for j in range(prompt + answer)]
            made.append(Document(tokens, [(prompt, prompt + answer)], i % 2))
        path = tmp_path / f"answers-{documents}-{seed}"
        path.mkdir()
        write_shard(path / "shard-00000.npz", made[: documents // 2])
        write_shard(path / "shard-00001.npz", made[documents // 2 :])
        (path / "manifest.json").write_text(json.dumps({"sources": ["even", "odd"]}))
        return Answers(path)

    return make
