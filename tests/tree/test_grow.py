from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_reference import Case, best_paths, cases, grow_by_heap, paths_of

from sglang_dflash.tree import DraftTree, Lattice, grow, grow_chain


def assert_same(one: DraftTree, other: DraftTree) -> None:
    for field in ("tokens", "parents", "depths", "mask", "logp"):
        a, b = getattr(one, field), getattr(other, field)
        assert a.dtype == b.dtype and torch.equal(a, b), field


def first_nodes(tree: DraftTree, m: int) -> DraftTree:
    w = m + 1
    return DraftTree(
        tree.tokens[:, :w], tree.parents[:, :w], tree.depths[:, :w], tree.mask[:, :w, :w], tree.logp[:, :w], 0
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_grow_is_best_first_search(case: Case) -> None:
    tree = grow(case.lattice, case.bonus, case.n)
    assert tree.max_depth == min(case.lattice.depth, case.n)
    for b in range(len(case.bonus)):
        want = grow_by_heap(case.lattice, b, int(case.bonus[b]), case.n)
        got = {name: getattr(tree, name)[b].tolist() for name in want}
        assert got == want


@settings(max_examples=60, deadline=None)
@given(cases(max_d=4, max_k=3, max_n=120))
def test_grow_takes_the_best_of_all_paths(case: Case) -> None:
    tree = grow(case.lattice, case.bonus, case.n)
    for b in range(len(case.bonus)):
        assert paths_of(tree, case.lattice, b) == best_paths(case.lattice, b, case.n)


@pytest.mark.parametrize("transitions", [False, True])
def test_grow_at_serving_size(transitions: bool) -> None:
    torch.manual_seed(0)
    bs, d, k, n = 8, 15, 16, 63
    logp = (torch.randn(bs, d, k if transitions else 1, k) * 4).log_softmax(-1)
    logp[:, 0] = logp[:, 0, :1]
    lattice = Lattice(torch.rand(bs, d, 1000).topk(k).indices, logp)
    tree = grow(lattice, torch.zeros(bs, dtype=torch.int64), n)
    for b in range(bs):
        want = grow_by_heap(lattice, b, 0, n)
        assert {name: getattr(tree, name)[b].tolist() for name in want} == want
    assert tree.depths.max() > 3


@settings(max_examples=80, deadline=None)
@given(cases(), st.data())
def test_the_first_nodes_are_the_smaller_tree(case: Case, data: st.DataObject) -> None:
    m = data.draw(st.integers(0, case.n))
    larger, smaller = grow(case.lattice, case.bonus, case.n), grow(case.lattice, case.bonus, m)
    assert_same(first_nodes(larger, m), smaller)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_mask_is_what_following_parents_gives(case: Case) -> None:
    tree = grow(case.lattice, case.bonus, case.n)
    want = torch.zeros_like(tree.mask)
    for b in range(len(case.bonus)):
        for node in range(case.n + 1):
            seen = node
            want[b, node, seen] = True
            while seen != 0:
                seen = int(tree.parents[b, seen])
                want[b, node, seen] = True
    assert torch.equal(tree.mask, want)
    assert torch.equal(tree.mask.sum(-1) - 1, tree.depths)


def test_ties_go_to_lower_depth_then_parent_then_rank() -> None:
    # Depth 1: both candidates certain. Depth 2: certain as well, so every path has log-probability 0.
    lattice = Lattice(torch.tensor([[[10, 11], [20, 21]]]), torch.zeros(1, 2, 2, 2))
    tree = grow(lattice, torch.tensor([5]), 6)
    assert tree.tokens.tolist() == [[5, 10, 11, 20, 21, 20, 21]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 1, 2, 2]]


def test_scores_that_differ_in_the_last_bit_are_no_tie() -> None:
    just_below = torch.nextafter(torch.tensor(-20.0), torch.tensor(-30.0)).item()
    lattice = Lattice(torch.tensor([[[10, 11]]]), torch.tensor([[[[just_below, -20.0]]]]))
    assert grow(lattice, torch.tensor([5]), 2).tokens.tolist() == [[5, 11, 10]]


def test_transitions_change_the_tree() -> None:
    # After 10, 20 is likely; after 11, 21 is: a marginal lattice could not say so.
    logp = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]], [[0.9, 0.1], [0.1, 0.9]]]]).log()
    tree = grow(Lattice(torch.tensor([[[10, 11], [20, 21]]]), logp), torch.tensor([5]), 4)
    assert tree.tokens.tolist() == [[5, 10, 11, 20, 21]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 2]]


@settings(max_examples=80, deadline=None)
@given(cases(), st.data())
def test_chain_is_greedy_descent(case: Case, data: st.DataObject) -> None:
    lattice = case.lattice
    n = data.draw(st.integers(0, lattice.depth))
    chain = grow_chain(lattice, case.bonus, n)
    assert chain.max_depth == n
    assert chain.parents.tolist() == [[0, *range(n)]] * len(case.bonus)
    assert chain.depths.tolist() == [[*range(n + 1)]] * len(case.bonus)
    assert torch.equal(chain.mask, torch.ones_like(chain.mask).tril())
    for b in range(len(case.bonus)):
        rank, tokens, logp = 0, [int(case.bonus[b])], [0.0]
        for depth in range(n):
            rows = lattice.logp[b, depth].tolist()
            row = rows[rank] if len(rows) > 1 else rows[0]
            rank = row.index(max(row))
            tokens.append(int(lattice.tokens[b, depth, rank]))
            logp.append(logp[-1] + row[rank])
        assert chain.tokens[b].tolist() == tokens
        assert chain.logp[b].tolist() == pytest.approx(logp, rel=1e-5)


@pytest.mark.parametrize("transitions", [False, True])
def test_where_one_path_is_probable_the_tree_is_the_chain(transitions: bool) -> None:
    torch.manual_seed(1)
    bs, d, k = 3, 6, 4
    logits = torch.randn(bs, d, k if transitions else 1, k)
    logits[:, 0] = logits[:, 0, :1]
    logits += 30 * torch.nn.functional.one_hot(torch.randint(k, (bs, d, 1)), k)
    lattice = Lattice(torch.rand(bs, d, 50).topk(k).indices, logits.log_softmax(-1))
    bonus = torch.arange(bs)
    tree, chain = grow(lattice, bonus, d), grow_chain(lattice, bonus, d)
    torch.testing.assert_close(tree.logp, chain.logp)
    assert_same(DraftTree(tree.tokens, tree.parents, tree.depths, tree.mask, chain.logp, d), chain)


@pytest.mark.parametrize("plant", [grow, grow_chain])
def test_more_nodes_than_there_are_is_refused(plant) -> None:
    lattice = Lattice(torch.tensor([[[1, 2], [3, 4]]]), torch.zeros(1, 2, 1, 2))
    most = 6 if plant is grow else 2
    assert plant(lattice, torch.tensor([0]), most).tokens.shape == (1, most + 1)
    with pytest.raises(ValueError, match=rf"{most + 1} nodes.*0 to {most}"):
        plant(lattice, torch.tensor([0]), most + 1)
    with pytest.raises(ValueError, match="-1 nodes"):
        plant(lattice, torch.tensor([0]), -1)


def test_a_lattice_checks_its_shapes_and_dtype() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 2\)"):
        Lattice(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 3, 2))
    with pytest.raises(ValueError, match="float64"):
        Lattice(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, 2, dtype=torch.float64))
