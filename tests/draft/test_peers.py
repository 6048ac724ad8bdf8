"""Checkpoints made and saved by other projects' classes: z-lab's own model and SpecForge's trainer are the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config

from sglang_dflash.draft.checkpoint import check_tensors, load_mask_embedding, tensor_shapes_on_disk
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.draft.lattice import Candidates
from sglang_dflash.draft.network import EntryClass
from sglang_dflash.draft.selector import build_selector

H, VOCAB, BLOCK, WINDOW, MASK, FEATURES = 32, 61, 7, 4, 3, 2
SHORT, LONG = 2, 23  # contexts, in tokens: below the sliding window and beyond it
LAYERS = {"S": "sliding_attention", "F": "full_attention"}
DFLASH2 = {"conv_kernel_size": 3, "conv_group_size": 4, "selector_rank": 8, "selector_top_k": 5}


def peers_config(layers: str = "FFF", top: dict[str, Any] | None = None, **dflash: Any) -> Qwen3Config:
    """A draft's, layer by layer S or F; a block is wider than the window, unless told otherwise."""
    return Qwen3Config(
        hidden_size=H, intermediate_size=48, num_hidden_layers=len(layers), num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=VOCAB, max_position_embeddings=128, num_target_layers=6,
        block_size=BLOCK, layer_types=[LAYERS[kind] for kind in layers], use_sliding_window="S" in layers,
        dflash_config={"mask_token_id": MASK, "target_layer_ids": [1, 4], **dflash},
        **{"sliding_window": WINDOW if "S" in layers else None, **(top or {})},
    )  # fmt: skip


