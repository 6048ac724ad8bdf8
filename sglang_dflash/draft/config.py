"""What a draft checkpoint's config.json says, and who serves it. Imports neither SGLang nor torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sglang_dflash.draft.checkpoint import unknown_names

# The architectures registered over SGLang's own. The third is DFlash2 under another name.
ARCHITECTURES = ("DFlashDraftModel", "DFlash2DraftModel", "DFlash2BeamDraftModel")

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# Scales and caps that other networks have, which ours would leave out; at these values nothing is left out.
NEUTRAL = {
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "attn_logit_softcapping": (None, 0),
}


@dataclass(frozen=True)
class DraftConfig:
    """A draft checkpoint's shape, DFlash (arXiv 2602.06036) and its kin.

    Reading never fails on what a field means: `served_by` says who serves the checkpoint, `check` what is
    wrong with it. An integer that the checkpoint lacks is 0 here (mask_token_id: -1).
    """

    architecture: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    attention_bias: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_positions: int

    block_size: int
    """Tokens of a full block: the bonus token and block_size - 1 masks."""
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    """0-based target layers whose outputs, concatenated in this order, are the features."""
    causal_layers: tuple[bool, ...]
    """Per layer: a token of the block sees no token after it in the block."""
    window_left: tuple[int, ...]
    """Per layer: how many positions before its own a token sees; -1: all."""

    embedding_scale: float
    """Of the block's tokens, as the target's embedding gives them."""
    output_multiplier: float
    softcap: float | None
    conv_taps: int
    """Taps of the grouped convolutions along the block (DFlash2); 0: none."""
    conv_group_size: int

    selector: Literal["none", "tied", "free"]
    selector_rank: int
    selector_top_k: int
    selector_eps: float

    draft_window: int
    """How many of the committed tokens, the last ones, a block sees; 0: all."""

    unserved: str
    """Why this package does not serve the checkpoint; empty if it does."""

    @property
    def causal(self) -> bool:
        """The first d positions of a block have the same scores when drafted alone, for any d."""
        return all(self.causal_layers)

    @property
    def num_features(self) -> int:
        return len(self.target_layer_ids)

    @property
    def max_depth(self) -> int:
        """Most tokens one draft pass can give."""
        return self.block_size - 1

    @classmethod
    def load(cls, path: str | Path) -> DraftConfig:
        """Read config.json of the checkpoint directory `path`. Raises ValueError if there is none or it is no
        JSON.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ValueError(f"Draft checkpoint {path} has no config.json: give a directory that holds one.")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"Draft config {file} is not valid JSON ({error}): download it again."
            ) from error
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DraftConfig:
        """Read a config.json's content, or a transformers config's `to_dict()`."""
        raw = _on_one_axis(raw)
        dflash: Mapping[str, Any] = raw.get("dflash_config") or {}
        both = {**raw, **dflash}  # these keys stand at either level, dflash_config's own first
        rope_theta, rope_scaling = _rope(raw)
        num_layers, num_heads = _int(raw, "num_hidden_layers"), _int(raw, "num_attention_heads")
        architecture = (raw.get("architectures") or ["none"])[0]
        selector_rank = _int(dflash, "selector_rank")
        return cls(
            architecture=architecture,
            model_type=raw.get("model_type", ""),
            hidden_size=_int(raw, "hidden_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_int(raw, "num_key_value_heads", num_heads),
            head_dim=_int(raw, "head_dim", _int(raw, "hidden_size") // max(num_heads, 1)),
            intermediate_size=_int(raw, "intermediate_size"),
            vocab_size=_int(raw, "vocab_size"),
            rms_eps=_float(raw, "rms_norm_eps", 1e-6),
            attention_bias=bool(raw.get("attention_bias", False)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=_int(raw, "max_position_embeddings", 32768),
            block_size=_int(both, "block_size"),
            mask_token_id=_int(both, "mask_token_id", -1),
            target_layer_ids=_target_layer_ids(both, num_layers),
            causal_layers=_causal_layers(raw, dflash, num_layers),
            window_left=_window_left(raw, dflash, num_layers),
            embedding_scale=_float(both, "input_embedding_scale", 1.0),
            output_multiplier=_float(dflash, "output_multiplier", 1.0),
            softcap=_float(dflash, "final_logit_softcapping", 0.0) or None,
            conv_taps=_int(dflash, "conv_kernel_size"),
            conv_group_size=_int(dflash, "conv_group_size"),
            selector=_selector(architecture, dflash, selector_rank),
            selector_rank=selector_rank,
            selector_top_k=_int(dflash, "selector_top_k"),
            selector_eps=_float(dflash, "selector_eps", 1e-6),
            draft_window=_int(dflash, "draft_window"),
            unserved=next(_unserved(raw, dflash, architecture, rope_scaling), ""),
        )

    def served_by(self, tensors: Iterable[str] = ()) -> tuple[Literal["ours", "sglang"], str]:
        """Who serves the checkpoint, and why not this package.

        tensors: the checkpoint's tensor names (`checkpoint.tensor_shapes_on_disk`). One that our network has
        no place for would be left out silently, so it hands the checkpoint over too.
        """
        if self.unserved:
            return "sglang", self.unserved
        unknown = unknown_names(tensors, self)
        return ("sglang", f"unknown tensor {unknown[0]}") if unknown else ("ours", "")

    def check(self, *, hidden_size: int, vocab_size: int, num_layers: int) -> None:
        """Raise ValueError, naming value and cure, unless the draft is sound and made for this target."""
        self.check_draft()
        if self.hidden_size != hidden_size:
            raise ValueError(
                f"The draft's hidden_size {self.hidden_size} is not the target's {hidden_size}: "
                "it was trained for another target. Give a draft made for this one."
            )
        if self.vocab_size != vocab_size:
            raise ValueError(
                f"The draft's vocab_size {self.vocab_size} is not the target's {vocab_size}: "
                "it was trained for another vocabulary. Give a draft made for this target."
            )
        wrong = [i for i in self.target_layer_ids if not 0 <= i < num_layers]
        if wrong:
            raise ValueError(
                f"The draft's target_layer_ids {list(self.target_layer_ids)} name layers {wrong}, but the "
                f"target has layers 0 to {num_layers - 1}: it was trained for another target. "
                "Give a draft made for this one."
            )
        if not 0 <= self.mask_token_id < vocab_size:
            raise ValueError(
                f"The draft's mask_token_id {self.mask_token_id} is outside the target's vocabulary of "
                f"{vocab_size} tokens: correct it in the draft's config.json."
            )

    def check_draft(self) -> None:
        """Raise ValueError, naming field and value, unless the fields make a network whatever the target."""
        for field in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"Draft config: {field} is {getattr(self, field)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"Draft config: num_attention_heads {self.num_heads} is no multiple of num_key_value_heads "
                f"{self.num_kv_heads}."
            )
        if self.block_size < 2:
            raise ValueError(
                f"Draft config: block_size is {self.block_size}; it must be at least 2, "
                "for the bonus token and a mask."
            )
        if not self.target_layer_ids:
            raise ValueError(
                "Draft config: dflash_config.target_layer_ids is empty; it must name target layers."
            )
        for field, per_layer in (("layer_types", self.causal_layers), ("sliding windows", self.window_left)):
            if len(per_layer) != self.num_layers:
                raise ValueError(
                    f"Draft config: {len(per_layer)} {field} for {self.num_layers} layers; give one a layer."
                )
        if 0 in self.window_left:
            raise ValueError(
                "Draft config: layer_types has sliding_attention, or dflash_config.use_swa is true, but sliding_window "
                "is missing or below 2 (transformers drops it unless use_sliding_window is true; "
                "dflash_config.swa_window_size stays)."
            )
        if self.draft_window < 0:
            raise ValueError(
                f"Draft config: dflash_config.draft_window is {self.draft_window}; it must be at least 1, or left out."
            )
        for field, factor in (
            ("input_embedding_scale", self.embedding_scale),
            ("output_multiplier", self.output_multiplier),
        ):
            if not 0 < factor < float("inf"):
                raise ValueError(f"Draft config: {field} is {factor}; it must be above 0, and finite.")
        if self.softcap is not None and self.softcap < 0:
            raise ValueError(
                f"Draft config: final_logit_softcapping is {self.softcap}; it must not be below 0."
            )
        self._check_convolutions()
        self._check_selector()

    def _check_convolutions(self) -> None:
        if bool(self.conv_taps) != bool(self.conv_group_size):
            raise ValueError(
                f"Draft config: conv_kernel_size {self.conv_taps} and conv_group_size {self.conv_group_size} "
                "must be given together."
            )
        if self.conv_taps and self.hidden_size % self.conv_group_size:
            raise ValueError(
                f"Draft config: conv_group_size {self.conv_group_size} does not divide "
                f"hidden_size {self.hidden_size}."
            )

    def _check_selector(self) -> None:
        if self.selector == "none":
            return
        for field in ("selector_rank", "selector_top_k"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"Draft config: a {self.selector} selector needs dflash_config.{field}, which is "
                    f"{getattr(self, field) or 'missing'}."
                )


def _int(raw: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"Draft config: {key} is {value!r}; it must be an integer.")
    return value


def _float(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"Draft config: {key} is {value!r}; it must be a number.")
    return float(value)


def _on_one_axis(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without what a config copies of its target's positions and a draft, which counts tokens, has no use for, as
    SGLang reads it: how axes share a head, and which part of a head rotates where rope_dim says that all of it does.
    """
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    scaling = raw.get(key) or {}
    if _rope_type(scaling) != "default":
        return raw
    copied = {"mrope_section", "mrope_interleaved"}
    if scaling.get("rope_dim") is not None and scaling["rope_dim"] == raw.get("head_dim"):
        copied |= {"rope_dim", "partial_rotary_factor"}
        raw = {name: value for name, value in raw.items() if name != "partial_rotary_factor"}
    return {**raw, key: {name: value for name, value in scaling.items() if name not in copied}}


def _rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """theta, and the scaling or None if there is none. transformers 5 keeps both in rope_parameters."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = _float({**raw, **scaling}, "rope_theta", 10000.0)
    scaling = {key: value for key, value in scaling.items() if key != "rope_theta"}
    plain = set(scaling) <= {"rope_type", "type"} and _rope_type(scaling) == "default"
    return theta, None if plain else scaling


def _rope_type(scaling: Mapping[str, Any]) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _target_layer_ids(both: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Explicit, or DFlash's default: one a draft layer, evenly spread from layer 1 to the third last."""
    ids = both.get("target_layer_ids")
    if ids is not None:
        if not isinstance(ids, list | tuple) or any(
            isinstance(i, bool) or not isinstance(i, int) for i in ids
        ):
            raise ValueError(f"Draft config: target_layer_ids is {ids!r}; it must be a list of integers.")
        return tuple(ids)
    target_layers = _int(both, "num_target_layers")
    if not target_layers:
        return ()
    if num_layers == 1:
        return (target_layers // 2,)
    return tuple(round(1 + i * (target_layers - 4) / (num_layers - 1)) for i in range(num_layers))


def _layer_types(raw: Mapping[str, Any], num_layers: int) -> list[str]:
    return raw.get("layer_types") or ["full_attention"] * num_layers


def _causal_layers(raw: Mapping[str, Any], dflash: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """`causal` (vLLM) and `causal_head` (JetSpec) in dflash_config, else `is_causal`, speak for all layers;
    where none does, a layer that layer_types calls sliding is causal and a full one is not.
    """
    spoken = ("causal", "causal_head", "is_causal")
    for value in (*map(dflash.get, spoken), raw.get("is_causal")):
        if value is not None:
            return (bool(value),) * num_layers
    return tuple(kind == "sliding_attention" for kind in _layer_types(raw, num_layers))


def _window_left(raw: Mapping[str, Any], dflash: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """A checkpoint's window counts the token itself; ours does not. A missing one becomes 0, which `check`
    refuses. ModelOpt's `use_swa` lets every layer slide, and leaves layer_types at full attention.
    """
    window = max(_int(dflash, "swa_window_size", _int(raw, "sliding_window")) - 1, 0)
    slides = [bool(dflash.get("use_swa")) or kind == "sliding_attention" for kind in _layer_types(raw, num_layers)]
    return tuple(window if sliding else -1 for sliding in slides)


def _selector(architecture: str, dflash: Mapping[str, Any], rank: int) -> Literal["none", "tied", "free"]:
    if dflash.get("selector_tied"):
        return "tied"
    return "free" if rank or architecture.startswith("DFlash2") else "none"


def _unserved(
    raw: Mapping[str, Any],
    dflash: Mapping[str, Any],
    architecture: str,
    rope_scaling: Mapping[str, Any] | None,
) -> Iterator[str]:
    """Why this package does not serve a checkpoint, the most telling reason first."""
    both = {**raw, **dflash}
    scaling = rope_scaling or {}
    if raw.get("transformer_layer_config"):
        yield f"the format of Speculators ({raw.get('speculators_model_type')}, {architecture})"
    if architecture not in ARCHITECTURES:
        yield f"architecture {architecture}"
    if both.get("projector_type") not in (None, "", "none", "dflash", "dflash2"):
        yield f"projector_type {both['projector_type']}"
    if any(key.startswith("lilicorr_") for key in dflash):
        yield "a LiLiCorr head"
    if raw.get("gating") not in (None, False, "disabled"):
        yield "gated attention"
    if both.get("attention_sink_bias"):
        yield "attention sinks"
    if both.get("attention_value_scale") not in (None, 1.0):
        yield "scaled attention values"
    for key, neutral in NEUTRAL.items():
        if both.get(key) not in neutral:
            yield f"{key} {both[key]}"
    if raw.get("v_head_dim") not in (None, 0, raw.get("head_dim")):
        yield "keys and values of different sizes"
    if raw.get("has_embed_tokens") or raw.get("has_lm_head"):
        yield "its own embedding or head"
    if raw.get("draft_vocab_size") not in (None, raw.get("vocab_size")):
        yield "its own vocabulary"
    if both.get("sample_from_anchor") or both.get("draft_shift"):
        yield "a block shifted by one position"
    if raw.get("quantization_config") or raw.get("compression_config"):
        yield "quantised weights"
    if raw.get("use_gemma_norm"):
        yield "Gemma's RMS norm"
    if raw.get("hidden_act", "silu") != "silu":
        yield f"activation {raw['hidden_act']}"
    if both.get("attention_mode") not in (None, "gqa", "mha"):
        yield f"attention_mode {both['attention_mode']}"
    if raw.get("n_routed_experts") or raw.get("num_experts"):
        yield "a mixture of experts"
    if raw.get("draft_layer_types"):
        yield "draft_layer_types"
    if both.get("target_hidden_size") not in (None, raw.get("hidden_size")):
        yield "features of another width"
    if raw.get("text_config"):
        yield "a nested text_config"
    if any(kind not in LAYER_TYPES for kind in raw.get("layer_types") or ()):
        yield "layer types other than full and sliding attention"
    if {**raw, **scaling}.get("partial_rotary_factor") not in (None, 1.0):
        yield "partial rotary positions"
    if {"rope_dim", "mrope_section", "mrope_interleaved"} & set(scaling):
        yield "multi-axis or partial rotary positions"
    if set(LAYER_TYPES) & set(scaling) or raw.get("rope_local_base_freq"):
        yield "rotary positions of each layer type's own"
    if _rope_type(scaling) not in ROPE_TYPES:
        yield f"rope_type {_rope_type(scaling)}"
    if raw.get("rope_is_neox_style") is False or raw.get("is_neox_style") is False:
        yield "interleaved rotary positions"
    if both.get("mask_token_id") is None and both.get("mask_token"):
        yield "mask_token by name"
