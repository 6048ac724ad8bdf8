"""Make a tiny random target and a random draft for it, without a download.

    python scripts/tiny_models.py FAMILY OUT_TARGET OUT_DRAFT

What they say means nothing, and a vocabulary of 96 tokens lets some of what is drafted come true: to see that a family
of targets is served, with drafts of sliding and full layers. Serve them with --skip-tokenizer-init. `sliding` is dense:
three layers in four have a sliding window, and the fourth no rotary positions (SGLang's Muse Glimmer). Of
`qwen3-next`, `qwen3.5` and `qwen3.5-moe` three layers in four are gated delta nets; the second is dense.
`gpt-oss-mxfp4` is gpt-oss with experts in four bits, as it is published, `qwen3-awq` and `qwen3-gptq` are Qwen3 with
linear layers in four bits, `llama-modelopt` is Llama with linear layers in eight and scales for keys and values in
eight (SGLang reads none for Qwen3); no CPU serves these. The families with images have a vision tower, positions on
three axes, and a processor whose words are t0, t1, ...: `qwen3-vl-moe`, and the form that Qwen3.5 is published in,
`qwen3.5-vl` and `qwen3.5-moe-vl`.
"""

from __future__ import annotations

import json
import math
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
GROUP = 128  # rows of a linear layer in four bits that share a scale
LARGEST_FP8 = 448.0
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
PATCH, MERGED = 16, 2  # pixels of a patch's side, and patches of that of a token
VISION = {
    "depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": HIDDEN,
    "patch_size": PATCH, "spatial_merge_size": MERGED, "temporal_patch_size": 2, "num_position_embeddings": 64,
}  # fmt: skip
# The last words of the vocabulary; a model never says them.
PLACES = {
    "vision_start_token_id": VOCAB - 4, "vision_end_token_id": VOCAB - 3, "image_token_id": VOCAB - 2,
    "video_token_id": VOCAB - 1,
}  # fmt: skip


UNSHARED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
EXPERTS = {**UNSHARED, "shared_expert_intermediate_size": 64}


class Family(StrEnum):
    LLAMA = "llama"
    LLAMA_MODELOPT = "llama-modelopt"
    QWEN3 = "qwen3"
    QWEN3_AWQ = "qwen3-awq"
    QWEN3_GPTQ = "qwen3-gptq"
    QWEN3_MOE = "qwen3-moe"
    GPT_OSS = "gpt-oss"
    GPT_OSS_MXFP4 = "gpt-oss-mxfp4"
    QWEN3_5 = "qwen3.5"
    QWEN3_NEXT = "qwen3-next"
    QWEN3_5_MOE = "qwen3.5-moe"
    QWEN3_VL_MOE = "qwen3-vl-moe"
    QWEN3_5_VL = "qwen3.5-vl"
    QWEN3_5_MOE_VL = "qwen3.5-moe-vl"
    SLIDING = "sliding"


