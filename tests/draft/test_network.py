"""The network and the lattice against a second implementation, for every kind of checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from checkpoints import FEATURES, KINDS, VOCAB, H, config, weights
from draft_reference import Reference
from safetensors.torch import load_file
from torch import Tensor

from sglang_dflash.draft.lattice import Candidates
from sglang_dflash.draft.network import DFlashDraftModel, EntryClass
from sglang_dflash.draft.selector import build_selector

MAX_RELATIVE_ERROR = 1e-4


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def loaded(raw: dict[str, Any], state: dict[str, Tensor]) -> DFlashDraftModel:
    network = {cls.__name__: cls for cls in EntryClass}[raw["architectures"][0]](raw)
    network.load_weights(state.items())
    return network


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def test_context_block_and_lattice_are_the_reference_s(kind: dict[str, Any], bench: Any) -> None:
    state = weights(kind)
    network, reference = loaded(kind, state), Reference(kind, state)
    lens, w = [13, 4], kind["block_size"]
    features = [torch.randn(n, FEATURES * H) for n in lens]
    embedding, head = torch.randn(VOCAB, H), torch.randn(VOCAB, H)
    tokens = torch.full((2, w), kind["dflash_config"]["mask_token_id"])
    tokens[:, 0] = torch.tensor([7, 9])

    table = bench(network, requests=2, room=32)
    context = [network.project_features(f) for f in features]
    table.write(0, context[0][:5])
    table.write(0, context[0][5:], start=5)
    table.write(1, context[1])
    hidden = table.block(embedding[tokens], lens)
    selector, config = build_selector(network, embedding=embedding, head=head), network.draft_config
    how = {"multiplier": config.output_multiplier, "softcap": config.softcap}
    lattice = Candidates.of(hidden[:, 1:], lambda x: x @ head.T, selector, 5, **how).lattice(tokens[:, 0], selector)

    for i, n in enumerate(lens):
        expected_context = reference.context(features[i])
        assert relative_error(context[i], expected_context) < MAX_RELATIVE_ERROR
        slots = table.req_to_token[i, :n]
        for layer in range(network.draft_config.num_layers):
            k = reference.heads(layer, "k", expected_context, torch.arange(n))
            v = reference.heads(layer, "v", expected_context, torch.arange(n))
            assert relative_error(table.pool.k[layer, slots], k) < MAX_RELATIVE_ERROR
            assert relative_error(table.pool.v[layer, slots], v) < MAX_RELATIVE_ERROR
        expected = reference.forward(expected_context, embedding[tokens[i]])
        assert relative_error(hidden[i], expected) < MAX_RELATIVE_ERROR
        expected_tokens, expected_logp = reference.lattice(
            expected[1:], int(tokens[i, 0]), embedding, head, 5
        )
        assert lattice.tokens[i].tolist() == expected_tokens.tolist()
        assert relative_error(lattice.logp[i], expected_logp) < MAX_RELATIVE_ERROR


def test_a_causal_block_of_any_depth_is_the_full_one_s_start(kind: dict[str, Any], bench: Any) -> None:
    network = loaded(kind, weights(kind))
    context, block = torch.randn(2, 6, H), torch.randn(2, 7, H)

    def draft(w: int) -> Tensor:
        table = bench(network, requests=2, room=32)
        for i in range(2):
            table.write(i, context[i])
        return table.block(block[:, :w], [6, 6])

    full = draft(7)
    assert network.draft_config.causal == all(kind["expected_causal"])
    errors = [relative_error(draft(w), full[:, :w]) for w in range(2, 7)]
    if network.draft_config.causal:
        assert max(errors) < 1e-5
    else:
        assert min(errors) > 1e-2


def test_padding_rows_of_the_target_s_tables_do_not_reach_the_codebooks() -> None:
    raw = KINDS["tied selector"]
    table = torch.cat([torch.randn(VOCAB, H), torch.full((3, H), torch.nan)])
    selector = build_selector(loaded(raw, weights(raw)), embedding=table, head=table)
    assert selector is not None
    assert selector.predecessor_codebook.shape == selector.successor_codebook.shape == (VOCAB, 8)


def test_tied_codebooks_follow_the_target_in_place() -> None:
    """A captured graph holds their memory."""
    raw = KINDS["tied selector"]
    network, old, new = loaded(raw, weights(raw)), torch.randn(VOCAB, H), torch.randn(VOCAB, H)
    fresh = build_selector(loaded(raw, weights(raw)), embedding=new, head=new)
    selector = build_selector(network, embedding=old, head=old)
    held = selector.predecessor_codebook, selector.successor_codebook
    assert build_selector(network, embedding=new, head=new) is selector
    for codebook, expected in zip(held, (fresh.predecessor_codebook, fresh.successor_codebook), strict=True):
        assert torch.equal(codebook, expected)


def test_tensors_under_a_model_prefix_and_copies_of_the_target_s_are_taken() -> None:
    state = weights(KINDS["qwen3"])
    prefixed = {f"model.{name}": tensor for name, tensor in state.items()}
    prefixed["lm_head.weight"] = prefixed["model.embed_tokens.weight"] = torch.randn(VOCAB, H)
    network = loaded(KINDS["qwen3"], prefixed)
    assert torch.equal(network.fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.mlp.up_proj.weight": None}, r"tensor layers\.1\.mlp\.up_proj\.weight missing"),
        ({"layers.2.self_attn.q_norm.weight": None}, r"tensor layers\.2\.self_attn\.q_norm\.weight missing"),
        (
            {"fc.weight": torch.zeros(H, 3 * H)},
            r"fc\.weight has shape \[32, 96\], but .* asks for \[32, 64\]",
        ),
        ({"layers.0.g_proj.weight": torch.zeros(H)}, r"no place for tensor layers\.0\.g_proj\.weight"),
    ],
)
def test_a_wrong_tensor_is_named(change: dict[str, Tensor | None], message: str) -> None:
    state: dict[str, Any] = {**weights(KINDS["qwen3"]), **change}
    with pytest.raises(ValueError, match=message):
        loaded(KINDS["qwen3"], {name: tensor for name, tensor in state.items() if tensor is not None})


def test_a_llama_style_draft_lacks_all_norms_of_queries_and_keys_or_none() -> None:
    raw = KINDS["llama"]
    state = weights(raw)
    assert not any("q_norm" in name for name in state)
    with pytest.raises(ValueError, match=r"tensor layers\.0\.self_attn\.k_norm\.weight and 4 more missing"):
        loaded(raw, {**state, "layers.0.self_attn.q_norm.weight": torch.ones(8)})


def test_quantisation_is_refused() -> None:
    with pytest.raises(ValueError, match="quantisation object"):
        DFlashDraftModel(config(), quant_config=object())


@pytest.fixture(scope="module")
def target() -> Any:
    from transformers import AutoModelForCausalLM

    from sglang_dflash import embedded

    return AutoModelForCausalLM.from_pretrained(embedded.ensure().target, dtype=torch.float32)


def test_the_embedded_draft_on_its_target_s_features(target: Any, bench: Any) -> None:
    from sglang_dflash import embedded

    raw = json.loads((embedded.DRAFT / "config.json").read_text())
    raw["expected_causal"] = [True] * raw["num_hidden_layers"]
    state = {
        n: t.float() for file in embedded.DRAFT.glob("*.safetensors") for n, t in load_file(file).items()
    }
    network, reference = loaded(raw, state), Reference(raw, state)
    ids = torch.randint(10, 40000, (1, 41))
    layers = target.model(ids[:, :40], output_hidden_states=True).hidden_states
    features = torch.cat([layers[i + 1][0] for i in raw["dflash_config"]["target_layer_ids"]], dim=-1)
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    tokens = torch.full((1, 16), raw["dflash_config"]["mask_token_id"])
    tokens[:, 0] = ids[:, 40]

    table = bench(network, requests=1, room=64)
    context = network.project_features(features)
    table.write(0, context)
    hidden = table.block(embedding[tokens], [40])
    selector = build_selector(network, embedding=embedding, head=head)
    lattice = Candidates.of(hidden[:, 1:], lambda x: x @ head.T, selector, 16).lattice(tokens[:, 0], selector)

    expected_context = reference.context(features)
    k = reference.heads(2, "k", expected_context, torch.arange(40))
    expected = reference.forward(expected_context, embedding[tokens[0]])
    expected_tokens, expected_logp = reference.lattice(expected[1:], int(tokens[0, 0]), embedding, head, 16)
    errors = {
        "context": relative_error(context, expected_context),
        "keys": relative_error(table.pool.k[2, table.req_to_token[0, :40]], k),
        "block": relative_error(hidden[0], expected),
        "lattice": relative_error(lattice.logp[0], expected_logp),
    }
    print(errors)
    assert max(errors.values()) < MAX_RELATIVE_ERROR
    assert lattice.tokens[0].tolist() == expected_tokens.tolist()
