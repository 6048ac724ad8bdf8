"""What a captured draft pass leaves behind, without a GPU: graph memory is played by tensors that are overwritten."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_dflash.budget import Shape
from sglang_dflash.step.draft_pass import DraftRunner
from sglang_dflash.step.penalties import Penalties
from sglang_dflash.tree import DraftTree, grow


def tree(token: int) -> DraftTree:
    return DraftTree.root(torch.tensor([token, token + 1]))


def test_a_captured_tree_outlives_the_memory_of_its_graph(monkeypatch) -> None:
    runner = object.__new__(DraftRunner)
    runner._captured = {}
    made = [tree(10), tree(20), tree(30)]  # by the two passes that warm up, and the one in the graph
    left = iter(made)
    monkeypatch.setattr(DraftRunner, "_tree", lambda self, hidden, ids, block: next(left))
    batch, output = SimpleNamespace(batch_size=2, input_ids=None), SimpleNamespace(hidden_states=None)
    for _ in made:
        runner._capture_tree(None, output, batch, 2)
    for graphs in made[1:]:
        for x in graphs._tensors():
            x.zero_()  # another graph of the same pool runs
    assert runner._captured[1, 2].tokens.tolist() == [[30], [31]]
    assert runner._captured[1, 2].first(1).tokens.tolist() == [[30]]


def test_a_penalised_request_s_lattice_is_penalised_and_no_other() -> None:
    """Two requests whose draft likes token 4 best, then 6; the second has said 4 before, and pays for it."""
    vocab, block, bs = 9, 3, 2
    runner = object.__new__(DraftRunner)
    shape = Shape(2, 2, block, 99)
    draft = SimpleNamespace(output_multiplier=1.0, softcap=None, vocab_size=vocab - 1)
    runner.options = SimpleNamespace(grown=lambda width: shape, top_k=2, draft=draft)  # type: ignore[assignment]
    runner.selector, runner._lm_head, runner._grow = None, None, grow
    runner._logits = lambda hidden, head: hidden.clone()
    hidden = torch.zeros(bs * block, vocab)
    hidden[:, 4], hidden[:, 6] = 3.0, 2.0

    def request(number: int, penalty: float) -> Any:
        params = SimpleNamespace(
            frequency_penalty=penalty, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0
        )
        return SimpleNamespace(
            origin_input_ids=[1], output_ids=[4, 4], sampling_params=params, kv=SimpleNamespace(req_pool_idx=number)
        )

    reqs = [request(0, 0.0), request(1, 1.0)]
    batch = SimpleNamespace(reqs=reqs, sampling_info=SimpleNamespace(vocab_size=vocab))
    penalised = Penalties().of(batch, torch.tensor([3, 3]), reqs)
    roots = torch.tensor([4, 5, 5] * bs)
    assert runner._tree(hidden, roots, block, penalised).tokens.tolist() == [[4, 4, 4], [4, 6, 6]]
    assert runner._tree(hidden, roots, block).tokens.tolist() == [[4, 4, 4], [4, 4, 4]]
