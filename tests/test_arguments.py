"""Arguments and drafts that cannot be served are refused with a message that helps, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.arg_groups import speculative_hook
from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.arg_groups.serving_hook import handle_missing_default_values
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_executor.cuda_graph_config import Phase, with_phase
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from sglang_dflash import embedded
from sglang_dflash.arguments import (
    _check_shares,
    _draft_config,
    _target,
    options_of,
    reason_to_hand_over,
    settle_arguments,
)
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.platforms import Need

MakeDraft = Callable[..., str]


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    load_plugins()


@pytest.fixture
def make_draft(tmp_path: Path) -> MakeDraft:
    """The embedded draft with changes: of config.json's top level, of its dflash_config, of its tensors."""

    def make(
        dflash: dict[str, Any] | None = None, drop: str | None = None, cut: bool = False, **top: Any
    ) -> str:
        config = json.loads((embedded.DRAFT / "config.json").read_text())
        config.update(top)
        config["dflash_config"].update(dflash or {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = tmp_path / "model.safetensors"
        shutil.copy(embedded.DRAFT / "model.safetensors", weights)
        if drop:
            tensors = load_file(weights)
            del tensors[drop]
            save_file(tensors, weights)
        if cut:
            weights.write_bytes(weights.read_bytes()[:10_000_000])
        return str(tmp_path)

    return make


def resolve(**arguments: Any) -> ServerArgs:
    args = ServerArgs(**{"model_path": "smollm2-135m", "speculative_algorithm": "DFLASH", **arguments})
    args.resolve_once()
    return args


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 512}, r"hidden_size 512 is not the target's 576"),
        ({"vocab_size": 32000}, r"vocab_size 32000 is not the target's 49152"),
        (
            {"dflash": {"target_layer_ids": [1, 14, 30]}},
            r"name layers \[30\], but the target has layers 0 to 29",
        ),
        ({"drop": "layers.1.mlp.up_proj.weight"}, r"tensor layers\.1\.mlp\.up_proj\.weight missing"),
        ({"cut": True}, r"damaged or truncated"),
        ({"dflash": {"mask_token_id": 49152}}, r"mask_token_id 49152 is outside the target's vocabulary"),
        ({"block_size": 0}, r"block_size is 0; it must be at least 2"),
        ({"block_size": 1}, r"block_size is 1; it must be at least 2"),
        (
            {"drop": "candidate_selector.hidden_projection.weight"},
            r"candidate_selector\.hidden_projection\.weight",
        ),
        ({"dflash": {"selector_rank": 0}}, r"needs dflash_config\.selector_rank, which is missing"),
        ({"dflash": {"selector_top_k": 33}}, r"selector_top_k 33 is above 32, .*: set it to 32 or less"),
    ],
)
def test_bad_drafts_are_named(make_draft: MakeDraft, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(speculative_draft_model_path=make_draft(**change))


@pytest.mark.parametrize(
    ("ranks", "change", "message"),
    [
        (2, {}, "draft's 9 attention heads cannot be shared evenly by --tp-size 2: give a size that divides them"),
        (9, {"num_key_value_heads": 2}, "draft's 2 key-value heads cannot be shared evenly by --tp-size 9"),
        (3, {"intermediate_size": 1000}, "draft's 1000 MLP columns cannot be shared evenly by --tp-size 3"),
        (9, {"intermediate_size": 1539}, ""),  # three ranks have the same key-value head
    ],
)
def test_a_draft_is_shared_evenly(ranks: int, change: dict[str, int], message: str) -> None:
    draft = DraftConfig.from_dict(json.loads((embedded.DRAFT / "config.json").read_text()) | change)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        _check_shares(ServerArgs(model_path="smollm2-135m", tp_size=ranks), draft)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}},
        {"block_size": 9},
        {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
        {"hidden_act": "gelu"},
    ],
)
def test_the_draft_is_read_as_its_network_is_given_it(make_draft: MakeDraft, overrides: dict[str, Any]) -> None:
    """--json-model-override-args changes the draft's config too, where SGLang makes its network."""
    args = ServerArgs(
        model_path=str(embedded.target_path()), speculative_algorithm="DFLASH",
        speculative_draft_model_path=make_draft(), json_model_override_args=json.dumps(overrides),
    )  # fmt: skip
    given = ModelConfig.from_server_args(args, model_path=args.speculative_draft_model_path, is_draft_model=True)
    assert _draft_config(args) == DraftConfig.from_dict(given.hf_config.to_dict())


