"""Make a tiny random target and a random draft for it, without a download.

    python scripts/tiny_models.py llama|qwen3|qwen3-moe|qwen3-next|qwen3.5|qwen3.5-moe|sliding OUT_TARGET OUT_DRAFT

What they say means nothing, and a vocabulary of 96 tokens lets some of what is drafted come true: to see that a family
of targets is served, with drafts of sliding and full layers. Serve them with --skip-tokenizer-init. `sliding` is dense:
three layers in four have a sliding window, and the fourth no rotary positions (SGLang's Muse Glimmer). Of
`qwen3-next`, `qwen3.5` and `qwen3.5-moe` three layers in four are gated delta nets; the second is dense.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from sglang_dflash.draft.checkpoint import expected_shapes
from sglang_dflash.draft.config import DraftConfig

HIDDEN, VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER, CONTEXT = 256, 96, 4, 4, 2, 64, 256, 2048
WINDOW, BLOCK, MASK = 16, 8, 0
SHAPE = {
    "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM, "intermediate_size": INNER, "max_position_embeddings": CONTEXT, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2, "rope_theta": 10000.0, "dtype": "float32",
}  # fmt: skip
# A window, a stretched context and a limit of what experts say that short texts pass.
GPT_OSS = {
    "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 2.0,
    "sliding_window": WINDOW,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": CONTEXT // 8,
    },
}  # fmt: skip
DELTA_NETS = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip


class Family(StrEnum):
    LLAMA = "llama"
    QWEN3 = "qwen3"
    QWEN3_MOE = "qwen3-moe"
    GPT_OSS = "gpt-oss"
    QWEN3_5 = "qwen3.5"
    QWEN3_NEXT = "qwen3-next"
    QWEN3_5_MOE = "qwen3.5-moe"
    SLIDING = "sliding"


def target(family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A target's config.json and its tensors."""
    from transformers import (
        AutoModelForCausalLM,
        GptOssConfig,
        LlamaConfig,
        Qwen3_5MoeTextConfig,
        Qwen3_5TextConfig,
        Qwen3Config,
        Qwen3MoeConfig,
        Qwen3NextConfig,
    )

    if family == Family.SLIDING:
        return sliding_target()
    shape = {**SHAPE, "num_hidden_layers": LAYERS}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    shared = {**experts, "shared_expert_intermediate_size": 64}
    config = {
        Family.LLAMA: lambda: LlamaConfig(**shape),
        Family.QWEN3: lambda: Qwen3Config(**shape),
        Family.QWEN3_MOE: lambda: Qwen3MoeConfig(**shape, **experts),
        Family.QWEN3_NEXT: lambda: Qwen3NextConfig(**shape, **DELTA_NETS, **shared),
        Family.QWEN3_5_MOE: lambda: Qwen3_5MoeTextConfig(**shape, **DELTA_NETS, **shared),
        Family.QWEN3_5: lambda: Qwen3_5TextConfig(**shape, **DELTA_NETS),
        Family.GPT_OSS: lambda: GptOssConfig(**{**shape, **GPT_OSS}),
    }[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    raw = {**config.to_dict(), "architectures": [type(model).__name__], "full_attention_interval": LAYERS}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return raw, random_weights(shapes if family == Family.GPT_OSS else one_by_one(shapes))


def one_by_one(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Experts as most checkpoints have them: each by itself, and not as transformers holds them."""
    apart: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer, found, matrix = name.partition(".experts.")
        if not found:
            apart[name] = shape
            continue
        parts = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else ("down_proj",)
        rows = shape[1] // len(parts)
        apart |= {f"{layer}.experts.{e}.{part}.weight": (rows, shape[2]) for e in range(shape[0]) for part in parts}
    return apart


def sliding_target() -> tuple[dict[str, Any], dict[str, Tensor]]:
    kinds = ["sliding_attention"] * (LAYERS - 1) + ["full_attention"]
    config = {
        **SHAPE, "architectures": ["MuseGlimmerForCausalLM"], "model_type": "muse_glimmer", "num_hidden_layers": LAYERS,
        "layer_types": kinds, "no_rope_layers": [1] * (LAYERS - 1) + [0], "sliding_window": WINDOW,
        "use_attn_output_gate": False, "qk_scale_factor": 8.0, "output_multiplier": 1.0, "output_soft_cap_temp": None,
    }  # fmt: skip
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,),
    }  # fmt: skip
    for i in range(LAYERS):
        of_layer = {
            "self_attn.q_proj": (q, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attn_norm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,), "post_ffn_norm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in of_layer.items()}
    return config, random_weights(shapes)


def draft() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of sliding layers and a full one, as those of Qwen3.6 are."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = {
        **SHAPE, "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": len(kinds),
        "rms_norm_eps": 1e-6, "layer_types": kinds, "sliding_window": WINDOW - 4, "use_sliding_window": True,
        "max_window_layers": 0, "block_size": BLOCK, "num_target_layers": LAYERS,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2]},
    }  # fmt: skip
    return config, random_weights(expected_shapes(DraftConfig.from_dict(config)))


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Norms near 1; what a layer adds is of the size of what it is added to; states forget over some ten tokens; sinks
    weigh as much as some ten keys, in numbers of 16 bits, as SGLang keeps them.
    """
    torch.manual_seed(0)
    return {name: _random_weight(name, torch.randn(shape)) for name, shape in shapes.items()}


def _random_weight(name: str, noise: Tensor) -> Tensor:
    if noise.dim() > 1:
        return noise / noise.shape[-1] ** 0.5
    if name.endswith("A_log"):
        return noise - 3
    if name.endswith("sinks"):
        return (noise + 2).bfloat16().float()
    return 0.1 * noise + (0 if name.endswith("_proj.bias") else 1)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors")


def main(
    family: Annotated[Family, typer.Argument(help="Kind of target.")],
    out_target: Annotated[Path, typer.Argument(help="Directory of the target.")],
    out_draft: Annotated[Path, typer.Argument(help="Directory of the draft.")],
) -> None:
    write(out_target, *target(family))
    write(out_draft, *draft())


if __name__ == "__main__":
    typer.run(main)
