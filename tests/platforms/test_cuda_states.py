"""What SGLang's kernels of gated delta nets are told: how trees are linked, and where graphs of each width read it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend

from sglang_dflash.platforms.cuda.states import WindowStates, links


def test_trees_are_linked_by_first_children_and_next_siblings() -> None:
    parents = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 3, 4, 5, 6]])
    seen = torch.eye(8, dtype=torch.bool).repeat(2, 1, 1)
    for b, node in torch.cartesian_prod(torch.arange(2), torch.arange(1, 8)).tolist():
        seen[b, node] |= seen[b, parents[b, node]]
    child, sibling = links(seen)
    assert child.dtype == sibling.dtype == torch.int32
    assert child.tolist() == [[1, 3, 5, 6, -1, -1, -1, -1], [1, 2, 3, 4, 5, 6, 7, -1]]
    assert sibling.tolist() == [[-1, 2, -1, 4, -1, -1, 7, -1], [-1] * 8]


def test_a_root_alone_has_neither() -> None:
    assert [x.tolist() for x in links(torch.ones(2, 1, 1, dtype=torch.bool))] == [[[-1], [-1]]] * 2


@pytest.fixture
def backend() -> WindowStates:
    backend = WindowStates.__new__(WindowStates)
    backend.device, backend.pad_slot_id, backend.req_to_token_pool = "cpu", -1, SimpleNamespace()
    backend.make_room({8: 2, 1: 4})
    return backend


def verify(width: int, mask: torch.Tensor | None = None) -> Any:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_target_verify=lambda: True),
        spec_info=SimpleNamespace(draft_token_num=width, window_mask=mask),
    )


def test_graphs_of_each_width_have_tables_of_their_own(backend: WindowStates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GDNAttnBackend, "init_forward_metadata_out_graph", lambda *_: None)
    seen = []
    for width, most in ((8, 2), (1, 4), (8, 2)):
        backend.init_cuda_graph_state(most, most * width)
        backend.init_forward_metadata_out_graph(verify(width))
        assert backend.cached_cuda_graph_verify_query_start_loc.tolist() == [i * width for i in range(most + 1)]
        assert [list(table.shape) for table in backend.retrieve_next_token_list] == [
            [i + 1, width] for i in range(most)
        ]
        seen.append(backend.state_indices_list)
    assert seen[0] is seen[2] is not seen[1]
    with pytest.raises(ValueError, match="graphs of 3 requests need tables of as many, and room was made for 2"):
        backend.init_cuda_graph_state(3, 24)


def test_kernels_are_told_of_trees_alone(backend: WindowStates) -> None:
    tree = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    for chains, batch, topk, linked in (
        (False, verify(3, tree), 2, True), (True, verify(3, tree), 1, False), (False, verify(3), 2, False),
        (False, verify(1, tree[:, :1, :1]), 1, False),
    ):  # fmt: skip
        backend.chains = chains
        backend._follow(batch)
        assert backend.topk == topk and (batch.spec_info.retrieve_next_token is not None) == linked