def test_overrides_that_leave_the_draft_without_its_weights_are_named(make_draft: MakeDraft) -> None:
    with pytest.raises(ValueError, match=r"changed by --json-model-override-args .*num_attention_heads.*: tensor "):
        resolve(speculative_draft_model_path=make_draft(), json_model_override_args='{"num_attention_heads": 3}')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculative_num_draft_tokens": -1}, r"must be 0 \(plain decoding\) or more, got -1"),
        ({"speculative_num_steps": 16}, r"drafts 1 to 15 positions a step, but 16 were asked for"),
        ({"speculative_dflash_block_size": 1}, r"drafts 1 to 15 positions a step, but 0 were asked for"),
        (
            {"speculative_eagle_topk": 1, "speculative_num_draft_tokens": 20},
            r"a chain .* of 20 tokens .* is longer",
        ),
        (
            {"attention_backend": "torch_native", "page_size": 16},
            r"torch_native \(page size 16\) cannot read a tree",
        ),
        ({"speculative_draft_attention_backend": "triton"}, r"triton .* cannot read a tree"),
        (
            {"speculative_num_draft_tokens": 31, "speculative_num_steps": 1},
            r"31 is above 16, all the paths of 16 candidates a position in 1 positions: ask for 16 nodes or fewer, or",
        ),
        ({"speculative_num_draft_tokens": 300}, r"300 is above 255, the most nodes of a tree: ask for 255 or fewer"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(**arguments)


def test_what_only_sglang_serves_is_refused_where_sglang_cannot(make_draft: MakeDraft) -> None:
    with pytest.raises(ValueError, match=r"DFlashLagunaForCausalLM: only SGLang's own DFLASH serves that"):
        resolve(speculative_draft_model_path=make_draft(architectures=["DFlashLagunaForCausalLM"]))


def test_a_target_without_a_draft_is_refused(pair: embedded.Pair, tmp_path: Path) -> None:
    target = tmp_path / "another"
    target.mkdir()
    for file in pair.target.iterdir():
        (target / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=r"no draft for the target .*--speculative-draft-model-path"):
        resolve(model_path=str(target))


def test_names_and_defaults_of_the_embedded_pair(pair: embedded.Pair) -> None:
    args = resolve(speculative_draft_model_path="smollm2-135m")
    assert (args.model_path, args.speculative_draft_model_path) == (str(pair.target), str(pair.draft))
    by_path = resolve(model_path=str(pair.target))
    assert by_path.speculative_draft_model_path == str(pair.draft)
    plain = resolve(speculative_algorithm=None)
    assert plain.speculative_draft_model_path is None


@pytest.mark.parametrize(
    ("arguments", "nodes", "depth", "block", "window", "chain"),
    [
        ({"speculative_num_draft_tokens": 0}, 0, 0, 1, 1, False),
        ({"speculative_num_draft_tokens": 3, "speculative_num_steps": 3}, 3, 3, 4, 4, False),
        ({"speculative_num_draft_tokens": 31, "speculative_num_steps": 6}, 31, 6, 7, 32, False),
        (
            {"speculative_eagle_topk": 1, "speculative_num_draft_tokens": 6, "speculative_num_steps": 6},
            6, 6, 7, 7, True,
        ),
        ({"speculative_dflash_block_size": 5, "speculative_num_draft_tokens": 15}, 15, 4, 5, 16, False),
    ],
)
def test_one_tree_always_where_nodes_and_depth_are_given(
    arguments: dict[str, Any], nodes: int, depth: int, block: int, window: int, chain: bool
) -> None:
    options = options_of(resolve(**arguments))
    (shape,) = options.shapes
    got = (shape.nodes, shape.depth, shape.block, options.window, options.chain)
    assert got == (nodes, depth, block, window, chain)
    assert shape.most > 10_000


@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        ({}, {0: 0, 1: 1, 2: 2, 4: 4, 7: 7, 15: 10, 31: 15}),
        ({"speculative_num_draft_tokens": 15}, {0: 0, 1: 1, 2: 2, 4: 4, 7: 7, 15: 10}),
        ({"speculative_num_draft_tokens": 3}, {0: 0, 1: 1, 2: 2, 3: 3}),
        ({"speculative_num_draft_tokens": 63}, {0: 0, 1: 1, 2: 2, 4: 4, 7: 7, 15: 10, 31: 15, 63: 15}),
        ({"speculative_num_steps": 4}, {0: 0, 1: 1, 2: 2, 4: 4, 7: 4, 15: 4, 31: 4}),
        ({"speculative_eagle_topk": 1}, {0: 0, 1: 1, 2: 2, 4: 4, 7: 7, 10: 10, 15: 15}),
    ],
)
def test_otherwise_a_step_takes_one_of_several(arguments: dict[str, Any], shapes: dict[int, int]) -> None:
    """By nodes, how deep; wide ones for few requests, none for any number."""
    got = options_of(resolve(**arguments)).shapes
    assert {shape.nodes: shape.depth for shape in got} == shapes
    assert got[0].most > 10_000
    assert all(shape.most * shape.verified <= 1024 for shape in got[1:])


