"""What is read from config.json, who serves a checkpoint, and every message about a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONVOLUTION, KINDS, LLAMA3, SELECTOR, SLIDING, VOCAB, H, config, weights
from safetensors.torch import save_file
from transformers import AutoConfig

from sglang_dflash.draft.checkpoint import INDEX, check_tensors, tensor_shapes_on_disk
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.embedded import DRAFT

TARGET = {"hidden_size": H, "vocab_size": VOCAB, "num_layers": 6}


def read(top: dict[str, Any] | None = None, **dflash: Any) -> DraftConfig:
    return DraftConfig.from_dict(config(top, **dflash))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_ours_and_sound(kind: str) -> None:
    raw = KINDS[kind]
    draft = DraftConfig.from_dict(raw)
    assert draft.served_by(weights(raw)) == ("ours", "")
    draft.check(**TARGET)
    assert list(draft.causal_layers) == raw["expected_causal"]


def test_the_embedded_draft_s_config() -> None:
    draft = DraftConfig.load(DRAFT)
    assert (draft.block_size, draft.max_depth, draft.causal, draft.mask_token_id) == (16, 15, True, 0)
    assert draft.target_layer_ids == (1, 14, 27)
    assert (draft.selector, draft.selector_rank, draft.selector_top_k) == ("tied", 128, 16)
    assert draft.draft_window == 256
    assert draft.served_by(tensor_shapes_on_disk(DRAFT)) == ("ours", "")
    draft.check(hidden_size=576, vocab_size=49152, num_layers=30)
    check_tensors(tensor_shapes_on_disk(DRAFT), draft, source=str(DRAFT))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "sliding", "DFlash2"])
def test_a_transformers_config_says_the_same_as_its_file(kind: str, tmp_path: Path) -> None:
    raw = {**KINDS[kind], "use_sliding_window": "sliding_window" in KINDS[kind], "max_window_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    from_transformers = DraftConfig.from_dict(AutoConfig.from_pretrained(tmp_path).to_dict())
    assert from_transformers == DraftConfig.load(tmp_path)


def test_target_layers_are_spread_evenly_where_none_are_named() -> None:
    raw = config({"num_hidden_layers": 5, "num_target_layers": 36})
    del raw["dflash_config"]["target_layer_ids"]
    assert DraftConfig.from_dict(raw).target_layer_ids == (1, 9, 17, 25, 33)


def test_windows_and_causality_by_layer() -> None:
    """A window of s is the token and s - 1 before it; DFlash's own number is the one that transformers keeps."""
    sliding = {"layer_types": SLIDING, "sliding_window": 6}
    assert (read(sliding).window_left, read(sliding).causal_layers) == ((5, -1, 5), (True, False, True))
    assert read(sliding, swa_window_size=9).window_left == (8, -1, 8)
    everywhere = read({"sliding_window": 6}, use_swa=True)
    assert (everywhere.window_left, everywhere.causal_layers) == ((5, 5, 5), (False, False, False))
    assert read({}, use_swa=True, swa_window_size=9, causal=True).causal
    assert read({"sliding_window": 6}, use_swa=False).window_left == (-1, -1, -1)
    assert read(sliding, is_causal=False).causal_layers == (False, False, False)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_what_is_copied_of_a_target_s_axes_says_nothing_of_a_draft(key: str) -> None:
    size = read().head_dim
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    axes = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    all_of_it = {"rope_dim": size, "partial_rotary_factor": 0.25}
    want = read({"head_dim": size, key: plain})
    assert want.served_by() == ("ours", "") and want.rope_theta == 1e6
    assert read({"head_dim": size, key: plain | axes}) == want
    assert read({"head_dim": size, key: plain | axes | all_of_it, "partial_rotary_factor": 0.25}) == want


def test_masks_that_are_predicted_from_themselves_are_the_usual_layout() -> None:
    assert read(sample_from_anchor=False).served_by() == ("ours", "")


