"""What a target is, as SGLang reads its checkpoint, and what of it no window pass serves."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dflash.checkpoints import Checkpoint
from sglang_dflash.platforms import Need

KV_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16"}  # those of --kv-cache-dtype that a model can have too
FP8 = "fp8_e4m3"  # and what the draft's is not then, which keeps the model's
GPT_OSS = "GptOssForCausalLM"
# Methods that quantise the embedding or the head whatever the checkpoint's config says.
QUANTISED_TABLES = ("gguf", "expert_pack")
# Models whose linear layers are gated delta nets of one kind; other models that have some differ around them.
DELTA_NETS = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
_TABLE = re.compile(r"(^|\.)(lm_head|embed_tokens)\.(?!weight$|bias$)")


@dataclass(frozen=True)
class Target:
    """A target's shape, and why this package does not serve it.

    dtype: of its activations, as torch names it. quantization: SGLang's name of the method, empty for none.
    needs: what not every attention backend does, in words. two_pools: SGLang keeps keys of sliding layers in a pool of
    their own, if it is let. full_layers: some layer slides not. unserved: why no platform serves it, empty if one may.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    head_dim: int
    dtype: str
    quantization: str
    needs: Mapping[Need, str]
    two_pools: bool
    full_layers: bool
    unserved: str

    @classmethod
    def of(cls, model_config: Any, checkpoint: Checkpoint, kv_cache_dtype: str) -> Target:
        """From SGLang's ModelConfig of it, where it is, and --kv-cache-dtype."""
        dtype = str(model_config.dtype).removeprefix("torch.")
        quantization = _quantization_config(model_config, checkpoint) if model_config.quantization else {}
        cache = _asked_cache(quantization if kv_cache_dtype == "auto" else {})
        return cls(
            hidden_size=model_config.hidden_size,
            vocab_size=model_config.vocab_size,
            num_layers=model_config.num_hidden_layers,
            head_dim=model_config.head_dim,
            dtype=dtype,
            quantization=model_config.quantization or "",
            needs=dict(_needs(model_config, cache, kv_cache_dtype)),
            two_pools=model_config.is_hybrid_swa,
            full_layers=model_config.full_attention_layer_ids != [],
            unserved=next(_unserved(model_config, checkpoint, quantization, cache, kv_cache_dtype, dtype), ""),
        )


def _unserved(
    model_config: Any,
    checkpoint: Checkpoint,
    quantization: Mapping[str, Any],
    cache: tuple[str, str],
    kv_cache_dtype: str,
    dtype: str,
) -> Iterator[str]:
    """quantization: what the checkpoint says of it; cache: as in `_asked_cache`, where the user leaves it to that."""
    yield from _unserved_layers(model_config)
    if kv_cache_dtype not in ("auto", FP8) and KV_DTYPES.get(kv_cache_dtype) != dtype:
        yield f"--kv-cache-dtype {kv_cache_dtype} is not the draft's, which is {dtype}"
    if model_config.quantization:
        yield from _unserved_tables(model_config.quantization, quantization, checkpoint.tensor_names())
    if cache[0] and not _in_eight_bits(model_config, cache[0]):
        yield f"the target's checkpoint asks for a quantised KV cache ({cache[1]})"


def _needs(model_config: Any, cache: tuple[str, str], kv_cache_dtype: str) -> Iterator[tuple[Need, str]]:
    architecture = model_config.hf_config.architectures[0]
    kinds = set(getattr(model_config.hf_text_config, "layer_types", None) or ())
    if model_config.is_hybrid_swa or "sliding_attention" in kinds:
        yield Need.WINDOWS, f"the target, {architecture}, has layers with a sliding window"
    if model_config.has_attention_sinks:
        yield Need.SINKS, f"the target, {architecture}, has attention sinks"
    if architecture in DELTA_NETS:
        yield Need.DELTA_NETS, f"the target, {architecture}, has gated delta nets"
        kinds.discard("linear_attention")
    if model_config.is_multimodal:
        yield Need.IMAGES, f"the target, {architecture}, reads images"
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        yield Need.OTHER_LAYERS, f"the target, {architecture}, has layers of {other[0]}"
    if kv_cache_dtype == FP8:
        yield Need.FP8_CACHE, f"--kv-cache-dtype {FP8} asks for keys and values in eight bits"
    elif _in_eight_bits(model_config, cache[0]):
        yield Need.FP8_CACHE, f"the target's checkpoint asks for keys and values in eight bits ({cache[1]})"


def _unserved_layers(model_config: Any) -> Iterator[str]:
    """What needs another KV pool than keys and values of all tokens, one row a slot; as SGLang tells them apart."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    architecture = model_config.hf_config.architectures[0]
    if model_config.attention_arch == AttentionArch.MLA:
        yield f"the target, {architecture}, has multi-head latent attention"
    keeps_state = model_config.attention_arch == AttentionArch.SSM or mambaish_config(model_config) is not None
    if keeps_state and architecture not in DELTA_NETS:
        yield f"the target, {architecture}, has layers that keep a state (Mamba, linear attention, convolutions)"
    if model_config.is_hybrid_swa and model_config.is_hybrid_swa_compress:
        yield f"the target, {architecture}, has sliding layers whose keys are of another shape"
    if model_config.is_local_attention_model:
        yield f"the target, {architecture}, has layers with chunked attention"
    if model_config.has_asymmetric_kv:
        yield f"the target, {architecture}, has keys and values of different sizes"


def _quantization_config(model_config: Any, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a checkpoint says of its quantisation: in its config, or in ModelOpt's file beside it."""
    from sglang.srt.model_loader.checkpoint_quantization import resolve_checkpoint_quant_spec

    found = resolve_checkpoint_quant_spec(model_config.hf_config)
    config: dict[str, Any] = dict(found.config) if found is not None else {}
    folder = checkpoint.folder()
    beside = folder and folder / "hf_quant_config.json"
    if beside and beside.is_file():
        config |= json.loads(beside.read_text(encoding="utf-8"))
    return config | (config.get("quantization") or {})


def _unserved_tables(method: str, config: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """The draft reads the target's embedding and head as matrices, and may read its codebooks off them."""
    named = next((name for name in sorted(names) if _TABLE.search(name)), "")
    if named:
        yield f"the target's embedding or head is quantised ({named})"
    if method in QUANTISED_TABLES or config.get("lm_head") or config.get("lm_head_quantized"):
        yield f"the target's embedding or head is quantised ({method})"


def _asked_cache(config: Mapping[str, Any]) -> tuple[str, str]:
    """The type that a checkpoint asks for of its keys and values, and how it says so; empty: the model's own."""
    if scheme := config.get("kv_cache_scheme"):
        in_eight_bits = isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
        return ("FP8", "kv_cache_scheme FP8") if in_eight_bits else ("a scheme's", "kv_cache_scheme")
    algorithm = config.get("kv_cache_quant_algo")
    return ("", "") if algorithm in (None, "auto") else (str(algorithm).upper(), f"kv_cache_quant_algo {algorithm}")


def _in_eight_bits(model_config: Any, cache: str) -> bool:
    """Whether SGLang's "auto" makes a cache of fp8_e4m3 of this type, with the checkpoint's scales of each layer."""
    return cache == "FP8" and str(model_config.quantization).startswith("modelopt")
