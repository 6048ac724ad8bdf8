"""The target in plain torch: features for training, and one decoding step for making data.

Llama, Qwen2 and Qwen3 shapes differ only in attention biases and q/k norms, both read off the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

SERVED = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"}

Attention = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""(q [..., heads, head_dim], k, v [..., kv_heads, head_dim], the layer's state) -> [..., heads, head_dim]."""


def rope_frequencies(config: dict, device: torch.device | str) -> Tensor:
    """Inverse frequencies, [head_dim / 2] float32. Raises ValueError for scaled rope, which is not implemented."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind!r} is not implemented: train for a target with plain rope")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    return theta ** -(torch.arange(0, head_dim(config), 2, device=device).float() / head_dim(config))


def head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., heads, head_dim] by cos, sin [..., head_dim / 2] (one row a token)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


class TargetLayer(nn.Module):
    """One frozen decoder layer; q, k, v and gate, up are kept as one matrix each."""

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, self.eps = head_dim(config), config["rms_norm_eps"]

        def put(name: str, tensor: Tensor | None) -> None:
            self.register_buffer(name, tensor)

        w = {name.removesuffix(".weight"): tensor for name, tensor in weights.items()}
        put("qkv", torch.cat([w[f"self_attn.{p}_proj"] for p in "qkv"]))
        bias = [w.get(f"self_attn.{p}_proj.bias") for p in "qkv"]
        put("qkv_bias", None if bias[0] is None else torch.cat([b for b in bias if b is not None]))
        put("o", w["self_attn.o_proj"])
        put("q_norm", w.get("self_attn.q_norm"))
        put("k_norm", w.get("self_attn.k_norm"))
        put("gate_up", torch.cat([w["mlp.gate_proj"], w["mlp.up_proj"]]))
        put("down", w["mlp.down_proj"])
        put("norm1", w["input_layernorm"])
        put("norm2", w["post_attention_layernorm"])

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of x, rotated."""
        qkv = F.linear(rms_norm(x, self.norm1, self.eps), self.qkv, self.qkv_bias)
        qkv = qkv.unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output, from its input x and what attention gave."""
        x = x + F.linear(out.flatten(-2), self.o)
        gate, up = F.linear(rms_norm(x, self.norm2, self.eps), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, state: Any) -> Tensor:
        q, k, v = self.before_attention(x, cos, sin)
        return self.after_attention(x, attention(q, k, v, state))


class Target(nn.Module):
    """A frozen target.

    config: its config.json. embedding, head: [vocab, hidden] (the same tensor where tied). layers: TargetLayer each.
    """

    embedding: Tensor
    head: Tensor

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("embedding", weights["model.embed_tokens.weight"])
        tied = "lm_head.weight" not in weights
        self.register_buffer("head", self.embedding if tied else weights["lm_head.weight"])
        self.register_buffer("norm", weights["model.norm.weight"])
        self.register_buffer("frequencies", rope_frequencies(config, self.embedding.device), persistent=False)
        self.layers = nn.ModuleList()
        for i in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{i}."
            own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            self.layers.append(TargetLayer(config, own))

    @classmethod
    def load(cls, path: Path, device: torch.device | str, dtype: torch.dtype) -> Target:
        """Read a Hugging Face checkpoint directory (config.json and safetensors).

        Raises ValueError for an architecture that is not Llama- or Qwen-shaped.
        """
        config = json.loads((path / "config.json").read_text())
        architecture = (config.get("architectures") or ["none"])[0]
        if architecture not in SERVED:
            raise ValueError(f"{path}: architecture {architecture} is not one of {', '.join(sorted(SERVED))}")
        weights: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            weights |= load_file(file, device=str(device))
        if not weights:
            raise ValueError(f"{path}: no *.safetensors there")
        return cls(config, {k: v.to(dtype) for k, v in weights.items()}).eval().requires_grad_(False)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin for positions [...]: [..., head_dim / 2] float32."""
        angle = positions[..., None].float() * self.frequencies
        return angle.cos(), angle.sin()

    def features(
        self, tokens: Tensor, positions: Tensor, attention: Attention, states: Sequence[Any], layer_ids: Sequence[int]
    ) -> Tensor:
        """Outputs of layers layer_ids (ascending), side by side: [..., len(layer_ids) * hidden].

        tokens, positions [...] int64; states: what attention is given, one a layer. Layers above the last one asked for
        do not run.
        """
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.rotation(positions)
        kept = []
        for i in range(layer_ids[-1] + 1):
            x = self.layers[i](x, cos, sin, attention, states[i])
            if i in layer_ids:
                kept.append(x)
        return torch.cat(kept, dim=-1)

    def hidden(self, tokens: Tensor, positions: Tensor, attention: Attention, states: Sequence[Any]) -> Tensor:
        """What the head reads, [..., hidden]."""
        return self.normed(self.features(tokens, positions, attention, states, [len(self.layers) - 1]))

    def normed(self, last: Tensor) -> Tensor:
        """The last layer's output as the head reads it."""
        return rms_norm(last, self.norm, self.config["rms_norm_eps"])