def test_a_default_is_no_more_than_the_lattice_holds(make_draft: MakeDraft) -> None:
    draft = make_draft(dflash={"selector_top_k": 5})
    options = options_of(resolve(speculative_draft_model_path=draft, speculative_num_steps=1))
    assert (options.largest.nodes, options.largest.depth, options.top_k) == (5, 1, 5)


@pytest.mark.parametrize(("nodes", "largest"), [(None, 15), (12, 12)])
def test_of_one_candidate_a_position_trees_are_as_deep_as_they_have_nodes(
    make_draft: MakeDraft, nodes: int | None, largest: int
) -> None:
    draft = make_draft(dflash={"selector_top_k": 1})
    options = options_of(resolve(speculative_draft_model_path=draft, speculative_num_draft_tokens=nodes))
    assert (options.largest.nodes, options.largest.depth) == (largest, largest)
    assert all(shape.nodes == shape.depth for shape in options.shapes)


@pytest.mark.parametrize(
    ("arguments", "leads"),
    [
        ({}, 12),
        ({"speculative_num_steps": 2, "speculative_num_draft_tokens": 72}, 8),  # 8 + 64 paths
        ({"speculative_num_steps": 1, "speculative_num_draft_tokens": 15}, 1),
        ({"speculative_eagle_topk": 1}, 12),
    ],
)
def test_leads_leave_as_many_candidates_as_fill_a_tree(arguments: dict[str, Any], leads: int) -> None:
    assert options_of(resolve(**arguments)).leads == leads


def test_a_bidirectional_block_is_drafted_whole(make_draft: MakeDraft) -> None:
    draft = make_draft(dflash={"causal_head": False})
    options = options_of(resolve(speculative_draft_model_path=draft, speculative_num_draft_tokens=3))
    assert [(s.nodes, s.depth, s.block) for s in options.shapes] == [(0, 0, 1), (1, 1, 16), (2, 2, 16), (3, 3, 16)]
    assert options.window == 16 and options.draft_widths() == {16: 512} and options.grown(16).nodes == 3


@pytest.mark.parametrize(
    ("of_config", "asked", "window"), [(None, None, 0), (640, None, 640), (640, 96, 96), (None, 9, 9)]
)
def test_a_draft_s_window_is_its_own_or_the_one_asked_for(
    make_draft: MakeDraft, of_config: int | None, asked: int | None, window: int
) -> None:
    args = resolve(
        speculative_draft_model_path=make_draft(dflash={"draft_window": of_config}),
        speculative_draft_window_size=asked,
        speculative_num_draft_tokens=31,  # SGLang refuses a window below its block of 32
    )
    assert resolving_view(args).speculative_draft_window_size is None  # SGLang would keep a cache of its own for it
    assert options_of(args).draft_window == window  # as every process asks, once arguments are settled


