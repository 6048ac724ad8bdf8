from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_reference import Case, cases, walk_by_hand

from sglang_dflash import kernels
from sglang_dflash.tree import DraftTree, Walk, grow, grow_chain, walk


def samples_for(tree: DraftTree, data: st.DataObject) -> torch.Tensor:
    """At each node, from a hostile mix: a child's token, the token of any node of the tree, or any token."""
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    bs, w = tree.tokens.shape
    sampled = torch.randint(9, (bs, w), generator=rng)
    elsewhere = tree.tokens.gather(1, torch.randint(w, (bs, w), generator=rng))
    sampled = torch.where(torch.rand(bs, w, generator=rng) < 0.5, elsewhere, sampled)
    for b in range(bs):
        for node in range(1, w):
            if torch.rand((), generator=rng) < 0.7:
                sampled[b, tree.parents[b, node]] = tree.tokens[b, node]
    return sampled


def assert_walk(got: Walk, tree: DraftTree, sampled: torch.Tensor, limits: list[int] | None) -> None:
    assert got.nodes.dtype == got.tokens.dtype == got.last.dtype == torch.int64 and got.lens.dtype == torch.int32
    for b in range(len(sampled)):
        nodes = walk_by_hand(tree, b, sampled[b].tolist(), limits[b] if limits else None)
        padding = tree.max_depth + 1 - len(nodes)
        assert got.lens[b] == len(nodes)
        assert got.nodes[b].tolist() == nodes + nodes[-1:] * padding
        assert got.last[b] == sampled[b, nodes[-1]]
        assert got.tokens[b].tolist() == [int(sampled[b, node]) for node in nodes] + [0] * padding


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_walk_of_a_tree(case: Case, data: st.DataObject) -> None:
    tree = grow(case.lattice, case.bonus, case.n)
    sampled = samples_for(tree, data)
    assert_walk(walk(tree, sampled), tree, sampled, None)
    limits = data.draw(st.lists(st.integers(0, 6), min_size=len(sampled), max_size=len(sampled)))
    assert_walk(walk(tree, sampled, torch.tensor(limits)), tree, sampled, limits)


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_walk_of_a_chain(case: Case, data: st.DataObject) -> None:
    chain = grow_chain(case.lattice, case.bonus, case.lattice.depth)
    sampled = samples_for(chain, data)
    assert_walk(walk(chain, sampled), chain, sampled, None)


@settings(max_examples=60, deadline=None)
@given(cases(min_n=1), st.data())
def test_an_oracle_is_followed_to_any_node(case: Case, data: st.DataObject) -> None:
    """Samples that lead to one node and then leave the tree emit the path to it and the last sample."""
    tree = grow(case.lattice, case.bonus, case.n)
    goal = data.draw(st.integers(0, case.n))
    on_path = tree.mask[:, goal]
    sampled = torch.full_like(tree.tokens, -1)
    for b in range(len(sampled)):
        for node in on_path[b].nonzero().flatten().tolist()[1:]:
            sampled[b, tree.parents[b, node]] = tree.tokens[b, node]
    got = walk(tree, sampled)
    assert torch.equal(got.lens, tree.depths[:, goal].int() + 1)
    assert (got.nodes[:, -1] == goal).all()
    assert torch.equal(got.tokens.gather(1, got.lens[:, None].long() - 1), torch.full((len(sampled), 1), -1))


def test_the_same_token_on_another_branch_is_not_followed() -> None:
    #  root 5 ─ node 1 (7) ─ node 3 (9)
    #         └ node 2 (8)              the target says 8, then 9: 9 stands under 7, not under 8
    tree = DraftTree(
        tokens=torch.tensor([[5, 7, 8, 9]]),
        parents=torch.tensor([[0, 0, 0, 1]]),
        depths=torch.tensor([[0, 1, 1, 2]]),
        mask=torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]]).bool(),
        logp=torch.zeros(1, 4),
        max_depth=2,
    )
    got = walk(tree, torch.tensor([[8, 9, 9, 1]]))
    assert (got.nodes.tolist(), got.tokens.tolist(), got.lens.tolist()) == ([[0, 2, 2]], [[8, 9, 0]], [2])


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_accepted_rows_move_to_the_front(case: Case, data: st.DataObject) -> None:
    tree = grow(case.lattice, case.bonus, case.n)
    got = walk(tree, samples_for(tree, data))
    bs, w = tree.tokens.shape
    m = tree.max_depth + 1
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    slots = 1 + torch.randperm(2 * bs * w, generator=rng)[: bs * w].view(bs, w)
    prefix_lens = torch.randint(100, (bs,), generator=rng)

    cache = torch.arange(2 * bs * w + 1)
    want = cache.clone()
    for b in range(bs):
        for t in range(int(got.lens[b])):
            want[slots[b, t]] = cache[slots[b, got.nodes[b, t]]]

    source, destination, rows, positions, context_slots = kernels.commit_rows(
        slots, prefix_lens, got.nodes, got.lens, w
    )
    assert len(set(destination.tolist())) == len(destination) == bs * m
    cache[destination] = cache[source]
    assert torch.equal(cache, want)
    for b, t in itertools.product(range(bs), range(m)):
        i, kept = b * m + t, t < got.lens[b]
        assert rows[i] == b * w + got.nodes[b, t]
        assert positions[i] == prefix_lens[b] + t
        assert context_slots[i] == (slots[b, t] if kept else 0)


def test_the_root_alone_is_plain_decoding() -> None:
    tree = DraftTree.root(torch.tensor([5, 6]))
    got = walk(tree, torch.tensor([[7], [8]]))
    assert (got.nodes.tolist(), got.tokens.tolist(), got.lens.tolist()) == ([[0], [0]], [[7], [8]], [1, 1])
    assert tree.mask.tolist() == [[[True]], [[True]]] and tree.depths.tolist() == [[0], [0]]
