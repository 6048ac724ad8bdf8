"""A two-layer Llama with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