def reason(draft: str = str(embedded.DRAFT), target: str = "", **arguments: Any) -> str:
    """Why SGLang's own worker would serve a draft for a target, the embedded ones by default."""
    args = ServerArgs(model_path=target or str(embedded.ensure().target), speculative_draft_model_path=draft)
    for name, value in arguments.items():
        setattr(args, name, value)
    return reason_to_hand_over(args)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, ""),
        ({"tp_size": 3}, ""),
        ({"dp_size": 2}, ""),
        ({"pp_size": 2}, "--pp-size 2"),
        ({"attn_dp_size": 2}, "--attn-dp-size 2"),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode"),
        ({"speculative_draft_window_size": 512}, ""),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
        ({"enable_unified_memory": True}, "--enable-unified-memory"),
        ({"speculative_draft_model_quantization": "fp8"}, "--speculative-draft-model-quantization fp8"),
        ({"speculative_draft_model_quantization": "unquant"}, ""),
        ({"speculative_draft_kv_cache_dtype": "fp8_e4m3"}, "--speculative-draft-kv-cache-dtype fp8_e4m3"),
        ({"speculative_draft_kv_cache_dtype": "auto"}, ""),
        ({"kv_cache_dtype": "fp8_e4m3", "attention_backend": "triton"}, ""),
        ({"attention_backend": "triton"}, ""),
        ({"attention_backend": "flashinfer"}, ""),
        ({"kv_cache_dtype": "fp8_e4m3"}, ""),
        ({"kv_cache_dtype": "fp8_e4m3", "attention_backend": "fa4"}, "--kv-cache-dtype fp8_e4m3 asks for keys"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2 is not the draft's"),
        ({"kv_cache_dtype": "bf16"}, ""),
        ({"kv_cache_dtype": "bf16", "dtype": "float16"}, "--kv-cache-dtype bf16 is not the draft's, which is float16"),
        ({"enable_lora": True, "lora_target_modules": ["q_proj", "lm_head"]}, "the embedding or the head (lm_head)"),
        ({"enable_lora": True, "lora_target_modules": ["all"]}, "the embedding or the head (all)"),
        ({"enable_lora": True, "lora_target_modules": ["q_proj"]}, ""),
        ({"quantization": "fp8"}, ""),
    ],
)
def test_what_is_not_ours_to_serve_goes_to_sglang(on_hopper: None, arguments: dict[str, Any], told: str) -> None:
    got = reason(**arguments)
    assert told in got if told else got == ""


def test_an_adapter_says_itself_what_it_changes(on_hopper: None, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["v_proj", "embed_tokens"]}))
    for adapters in ([str(tmp_path)], [f"a={tmp_path}"], {"a": str(tmp_path)}):
        assert "LoRA adapters change the embedding or the head (embed_tokens)" in reason(lora_paths=adapters)
    assert reason(lora_paths=[str(tmp_path)], enable_lora=False) == ""


def test_a_draft_with_more_than_its_network_goes_to_sglang(on_hopper: None, make_draft: MakeDraft) -> None:
    assert "architecture" in reason(draft=make_draft(architectures=["DFlashLagunaForCausalLM"]))
    assert "residual_multiplier 2.0" in reason(draft=make_draft(residual_multiplier=2.0))
    assert reason(draft=make_draft(input_embedding_scale=2.0)) == ""


def test_a_mask_embedding_is_told_to_the_worker_and_checked_before_anything_is_loaded(
    on_hopper: None, make_draft: MakeDraft
) -> None:
    draft = make_draft()
    args = ServerArgs(model_path=str(embedded.ensure().target), speculative_draft_model_path=draft)
    assert options_of(args).mask_embedding is None
    file = Path(draft, "mask_embedding.pt")
    torch.save({"mask_token_id": 0, "embedding": torch.zeros(576)}, file)
    assert options_of(args).mask_embedding == file and reason(draft=draft) == ""
    settle(speculative_draft_model_path=draft)
    torch.save({"mask_token_id": 7, "embedding": torch.zeros(576)}, file)
    with pytest.raises(ValueError, match=r"mask_embedding\.pt is of mask token 7, and the draft's mask_token_id is 0"):
        settle(speculative_draft_model_path=draft)


NEMOTRON = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "M*-"}
QWEN = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "full_attention_interval": 4}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
TEXT = {
    **LINEAR, "hidden_size": 128, "vocab_size": 1000, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 256, "full_attention_interval": 4, "rope_parameters": {"rope_theta": 1e4},
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
QWEN_WITH_IMAGES = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {**TEXT, "model_type": "qwen3_5_text"},
    "vision_config": {"depth": 2, "model_type": "qwen3_5_vision"},
}
EXPERTS_WITH_IMAGES = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {**TEXT, "model_type": "qwen3_5_moe_text"},
    "vision_config": {"depth": 2, "model_type": "qwen3_5_moe_vision"},
}
FALCON = {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"] * 15,
}
MUSE = {
    "architectures": ["MuseGlimmerForCausalLM"],
    "model_type": "muse_glimmer",
    "layer_types": ["sliding_attention", "full_attention"] * 15,
    "no_rope_layers": [1, 0] * 15,
    "sliding_window": 16,
}
CHUNKED = {"layer_types": ["full_attention", "chunked_attention"] * 15}
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
PACKED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}, "ignore": []}


