"""Tiny random draft checkpoints of every kind. Tensor names are spelled out here, apart from the package's
list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

H, INNER, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FEATURES = 32, 48, 61, 3, 4, 2, 8, 2

SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def config(top: dict[str, Any] | None = None, **dflash: Any) -> dict[str, Any]:
    """A config.json; `expected_causal` is the tests' own key: whether each layer ought to be causal."""
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "vocab_size": VOCAB,
        "block_size": 7,
        "num_target_layers": 6,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 4], **dflash},
        "expected_causal": [False] * LAYERS,
        **(top or {}),
    }


CAUSAL = {"expected_causal": [True] * LAYERS}
SELECTOR = {"selector_rank": 8, "selector_top_k": 5}
CONVOLUTION = {"conv_kernel_size": 3, "conv_group_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": config(),
    "llama": config({"model_type": "llama", "rope_scaling": LLAMA3}),
    "llama with q and k norms": config({"model_type": "llama"}),
    "bias": config({"attention_bias": True}),
    "causal_head": config(CAUSAL, causal_head=True),
    "causal": config(CAUSAL, causal=True, causal_head=False),
    "is_causal": config({**CAUSAL, "is_causal": True}),
    "tied selector": config(CAUSAL, causal_head=True, selector_tied=True, selector_eps=1e-3, **SELECTOR),
    "DFlash2": config({"architectures": ["DFlash2DraftModel"]}, **SELECTOR, **CONVOLUTION),
    "causal DFlash2": config(
        {"architectures": ["DFlash2DraftModel"], **CAUSAL}, causal=True, **SELECTOR, **CONVOLUTION
    ),
    "sliding": config({"layer_types": SLIDING, "sliding_window": 6, "expected_causal": [True, False, True]}),
    "sliding both ways": config({"layer_types": SLIDING, "sliding_window": 6, "is_causal": False}),
    "transformed logits": config(output_multiplier=0.3, final_logit_softcapping=2.0),
}


def weights(raw: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a checkpoint, float32, norms near 1."""
    torch.manual_seed(seed)
    dflash = raw["dflash_config"]
    state = {"fc.weight": _linear(H, FEATURES * H)}
    norms = ["hidden_norm", "norm"]
    for i in range(LAYERS):
        name = f"layers.{i}"
        norms += [f"{name}.input_layernorm", f"{name}.post_attention_layernorm"]
        widths = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        for kind, width in widths.items():
            state[f"{name}.self_attn.{kind}_proj.weight"] = _linear(width, H)
        state[f"{name}.self_attn.o_proj.weight"] = _linear(H, HEADS * HEAD_DIM)
        if raw.get("attention_bias"):
            for kind, width in {**widths, "o": H}.items():
                state[f"{name}.self_attn.{kind}_proj.bias"] = torch.randn(width)
        if "rope_scaling" not in raw:
            for kind in "qk":
                state[f"{name}.self_attn.{kind}_norm.weight"] = 1 + 0.3 * torch.randn(HEAD_DIM)
        for kind, shape in {"gate": (INNER, H), "up": (INNER, H), "down": (H, INNER)}.items():
            state[f"{name}.mlp.{kind}_proj.weight"] = _linear(*shape)
        if taps := dflash.get("conv_kernel_size"):
            for conv in ("attention_conv", "mlp_conv"):
                state[f"{name}.{conv}.base_kernel"] = 0.5 * torch.randn(2, taps, H)
                rows = 2 * taps * H // dflash["conv_group_size"]
                state[f"{name}.{conv}.kernel_projection.weight"] = _linear(rows, H)
    for norm in norms:
        state[f"{norm}.weight"] = 1 + 0.3 * torch.randn(H)
    if rank := dflash.get("selector_rank"):
        state["candidate_selector.hidden_projection.weight"] = _linear(rank, H)
        for side in ("predecessor", "successor"):
            if dflash.get("selector_tied"):
                state[f"candidate_selector.{side}_projection.weight"] = _linear(rank, H)
            else:
                state[f"candidate_selector.{side}_codebook"] = torch.randn(VOCAB, rank)
    return state


def _linear(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) / columns**0.5