def test_block_size_stands_at_either_level_and_dflash_config_s_is_first() -> None:
    assert read(block_size=5).block_size == 5
    assert read({"block_size": 9}).block_size == 9


@pytest.mark.parametrize(
    ("top", "dflash", "reason"),
    [
        ({"architectures": ["DFlashLagunaForCausalLM"]}, {}, "architecture DFlashLagunaForCausalLM"),
        ({}, {"projector_type": "domino"}, "projector_type domino"),
        ({"projector_type": "dspark"}, {}, "projector_type dspark"),
        ({}, {"lilicorr_rank": 4}, "LiLiCorr"),
        ({"gating": "per-head"}, {}, "gated attention"),
        ({}, {"attention_sink_bias": True}, "attention sinks"),
        ({}, {"attention_value_scale": 0.5}, "attention values"),
        ({"has_embed_tokens": True}, {}, "its own embedding"),
        ({"draft_vocab_size": 30}, {}, "its own vocabulary"),
        ({}, {"sample_from_anchor": True}, "shifted by one"),
        ({}, {"draft_shift": True}, "shifted by one"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "quantised"),
        ({"use_gemma_norm": True}, {}, "Gemma"),
        ({"hidden_act": "swigluoai"}, {}, "activation swigluoai"),
        ({}, {"attention_mode": "mla"}, "attention_mode mla"),
        ({"num_experts": 16}, {}, "mixture of experts"),
        ({"residual_multiplier": 0.2}, {}, "residual_multiplier 0.2"),
        ({"attn_logit_softcapping": 50.0}, {}, "attn_logit_softcapping 50.0"),
        ({"v_head_dim": 4}, {}, "keys and values of different sizes"),
        ({"rope_local_base_freq": 1e4}, {}, "each layer type's own"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, {}, "each layer type's own"),
        ({"draft_layer_types": ["kda"]}, {}, "draft_layer_types"),
        ({}, {"target_hidden_size": 64}, "features of another width"),
        ({"text_config": {"hidden_size": 32}}, {}, "nested text_config"),
        ({"layer_types": ["linear_attention"] * 3}, {}, "layer types"),
        ({"partial_rotary_factor": 0.5}, {}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "default", "rope_dim": 4}}, {}, "rotary positions"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, {}, "rotary positions"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, {}, "partial rotary"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, {}, "rope_type longrope"),
        ({"is_neox_style": False}, {}, "interleaved rotary"),
        ({}, {"mask_token": "<|MASK|>", "mask_token_id": None}, "mask_token by name"),
    ],
)
def test_what_is_not_ours_is_sglang_s(top: dict[str, Any], dflash: dict[str, Any], reason: str) -> None:
    who, why = read(top, **dflash).served_by()
    assert who == "sglang" and reason in why


def test_a_tensor_that_the_network_has_no_place_for_is_sglang_s() -> None:
    names = [*weights(config()), "model.embed_tokens.weight", "layers.0.self_attn.rotary_emb.inv_freq"]
    assert read().served_by(names) == ("ours", "")
    assert read().served_by([*names, "layers.0.self_attn.g_proj.weight"]) == (
        "sglang",
        "unknown tensor layers.0.self_attn.g_proj.weight",
    )