@pytest.fixture
def make_target(tmp_path: Path) -> Callable[..., str]:
    """The embedded target's config with changes, a tensor of the name given, and ModelOpt's file beside."""

    def make(tensor: str = "", beside: dict[str, Any] | None = None, **top: Any) -> str:
        config = json.loads((embedded.ensure().target / "config.json").read_text())
        target = tmp_path / "target"
        target.mkdir()
        (target / "config.json").write_text(json.dumps({**config, **top}))
        if tensor:
            save_file({tensor: torch.zeros(2)}, target / "model.safetensors")
        if beside:
            (target / "hf_quant_config.json").write_text(json.dumps({"quantization": beside}))
        return str(target)

    return make


@pytest.mark.parametrize(
    ("target", "arguments", "told"),
    [
        ({}, {}, ""),
        (NEMOTRON, {}, "NemotronHForCausalLM, has layers that keep a state"),
        (QWEN, {}, ""),
        (QWEN, {"dtype": "float32"}, "has gated delta nets, which window passes of plain_torch do not serve"),
        (QWEN_WITH_IMAGES, {}, ""),
        (FALCON, {}, "FalconH1ForCausalLM, has layers that keep a state"),
        (GPT_OSS, {}, ""),
        (MUSE, {}, ""),
        (GPT_OSS, {"attention_backend": "triton"}, ""),
        (GPT_OSS, {"attention_backend": "flashinfer"}, "with a sliding window, which window passes of flashinfer do"),
        (CHUNKED, {}, "LlamaForCausalLM, has layers of chunked_attention, which"),
        (DEEPSEEK, {}, "DeepseekV2ForCausalLM, has multi-head latent attention"),
        ({"head_dim": 80}, {}, "target's head size 80"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, {}, ""),
        ({"quantization_config": {**MODELOPT, "kv_cache_quant_algo": "FP8"}}, {}, ""),
        (
            {"quantization_config": {**MODELOPT, "kv_cache_quant_algo": "FP8"}}, {"attention_backend": "fa4"},
            "checkpoint asks for keys and values in eight bits (kv_cache_quant_algo FP8), which window passes of fa4",
        ),
        ({"quantization_config": {**MODELOPT, "kv_cache_quant_algo": "NVFP4"}}, {}, "(kv_cache_quant_algo NVFP4)"),
        ({"quantization_config": {**MODELOPT, "kv_cache_quant_algo": "FP8"}}, {"kv_cache_dtype": "bf16"}, ""),
        ({"beside": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, {}, ""),
        ({"beside": {"quant_algo": "FP8"}}, {}, ""),
        ({"quantization_config": {**MODELOPT, "kv_cache_scheme": {"num_bits": 8}}}, {}, "KV cache (kv_cache_scheme)"),
        ({"quantization_config": {**MODELOPT, "kv_cache_scheme": {"type": "float", "num_bits": 8}}}, {}, ""),
        (
            {"quantization_config": {**PACKED, "kv_cache_scheme": {"type": "float", "num_bits": 8}}}, {},
            "asks for a quantised KV cache (kv_cache_scheme FP8)",
        ),
        ({"quantization_config": MODELOPT, "tensor": "lm_head.weight_scale"}, {}, "(lm_head.weight_scale)"),
        ({"quantization_config": MODELOPT, "tensor": "model.embed_tokens.qweight"}, {}, "(model.embed_tokens.qweight)"),
        ({"quantization_config": MODELOPT, "tensor": "lm_head.weight"}, {}, ""),
        ({"quantization_config": {**AWQ, "lm_head": True}}, {}, "the target's embedding or head is quantised (awq)"),
    ],
)
def test_what_no_window_pass_serves_of_a_target(
    on_hopper: None, make_target: Callable[..., str], target: dict[str, Any], arguments: dict[str, Any], told: str
) -> None:
    got = reason(target=make_target(**target), **arguments)
    assert told in got if told else got == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"quantization": "fp8"}, "the target is quantised (fp8)"),
        ({"enable_lora": True}, "LoRA adapters are asked for"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3"),
    ],
)
def test_a_plain_cpu_serves_less(pair: embedded.Pair, arguments: dict[str, Any], told: str) -> None:
    assert told in reason(**arguments)


