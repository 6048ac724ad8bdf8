"""A checkpoint that training saves is the one the server's network loads: same lattices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.draft.lattice import Candidates
from sglang_dflash.draft.network import EntryClass
from sglang_dflash.draft.selector import build_selector
from sglang_dflash.training import draft as drafts
from sglang_dflash.training.data import Batch
from sglang_dflash.training.draft import Draft, DraftShape
from sglang_dflash.training.evaluate import lattice
from sglang_dflash.training.step import draft_hidden
from sglang_dflash.training.target import Target

H, VOCAB, BLOCK, PREFIX = 32, 61, 6, 11
CONFIG: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 128, "vocab_size": VOCAB,
}  # fmt: skip


class Tables:
    """As much of a target as a lattice needs: embedding, head, rope; its features are given."""

    config = CONFIG
    rotation = Target.rotation

    def __init__(self) -> None:
        self.embedding, self.head = torch.randn(VOCAB, H), torch.randn(VOCAB, H)
        self.frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)


@pytest.mark.parametrize("selector", ["none", "tied", "free"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_server_s_network_gives_training_s_lattice(selector: str, causal: bool, tmp_path: Path, bench: Any) -> None:
    torch.manual_seed(0)
    target: Any = Tables()
    shape = DraftShape(2, (0, 1), BLOCK, 48, causal, selector, rank=8, candidates=5)
    ours = Draft(shape, CONFIG).eval()
    for name, parameter in ours.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1 if parameter.ndim == 1 else 0.3)
        assert "norm" in name or parameter.ndim == 2
    drafts.save(ours, ours.state_dict(), tmp_path, torch.float32)

    tokens, features = torch.randint(VOCAB, (1, PREFIX + BLOCK)), torch.randn(1, PREFIX + BLOCK, 2 * H)
    zero = torch.zeros_like(tokens)
    batch = Batch(tokens, zero, zero.bool(), zero)
    hidden = draft_hidden(ours, target, batch, torch.tensor([[PREFIX]]), features)[0]
    expected = lattice(ours, target, hidden, tokens[:, PREFIX])

    config = DraftConfig.load(tmp_path)
    config.check(hidden_size=H, vocab_size=VOCAB, num_layers=2)
    raw = drafts.config_json(shape, CONFIG)
    network = {cls.__name__: cls for cls in EntryClass}[raw["architectures"][0]](raw)
    network.load_weights(load_file(tmp_path / "model.safetensors").items())
    table = bench(network, requests=1, room=PREFIX + BLOCK)
    table.write(0, network.project_features(features[0, :PREFIX]))
    block = torch.full((1, BLOCK), shape.mask_token)
    block[0, 0] = tokens[0, PREFIX]
    served = table.block(target.embedding[block], [PREFIX])[:, 1:]
    chosen = build_selector(network, embedding=target.embedding, head=target.head)
    got = Candidates.of(served, lambda x: x @ target.head.T, chosen, 5).lattice(tokens[:, PREFIX], chosen)
    assert torch.equal(got.tokens, expected.tokens)
    assert (got.logp - expected.logp).abs().max() < 1e-4 * expected.logp.abs().max()