# As transformers names their classes.
WITH_IMAGES = {Family.QWEN3_VL_MOE: "Qwen3VLMoe", Family.QWEN3_5_VL: "Qwen3_5", Family.QWEN3_5_MOE_VL: "Qwen3_5Moe"}


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
    if family in WITH_IMAGES:
        return target_with_images(family)
    if family == Family.GPT_OSS_MXFP4:
        return in_four_bits(*target(Family.GPT_OSS))
    if family in (Family.QWEN3_AWQ, Family.QWEN3_GPTQ):
        return by_groups(*target(Family.QWEN3), gptq=family == Family.QWEN3_GPTQ)
    if family == Family.LLAMA_MODELOPT:
        return in_eight_bits(*target(Family.LLAMA))
    shape = {**SHAPE, "num_hidden_layers": LAYERS}
    config = {
        Family.LLAMA: lambda: LlamaConfig(**shape),
        Family.QWEN3: lambda: Qwen3Config(**shape),
        Family.QWEN3_MOE: lambda: Qwen3MoeConfig(**shape, **UNSHARED),
        Family.QWEN3_NEXT: lambda: Qwen3NextConfig(**shape, **DELTA_NETS, **EXPERTS),
        Family.QWEN3_5_MOE: lambda: Qwen3_5MoeTextConfig(**shape, **DELTA_NETS, **EXPERTS),
        Family.QWEN3_5: lambda: Qwen3_5TextConfig(**shape, **DELTA_NETS),
        Family.GPT_OSS: lambda: GptOssConfig(**{**shape, **GPT_OSS}),
    }[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    raw = {**config.to_dict(), "architectures": [type(model).__name__], "full_attention_interval": LAYERS}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return raw, random_weights(shapes if family == Family.GPT_OSS else one_by_one(shapes))


def in_four_bits(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """gpt-oss with other random experts, in MXFP4: two numbers a byte, and an exponent for each 32 of a row's."""
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape  # not quantised each is transposed
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        # Their numbers have a root mean square of 2.9.
        exponent = round(-math.log2(2.9 * columns**0.5))
        tensors[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 127 + exponent, dtype=torch.uint8)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {**config, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}}, tensors


def by_groups(
    config: dict[str, Any], tensors: dict[str, Tensor], *, gptq: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A dense target with other random linear layers, in four bits with a scale for each group of a column's rows.

    Eight numbers an int32: along a column in GPTQ, along a row in AWQ. All zeros are 8, which GPTQ keeps as 7.
    """
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        columns, rows = tensors.pop(name).shape
        layer, groups = name.removesuffix("weight"), rows // GROUP
        packed = (rows // 8, columns) if gptq else (rows, columns // 8)
        tensors[f"{layer}qweight"] = torch.randint(-(2**31), 2**31, packed, dtype=torch.int32)
        tensors[f"{layer}qzeros"] = torch.full((groups, columns // 8), 0x77777777 if gptq else -0x77777778).int()
        # Numbers about their zero have a root mean square of 4.6.
        tensors[f"{layer}scales"] = torch.full((groups, columns), 1 / (4.6 * rows**0.5), dtype=torch.float16)
        if gptq:
            tensors[f"{layer}g_idx"] = torch.arange(rows, dtype=torch.int32) // GROUP
    own = {"desc_act": False, "sym": True} if gptq else {"zero_point": True}
    how = {"quant_method": "gptq" if gptq else "awq", "bits": 4, "group_size": GROUP, **own}
    return {**config, "quantization_config": how}, tensors


def in_eight_bits(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A dense target as ModelOpt writes it: scales for a linear layer's weights and for what goes into it, and for each
    layer's keys and values, which the cache holds in eight bits; no two layers' are the same.
    """
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        layer, weight = name.removesuffix("weight"), tensors[name]
        scale = weight.abs().max() / LARGEST_FP8
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{layer}weight_scale"], tensors[f"{layer}input_scale"] = scale, torch.tensor(16 / LARGEST_FP8)
    for i in range(LAYERS):
        for what, most in (("k", 10), ("v", 15)):  # of what a layer keeps; numbers of about 1
            tensors[f"model.layers.{i}.self_attn.{what}_proj.{what}_scale"] = torch.tensor(most * (i + 1) / LARGEST_FP8)
    cache = {"type": "float", "num_bits": 8, "dynamic": False}
    how = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": cache, "ignore": ["lm_head"]}
    return {**config, "quantization_config": how}, tensors


def target_with_images(family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same of one whose text model is a part, beside a vision tower."""
    import transformers

    text: dict[str, Any] = {**SHAPE, "num_hidden_layers": LAYERS}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    if family == Family.QWEN3_VL_MOE:
        text |= UNSHARED | {"rope_parameters": {**rope, "mrope_section": [12, 10, 10]}}
    else:
        text |= DELTA_NETS | (EXPERTS if family == Family.QWEN3_5_MOE_VL else {})
        text["rope_parameters"] = {**rope, "mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25}
    name = WITH_IMAGES[family]
    vision = {**VISION, "deepstack_visual_indexes": [0, 1, 2] if family == Family.QWEN3_VL_MOE else []}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **PLACES)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    raw = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    raw["text_config"]["full_attention_interval"] = LAYERS
    as_saved = turned if family == Family.QWEN3_VL_MOE else one_by_one
    tensors = random_weights(as_saved({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    tensors["lm_head.weight"][min(PLACES.values()) :] = 0
    return raw, tensors


def save_processor(folder: Path) -> None:
    """What makes tokens of words and images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    words = [f"t{i}" for i in range(min(PLACES.values()))]
    places = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words + places)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="t2", pad_token="t2", additional_special_tokens=places
    )
    shape = {"patch_size": PATCH, "merge_size": MERGED, "temporal_patch_size": 2}
    pixels = {"shortest_edge": (PATCH * MERGED) ** 2, "longest_edge": (8 * PATCH * MERGED) ** 2}
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**shape, size=pixels), fast, Qwen3VLVideoProcessor(**shape, size=pixels)
    ).save_pretrained(folder)


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


def turned(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Experts as those of Qwen3-VL have them: a layer's together, each matrix transposed."""
    return {
        name: (shape[0], shape[2], shape[1]) if ".experts." in name else shape for name, shape in shapes.items()
    }


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
    if family in WITH_IMAGES:
        save_processor(out_target)
    write(out_draft, *draft())


if __name__ == "__main__":
    typer.run(main)