@pytest.mark.parametrize("given", [QWEN_WITH_IMAGES, EXPERTS_WITH_IMAGES])
def test_of_a_target_with_images_its_text_model_is_read(
    pair: embedded.Pair, make_target: Callable[..., str], given: dict[str, Any]
) -> None:
    """What stands beside it in the config, 576 wide, is not the model that a draft is for."""
    path = make_target(**given)
    target = _target(ServerArgs(model_path=path))
    assert (target.hidden_size, target.vocab_size, target.num_layers, target.head_dim) == (128, 1000, 4, 256)
    assert [*target.needs] == [Need.DELTA_NETS, Need.IMAGES] and target.unserved == "" == reason(target=path)
    assert reason(target=path, language_only=True) == "--language-only is asked for"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, ""),
        ({"mamba_radix_cache_strategy": "extra_buffer"}, ""),
        ({"mamba_radix_cache_strategy": "no_buffer"}, "--mamba-radix-cache-strategy no_buffer: give extra_buffer"),
        ({"mamba_radix_cache_strategy": "extra_buffer_lazy"}, "extra_buffer_lazy: give extra_buffer"),
        ({"mamba_radix_cache_strategy": "no_buffer", "disable_radix_cache": True}, ""),
        ({"tp_size": 2}, "has gated delta nets, and --tp-size 2 is more than one"),
        ({"enable_streaming_session": True}, "has gated delta nets, and --enable-streaming-session is asked for"),
        ({"enable_hierarchical_cache": True}, "has gated delta nets, and --enable-hierarchical-cache is asked for"),
    ],
)
def test_a_plain_cpu_serves_gated_delta_nets_whose_states_are_of_the_last_token(
    pair: embedded.Pair, make_target: Callable[..., str], arguments: dict[str, Any], told: str
) -> None:
    got = reason(target=make_target(**QWEN), **arguments)
    assert told in got if told else got == ""


def test_where_nodes_cost_states_fewer_are_drafted_unless_more_are_asked_for(
    pair: embedded.Pair, make_target: Callable[..., str]
) -> None:
    given = {"model_path": make_target(**QWEN), "speculative_draft_model_path": str(embedded.DRAFT)}
    assert options_of(ServerArgs(**given)).largest.nodes == 7
    assert options_of(ServerArgs(**given, speculative_num_draft_tokens=15)).largest.nodes == 15
    assert options_of(ServerArgs(**{**given, "model_path": str(pair.target)})).largest.nodes == 31


@pytest.mark.parametrize(
    ("target", "arguments", "join"),
    [
        ({}, {}, True),
        ({}, {"page_size": 16, "disable_overlap_schedule": True}, True),
        ({}, {"tp_size": 2}, False),
        ({}, {"enable_lora": True}, False),
        ({}, {"enable_hierarchical_cache": True}, False),
        ({}, {"enable_mixed_chunk": True}, False),
        ({}, {"kv_cache_dtype": "fp8_e4m3"}, False),
        (QWEN, {}, False),  # its states would go on behind the window before, whichever runs first
        (QWEN_WITH_IMAGES, {}, False),
        (MUSE, {}, False),
        (GPT_OSS, {}, False),
    ],
)
def test_prompts_join_where_a_window_can_go_on_behind_another(
    pair: embedded.Pair,
    make_target: Callable[..., str],
    target: dict[str, Any],
    arguments: dict[str, Any],
    join: bool,
) -> None:
    given = {"model_path": make_target(**target), "speculative_draft_model_path": str(embedded.DRAFT)}
    assert options_of(ServerArgs(**given, **arguments)).prompts_join is join


@pytest.mark.parametrize("family", [MUSE, GPT_OSS])
def test_a_plain_cpu_serves_sliding_targets_from_two_pools(
    pair: embedded.Pair, make_target: Callable[..., str], family: dict[str, Any]
) -> None:
    target = make_target(**family)
    assert reason(target=target) == "" and reason(target=target, disable_hybrid_swa_memory=True) == ""
    given = {"model_path": target, "speculative_draft_model_path": str(embedded.DRAFT)}
    assert not resolving_view(resolve(**given)).disable_hybrid_swa_memory
    assert resolving_view(resolve(**given, disable_hybrid_swa_memory=True)).disable_hybrid_swa_memory