@pytest.mark.parametrize(
    ("top", "dflash", "message"),
    [
        ({"hidden_size": 64}, {}, "hidden_size 64 is not the target's 32"),
        ({"vocab_size": 62}, {}, "vocab_size 62 is not the target's 61"),
        ({}, {"target_layer_ids": [1, 6, -1]}, r"name layers \[6, -1\], but the target has layers 0 to 5"),
        ({}, {"target_layer_ids": []}, "target_layer_ids is empty"),
        ({}, {"target_layer_ids": "1,4"}, "target_layer_ids is '1,4'; it must be a list of integers"),
        ({}, {"mask_token_id": 61}, "mask_token_id 61 is outside the target's vocabulary of 61"),
        ({}, {"mask_token_id": None}, "mask_token_id -1 is outside"),
        ({"block_size": 0}, {}, "block_size is 0; it must be at least 2"),
        ({"block_size": 1}, {}, "block_size is 1; it must be at least 2"),
        ({"block_size": "16"}, {}, "block_size is '16'; it must be an integer"),
        ({"rms_norm_eps": "small"}, {}, "rms_norm_eps is 'small'; it must be a number"),
        ({"num_hidden_layers": None}, {}, "num_layers is 0"),
        ({"num_key_value_heads": 3}, {}, "4 is no multiple of num_key_value_heads 3"),
        ({"layer_types": ["full_attention"]}, {}, "1 layer_types for 3 layers"),
        ({"layer_types": ["sliding_attention"] * 3}, {}, "sliding_window is missing"),
        ({}, {"draft_window": -1}, "draft_window is -1; it must be at least 1, or left out"),
        ({}, {"draft_window": "256"}, "draft_window is '256'; it must be an integer"),
        ({}, {"output_multiplier": 0}, r"output_multiplier is 0\.0; it must be above 0"),
        ({"input_embedding_scale": -1}, {}, r"input_embedding_scale is -1\.0; it must be above 0"),
        ({}, {"input_embedding_scale": float("inf")}, "input_embedding_scale is inf"),
        ({}, {"use_swa": True}, r"or dflash_config\.use_swa is true, but sliding_window is missing"),
        ({}, {"final_logit_softcapping": -1}, r"final_logit_softcapping is -1\.0"),
        ({}, {"conv_kernel_size": 3}, "conv_kernel_size 3 and conv_group_size 0 must be given together"),
        ({}, {**CONVOLUTION, "conv_group_size": 5}, "conv_group_size 5 does not divide hidden_size 32"),
        ({}, {"selector_tied": True, "selector_top_k": 4}, "a tied selector needs .*selector_rank"),
        ({}, {**SELECTOR, "selector_top_k": None}, "a free selector needs .*selector_top_k"),
        ({"architectures": ["DFlash2DraftModel"]}, {}, "a free selector needs .*selector_rank"),
    ],
)
def test_a_wrong_config_is_refused(top: dict[str, Any], dflash: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(top, **dflash).check(**TARGET)


def test_a_missing_or_broken_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        DraftConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        DraftConfig.load(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The tied selector's checkpoint in two files."""
    state = weights(KINDS["tied selector"])
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def check_sharded(path: Path) -> None:
    check_tensors(tensor_shapes_on_disk(path), DraftConfig.from_dict(KINDS["tied selector"]), source=str(path))


def test_a_whole_checkpoint_passes(sharded: Path) -> None:
    check_sharded(sharded)


def test_a_missing_file_of_the_index_is_named(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors is missing"):
        check_sharded(sharded)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_a_truncated_file_is_named(sharded: Path, kept: int) -> None:
    file = sharded / "a.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or truncated"):
        check_sharded(sharded)


def test_an_index_that_disagrees_with_its_files_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"]["norm.weight"] == "a.safetensors"
    index["weight_map"]["norm.weight"] = "b.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"places tensor norm\.weight in b\.safetensors"):
        check_sharded(sharded)
    (sharded / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="not a safetensors index"):
        check_sharded(sharded)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        check_sharded(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm.weight", None, r"tensor norm\.weight missing"),
        ("candidate_selector.successor_projection.weight", None, "successor_projection.weight missing"),
        ("fc.weight", torch.zeros(H, H), r"fc\.weight has shape \[32, 32\]"),
    ],
)
def test_a_missing_or_misshaped_tensor_is_named(
    tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    state = {**weights(KINDS["tied selector"]), name: value}
    held = {n: tensor for n, tensor in state.items() if tensor is not None}
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        check_sharded(tmp_path)


def test_a_llama3_rope_is_read_and_the_default_is_none() -> None:
    assert read({"rope_scaling": LLAMA3}).rope_scaling == LLAMA3
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    draft = read({"rope_parameters": parameters})
    assert (draft.rope_theta, draft.rope_scaling) == (5e5, None)