def saved(model: Any, folder: Path) -> Any:
    """The peer's model with random weights of the usual sizes, saved by itself."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape)
        weight.data = 1 + 0.3 * noise if "norm" in name else noise / weight.shape[-1] ** 0.5
    model.save_pretrained(folder)
    return model.eval()


def ours(folder: Path) -> Any:
    """The network of a directory, checked and loaded as a server does it."""
    draft, shapes = DraftConfig.load(folder), tensor_shapes_on_disk(folder)
    assert draft.served_by(shapes) == ("ours", "")
    draft.check(hidden_size=H, vocab_size=VOCAB, num_layers=6)
    check_tensors(shapes, draft, source=str(folder))
    raw = json.loads((folder / "config.json").read_text())
    network = {cls.__name__: cls for cls in EntryClass}[draft.architecture](raw)
    network.load_weights((name, t) for file in folder.glob("*.safetensors") for name, t in load_file(file).items())
    return network


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def our_hidden(network: Any, bench: Any, features: Tensor, tokens: Tensor, embedding: Tensor) -> Tensor:
    """Our hidden states of a block [w, H] behind the features of a context [T, features * H]."""
    table = bench(network, requests=1, room=64)
    table.write(0, network.project_features(features))
    return table.tokens(tokens[None], lambda ids: embedding[ids], [len(features)])[0]


def block_tokens() -> Tensor:
    tokens = torch.full((BLOCK,), MASK)
    tokens[0] = 9
    return tokens


ZLAB = {
    "DFlash": ("DFlashDraftModel", peers_config()),
    "biases": ("DFlashDraftModel", peers_config(top={"attention_bias": True})),
    "llama3 positions": (
        "DFlashDraftModel",
        peers_config(top={"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }}),
    ),
    "sliding": ("DFlashDraftModel", peers_config("SSS")),
    "sliding both ways": ("DFlashDraftModel", peers_config("SSS", {"is_causal": False})),
    "mixed, as for Qwen3.6": ("DFlashDraftModel", peers_config("SSSSF")),
    "mixed, both ways": ("DFlashDraftModel", peers_config("SFS", {"is_causal": False})),
    "mixed, causal": ("DFlashDraftModel", peers_config("SFS", {"is_causal": True})),
    "scaled": (
        "DFlashDraftModel",
        peers_config(input_embedding_scale=3.5, output_multiplier=0.3, final_logit_softcapping=2.0),
    ),
    "DFlash2": ("DFlash2DraftModel", peers_config(**DFLASH2)),
    "DFlash2, as for Qwen3.8": ("DFlash2DraftModel", peers_config("SSSSS", {"is_causal": False}, **DFLASH2)),
    "DFlash2, scaled": (
        "DFlash2DraftModel",
        peers_config("SF", input_embedding_scale=0.5, output_multiplier=1.5, final_logit_softcapping=3.0, **DFLASH2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("context", [SHORT, LONG])
@pytest.mark.parametrize("kind", ZLAB)
def test_z_lab_s_drafts_say_the_same_here(kind: str, context: int, tmp_path: Path, bench: Any) -> None:
    """Hidden states; candidates; and after each predecessor that its walk takes, the scores of what may follow."""
    zlab = pytest.importorskip("dflash.model", reason="z-lab's dflash is a development dependency")
    architecture, config = ZLAB[kind]
    theirs = saved(getattr(zlab, architecture)(config), tmp_path)
    network = ours(tmp_path)
    features, embedding, tokens = torch.randn(context, FEATURES * H), torch.randn(VOCAB, H), block_tokens()
    target = torch.nn.Module()
    target.get_input_embeddings = lambda: torch.nn.Embedding.from_pretrained(embedding)
    scale = float(zlab._draft_value(config, "input_embedding_scale", 1.0))
    expected = theirs(
        position_ids=torch.arange(context + BLOCK)[None],
        noise_embedding=zlab._raw_input_embeddings(target, tokens[None], scale),
        target_hidden=features[None],
    )[0]
    hidden = our_hidden(network, bench, features, tokens, embedding)
    assert_same(hidden, expected)

    head, draft = torch.nn.Linear(H, VOCAB, bias=False), network.draft_config
    selector, how = build_selector(network, embedding=embedding, head=head.weight), {"softcap": draft.softcap}
    made = Candidates.of(hidden[None, 1:], head, selector, 5, multiplier=draft.output_multiplier, **how)
    lattice = made.lattice(tokens[None, 0], selector)
    if architecture == "DFlash2DraftModel":
        path, candidates, probs = theirs.propose(expected[None, 1:], tokens[None, 0], head, 1.0)
    else:
        probs, candidates = theirs.compute_logits(expected[None, 1:], head).softmax(-1).topk(5, dim=-1)
        path = candidates[..., 0]
    assert torch.equal(lattice.tokens.sort(-1).values, candidates.sort(-1).values)
    for depth in range(BLOCK - 1):
        known = lattice.tokens[0, depth - 1].tolist() if depth else []
        row = known.index(int(path[0, depth - 1])) if depth and architecture == "DFlash2DraftModel" else 0
        mine = lattice.logp[0, depth, row].exp()
        if architecture == "DFlash2DraftModel":  # theirs leaves out what the candidates do not hold
            mine = mine / mine.sum()
        order = [lattice.tokens[0, depth].tolist().index(token) for token in candidates[0, depth].tolist()]
        assert_same(mine[order], probs[0, depth])


def test_z_lab_s_rules_are_told_apart(tmp_path: Path, bench: Any) -> None:
    """The control of the test above: with the window one wider, or causal, the same weights say something else."""
    zlab = pytest.importorskip("dflash.model", reason="z-lab's dflash is a development dependency")
    theirs = saved(zlab.DFlashDraftModel(ZLAB["sliding both ways"][1]), tmp_path)
    features, embedding, tokens = torch.randn(LONG, FEATURES * H), torch.randn(VOCAB, H), block_tokens()
    expected = theirs(
        position_ids=torch.arange(LONG + BLOCK)[None], noise_embedding=embedding[tokens][None],
        target_hidden=features[None],
    )[0]  # fmt: skip
    raw = json.loads((tmp_path / "config.json").read_text())
    for change in ({"sliding_window": WINDOW + 1}, {"is_causal": True}, {"layer_types": ["full_attention"] * 3}):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
        assert (our_hidden(ours(tmp_path), bench, features, tokens, embedding) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("context", [SHORT, LONG])
@pytest.mark.parametrize("layers", ["FFF", "SSS", "SFS"])
def test_specforge_s_drafts_say_the_same_here(layers: str, context: int, tmp_path: Path, bench: Any) -> None:
    """Its masks are those that it trains with: they let a block see all of itself, as windows are wider than blocks."""
    specforge = pytest.importorskip("specforge.modeling.draft.dflash", reason="specforge is a development dependency")
    from specforge.algorithms.common.dflash_family_model import create_dflash_sdpa_mask

    window = BLOCK + 1
    config = peers_config(layers, {"sliding_window": window} if "S" in layers else None)
    config._attn_implementation = "sdpa"
    theirs = saved(specforge.DFlashDraftModel(config), tmp_path)
    features, embedding, tokens = torch.randn(context, FEATURES * H), torch.randn(VOCAB, H), block_tokens()
    masks = {
        kind: create_dflash_sdpa_mask(
            torch.tensor([[context]]), torch.ones(1, 1, dtype=torch.bool), context, BLOCK, "cpu", width
        )
        for kind, width in (("full_attention", None), ("sliding_attention", window))
    }
    expected = theirs(
        position_ids=torch.arange(context + BLOCK)[None], attention_mask=masks,
        noise_embedding=embedding[tokens][None], target_hidden=features[None],
    )[0]  # fmt: skip
    assert_same(our_hidden(ours(tmp_path), bench, features, tokens, embedding), expected)


# config.json as speculators 0.9.0 saves a DFlashDraftModel and a DFlash2DraftModel, without the nested network.
SPECULATORS: dict[str, Any] = {
    "aux_hidden_state_layer_ids": [2, 5], "block_size": 7, "mask_token_id": 3, "speculators_version": "0.9.0",
    "transformer_layer_config": {"model_type": "qwen3", "hidden_size": H, "vocab_size": VOCAB},
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("DFlashDraftModel", {"speculators_model_type": "dflash", "draft_vocab_size": 30, "sample_from_anchor": True}),
        ("DFlashSpeculator", {"speculators_model_type": "dflash", "draft_vocab_size": VOCAB}),
        ("DFlash2DraftModel", {"speculators_model_type": "dflash2", "draft_vocab_size": VOCAB, "selector_rank": 8}),
    ],
)
def test_what_only_speculators_writes_is_handed_over_by_name(architecture: str, own: dict[str, Any]) -> None:
    who, why = DraftConfig.from_dict({"architectures": [architecture], **SPECULATORS, **own}).served_by()
    assert (who, why) == ("sglang", f"the format of Speculators ({own['speculators_model_type']}, {architecture})")


def test_modelopt_s_use_swa_lets_every_layer_slide_both_ways(tmp_path: Path, bench: Any) -> None:
    """Its export leaves layer_types at full attention: that must come to z-lab's non-causal sliding layers."""
    zlab = pytest.importorskip("dflash.model", reason="z-lab's dflash is a development dependency")
    theirs = saved(zlab.DFlashDraftModel(peers_config("SSS", {"is_causal": False})), tmp_path)
    features, embedding, tokens = torch.randn(LONG, FEATURES * H), torch.randn(VOCAB, H), block_tokens()
    expected = theirs(
        position_ids=torch.arange(LONG + BLOCK)[None], noise_embedding=embedding[tokens][None],
        target_hidden=features[None],
    )[0]  # fmt: skip
    exported = peers_config("FFF", use_swa=True, swa_window_size=WINDOW, causal=False)
    exported.architectures = ["DFlashDraftModel"]
    (tmp_path / "config.json").write_text(exported.to_json_string())
    assert_same(our_hidden(ours(tmp_path), bench, features, tokens, embedding), expected)