def test_a_target_whose_layers_all_slide_has_one_pool(pair: embedded.Pair, make_target: Callable[..., str]) -> None:
    """Slots behind the window would be free for others, and the draft sees the context's keys there."""
    target = make_target(**{**MUSE, "layer_types": ["sliding_attention"] * 30})
    settled = resolve(model_path=target, speculative_draft_model_path=str(embedded.DRAFT))
    assert resolving_view(settled).disable_hybrid_swa_memory


def test_sliding_layers_with_keys_of_another_shape_are_handed_over(
    pair: embedded.Pair, make_target: Callable[..., str]
) -> None:
    gemma = make_target(architectures=["Gemma4ForCausalLM"], layer_types=MUSE["layer_types"])
    assert "Gemma4ForCausalLM, has sliding layers whose keys are of another shape" in reason(target=gemma)


def test_a_draft_does_not_inherit_its_targets_quantisation(on_hopper: None) -> None:
    settled = settle(quantization="fp8")
    assert (settled.quantization, settled.speculative_draft_model_quantization) == ("fp8", None)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are settled as on a machine with a Hopper GPU; nothing is run there."""
    cuda = SimpleNamespace(device_type="cuda", device_name="cuda", is_out_of_tree=lambda: False)
    monkeypatch.setattr("sglang.srt.platforms.current_platform", cuda)
    monkeypatch.setattr(speculative_hook, "current_platform", cuda)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    hopper = SimpleNamespace(shared_memory_per_block_optin=232_448)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: hopper)


def settle(**arguments: Any) -> Any:
    """What SGLang knows once DFLASH's arguments are settled; on its way there it chose graphs and a backend itself."""
    args = ServerArgs(model_path=str(embedded.ensure().target), speculative_draft_model_path=str(embedded.DRAFT))
    for name, value in arguments.items():
        setattr(args, name, value)
    handle_missing_default_values(args)
    parse_cuda_graph_config(args)
    graphs = resolving_view(args).cuda_graph_config
    if (Phase.PREFILL, "backend") not in args._cuda_graph_config_locked:  # SGLang's choice there
        graphs = with_phase(graphs, Phase.PREFILL, backend="breakable")
    if graphs.prefill.bs is None:
        graphs = with_phase(graphs, Phase.PREFILL, bs=[4, 2048, 2304, 8192], max_bs=8192)
    declare_resolution(args, "test", cuda_graph_config=graphs)
    settle_arguments(speculative_hook._resolve_dflash_draft_attention_backend, args)
    return resolving_view(args)


@pytest.mark.parametrize(
    ("asked", "backend", "decode", "prefill"),
    [
        ({"dtype": "auto"}, "fa3", "full", "full"),
        ({"dtype": "bfloat16"}, "fa3", "full", "full"),
        ({"cuda_graph_backend_prefill": "breakable"}, "fa3", "full", "breakable"),
        ({"disable_prefill_cuda_graph": True}, "fa3", "full", "disabled"),
        ({"tp_size": 3}, "fa3", "full", "breakable"),
        ({"enable_mixed_chunk": True}, "fa3", "full", "breakable"),
        ({"enable_lora": True}, "fa3", "full", "breakable"),
        ({"quantization": "fp8"}, "fa3", "full", "breakable"),
        ({"attention_backend": "flashinfer"}, "flashinfer", "full", "breakable"),
        ({"kv_cache_dtype": "fp8_e4m3", "attention_backend": "triton"}, "triton", "full", "breakable"),
        ({"kv_cache_dtype": "fp8_e4m3", "attention_backend": "flashinfer"}, "flashinfer", "full", "breakable"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "fa3", "full", "breakable"),
        ({"prefill_attention_backend": "flashinfer"}, "flashinfer", "full", "breakable"),
        ({"attention_backend": "triton"}, "triton", "full", "breakable"),
        ({"attention_backend": "fa4"}, "fa4", "full", "breakable"),
        ({"dtype": "float32"}, "plain_torch", "disabled", "disabled"),
    ],
)
def test_what_serves_on_cuda(
    on_hopper: None,
    asked: dict[str, Any],
    backend: str,
    decode: str,
    prefill: str,
) -> None:
    settled = settle(**asked)
    assert (settled.attention_backend, settled.speculative_draft_attention_backend) == (backend, backend)
    assert settled.mm_attention_backend == ("sdpa" if backend == "plain_torch" else None)
    graphs = settled.cuda_graph_config
    assert (graphs.decode.backend, graphs.prefill.backend) == (decode, prefill)
    assert graphs.prefill.full_prefill_max_req == (16 if prefill == "full" else None)  # whatever a prefill's chunk is
    assert graphs.prefill.bs == ([2, 4, 2048] if prefill == "full" else [4, 2048, 2304, 8192])
    assert graphs.prefill.max_bs == graphs.prefill.bs[-1]
    assert settled.speculative_num_draft_tokens == 64
    assert settled.speculative_draft_kv_cache_dtype == "auto", "else the draft's cache is of its target's type"


