"""Arguments and drafts that cannot be served are refused with a message that helps, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sglang.srt.arg_groups import speculative_hook
from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from sglang_dflash import embedded
from sglang_dflash.arguments import options_of, reason_to_hand_over, settle_arguments

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
    ],
)
def test_bad_drafts_are_named(make_draft: MakeDraft, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(speculative_draft_model_path=make_draft(**change))


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
        ({"speculative_num_draft_tokens": 3}, 3, 3, 4, 4, False),
        ({"speculative_num_draft_tokens": 31, "speculative_num_steps": 6}, 31, 6, 7, 32, False),
        ({"speculative_eagle_topk": 1, "speculative_num_draft_tokens": 7}, 7, 7, 8, 8, True),
        ({"speculative_dflash_block_size": 5, "speculative_num_draft_tokens": 15}, 15, 4, 5, 16, False),
    ],
)
def test_what_arguments_mean(
    arguments: dict[str, Any], nodes: int, depth: int, block: int, window: int, chain: bool
) -> None:
    options = options_of(resolve(**arguments))
    got = (options.nodes, options.depth, options.block, options.window, options.chain)
    assert got == (nodes, depth, block, window, chain)


def test_a_bidirectional_block_is_drafted_whole(make_draft: MakeDraft) -> None:
    draft = make_draft(dflash={"causal_head": False})
    options = options_of(resolve(speculative_draft_model_path=draft, speculative_num_draft_tokens=3))
    assert (options.nodes, options.depth, options.block, options.window) == (3, 3, 16, 16)


def test_sizes_that_are_not_ours_go_to_sglang(make_draft: MakeDraft) -> None:
    def reason(**arguments: Any) -> str:
        draft = arguments.pop("draft", str(embedded.DRAFT))
        return reason_to_hand_over(
            ServerArgs(model_path="x", speculative_draft_model_path=draft, **arguments)
        )

    assert reason() == ""
    assert "tp-size 2" in reason(tp_size=2)
    assert "windowed" in reason(speculative_draft_window_size=512)
    assert "architecture" in reason(draft=make_draft(architectures=["DFlashLagunaForCausalLM"]))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are settled as on a machine with a Hopper GPU; nothing is run there."""
    cuda = SimpleNamespace(device_type="cuda", device_name="cuda", is_out_of_tree=lambda: False)
    monkeypatch.setattr("sglang.srt.platforms.current_platform", cuda)
    monkeypatch.setattr(speculative_hook, "current_platform", cuda)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))


def settle(**arguments: Any) -> Any:
    """What SGLang knows once DFLASH's arguments are settled; on its way there it chose graphs and a backend itself."""
    args = ServerArgs(model_path=str(embedded.ensure().target), speculative_draft_model_path=str(embedded.DRAFT))
    for name, value in {"cuda_graph_backend_prefill": "breakable", **arguments}.items():
        setattr(args, name, value)
    parse_cuda_graph_config(args)
    settle_arguments(speculative_hook._resolve_dflash_draft_attention_backend, args)
    return resolving_view(args)


@pytest.mark.parametrize(
    ("dtype", "backend", "decode", "prefill"),
    [
        ("auto", "fa3", "full", "breakable"),
        ("bfloat16", "fa3", "full", "breakable"),
        ("float32", "plain_torch", "disabled", "disabled"),
    ],
)
def test_what_serves_on_cuda(on_hopper: None, dtype: str, backend: str, decode: str, prefill: str) -> None:
    settled = settle(dtype=dtype)
    assert (settled.attention_backend, settled.speculative_draft_attention_backend) == (backend, backend)
    graphs = settled.cuda_graph_config
    assert (graphs.decode.backend, graphs.prefill.backend) == (decode, prefill)
    assert settled.speculative_num_draft_tokens == 16


def test_another_attention_backend_on_cuda_is_sglangs_to_serve(on_hopper: None) -> None:
    settled = settle(attention_backend="triton")
    assert (settled.attention_backend, settled.speculative_num_draft_tokens) == ("triton", None)