def test_a_trained_mask_embedding_stands_for_the_mask_and_is_scaled_with_the_rest(tmp_path: Path, bench: Any) -> None:
    zlab = pytest.importorskip("dflash.model", reason="z-lab's dflash is a development dependency")
    theirs = saved(zlab.DFlashDraftModel(peers_config(input_embedding_scale=2.0)), tmp_path)
    network, trained = ours(tmp_path), torch.randn(H)
    torch.save({"mask_token_id": MASK, "embedding": trained}, tmp_path / "mask_embedding.pt")
    network.mask_embedding = load_mask_embedding(tmp_path / "mask_embedding.pt", network.draft_config)
    features, embedding, tokens = torch.randn(LONG, FEATURES * H), torch.randn(VOCAB, H), block_tokens()
    merged = embedding.clone()
    merged[MASK] = trained
    expected = theirs(
        position_ids=torch.arange(LONG + BLOCK)[None], noise_embedding=2 * merged[tokens][None],
        target_hidden=features[None],
    )[0]  # fmt: skip
    assert_same(our_hidden(network, bench, features, tokens, embedding), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mask_token_id": MASK + 1, "embedding": torch.zeros(H)}, "is of mask token 4, and the draft's mask_token_id"),
        ({"mask_token_id": MASK, "embedding": torch.zeros(6, H), "per_position": True}, "one a position is not served"),
        (torch.zeros(H + 1), r"holds \[33\], and not one embedding of 32"),
        ({"mask_token_id": MASK}, "holds NoneType, and not one embedding"),
        (None, "cannot be read as tensors"),
    ],
)
def test_a_mask_embedding_of_another_kind_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mask_embedding.pt"
    file.write_bytes(b"no tensors") if content is None else torch.save(content, file)
    draft = DraftConfig.from_dict({**peers_config().to_dict(), "architectures": ["DFlashDraftModel"]})
    with pytest.raises(ValueError, match=message):
        load_mask_embedding(file, draft)


def test_a_mask_embedding_may_stand_alone(tmp_path: Path) -> None:
    file = tmp_path / "mask_embedding.pt"
    torch.save(torch.ones(1, H), file)
    assert load_mask_embedding(file, DraftConfig.from_dict(peers_config().to_dict())).shape == (H,)