def test_sizes_of_prefill_graphs_that_the_user_names_are_captured(on_hopper: None) -> None:
    assert settle(cuda_graph_bs_prefill=[16, 4096]).cuda_graph_config.prefill.bs == [16, 4096]


def test_as_many_requests_run_as_there_are_graphs_for_and_each_joins_at_once(on_hopper: None) -> None:
    def admission(**arguments: Any) -> tuple[int, int]:
        settled = settle(**arguments)
        return settled.max_running_requests, settled.min_free_slots_delay

    most = settle().cuda_graph_config.decode.max_bs
    assert admission() == (max(48, most or 0), 1)
    assert admission(max_running_requests=7, min_free_slots_delay=3) == (7, 3)
    fixed = settle(speculative_num_draft_tokens=31, speculative_num_steps=15)
    assert fixed.max_running_requests is None  # SGLang's to say: each of them needs 32 rows of logits


def test_sliding_layers_have_a_pool_of_their_own_on_cuda_too(
    on_hopper: None, make_target: Callable[..., str]
) -> None:
    settled = settle(model_path=make_target(**GPT_OSS))
    assert not settled.disable_hybrid_swa_memory
    assert settled.speculative_num_draft_tokens == 32, "that pool is sized by it"


def test_a_draft_takes_its_targets_type(on_hopper: None, make_draft: MakeDraft) -> None:
    settled = settle(speculative_draft_model_path=make_draft(dtype="float32"))
    assert settled.dtype == "bfloat16"  # by "auto", SGLang would load this draft as float16
    assert settle(dtype="float16").dtype == "float16"


def test_another_attention_backend_on_cuda_is_sglangs_to_serve(on_hopper: None) -> None:
    settled = settle(attention_backend="flex_attention")
    assert (settled.attention_backend, settled.speculative_num_draft_tokens) == ("flex_attention", None)


def test_a_lattice_that_a_gpu_has_no_room_for_is_refused(
    on_hopper: None, make_draft: MakeDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = make_draft(block_size=24, dflash={"selector_top_k": 32})
    arguments = {"speculative_draft_model_path": wide, "speculative_num_steps": 23, "speculative_num_draft_tokens": 31}
    assert settle(**arguments).speculative_num_draft_tokens == 32
    ada = SimpleNamespace(shared_memory_per_block_optin=101_376)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: ada)
    with pytest.raises(ValueError, match=r"23 positions of 32 candidates .* this one has 101376 a block: ask for few"):
        settle(**arguments)


def test_what_means_another_thing_or_nothing_is_said_once(on_hopper: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sglang_dflash")
    settle()
    assert len(caplog.messages) == 1
    caplog.clear()
    settle(
        speculative_eagle_topk=4,
        speculative_accept_threshold_single=0.5,
        speculative_use_block_verification=True,
    )
    told, single, block, served = caplog.messages
    assert "--speculative-eagle-topk 4 asks for a tree" in told
    assert "--speculative-accept-threshold-single 0.5 has no effect: a drafted token is accepted if" in single
    assert "--speculative-use-block-verification has no effect" in block
    assert "trees of 1 node, 1 deep; 2 nodes, 2 deep; 4" in served
    assert "63 nodes, 15 deep; or none, by what pays" in served


def test_a_draft_on_the_hub_is_checked_as_one_in_a_directory(
    on_hopper: None, make_draft: MakeDraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = Path(make_draft(drop="layers.1.mlp.up_proj.weight"))
    snapshot = tmp_path / "cache" / "models--some--draft" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (folder / file).rename(snapshot / file)
    refs = tmp_path / "cache" / "models--some--draft" / "refs"
    refs.mkdir()
    (refs / "v2").write_text("a" * 40)
    with pytest.raises(ValueError, match=r"some/draft: tensor layers\.1\.mlp\.up_proj\.weight missing"):
        settle(
            speculative_draft_model_path="some/draft",
            speculative_draft_model_revision="v2",
            download_dir=str(tmp_path / "cache"),
        )
