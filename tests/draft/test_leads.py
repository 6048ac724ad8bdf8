"""Leads in a lattice: a known stretch is drafted whole where it begins, and the draft's own candidates too."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_dflash.draft.lattice import Candidates
from sglang_dflash.kernels import Leads
from sglang_dflash.tree import DraftTree, grow, grow_chain

BS, DEPTH, K, VOCAB, H = 3, 6, 8, 300, 16
STRETCH = [290, 7, 291, 7, 292]  # one token stands in it twice


def leads(*tries: tuple[list[int], list[int], bool], places: int = 6) -> Leads:
    tokens, before = torch.full((2, len(tries), places), -1)
    for row, (trie, at, _) in enumerate(tries):
        tokens[row, : len(trie)], before[row, : len(at)] = torch.tensor(trie), torch.tensor(at)
    return Leads(tokens, before, torch.tensor([int(sure) for *_, sure in tries]))


CHAIN = [-1, 0, 1, 2, 3]
NONE: tuple[list[int], list[int], bool] = ([], [], False)


class Rank4:
    """A selector of random codebooks, or of none that matter."""

    def __init__(self, weight: float) -> None:
        self.predecessor_codebook, self.successor_codebook = torch.randn(2, VOCAB, 4) * weight
        self.hidden_projection = torch.nn.Linear(H, 4, bias=False).requires_grad_(False)


def drafted(scores: Tensor, known: Leads | None, nodes: int, selector: Any = None, how: Any = grow) -> DraftTree:
    hidden = torch.randn(*scores.shape[:2], H)
    bonus = torch.zeros(len(scores), dtype=torch.int64)
    lattice = Candidates.of(hidden, lambda _: scores.flatten(0, 1), selector, K).lattice(bonus, selector, known)
    assert not lattice.logp.isnan().any() and lattice.logp.max() <= 0
    return how(lattice, bonus, nodes)


def paths(tree: DraftTree, row: int) -> list[list[int]]:
    """Each node's tokens from the root on, without it."""
    return [tree.tokens[row, 1:][tree.mask[row, node, 1:]].tolist() for node in range(tree.tokens.shape[1])]


@pytest.mark.usefixtures("either_ops")
@pytest.mark.parametrize("weight", [None, 0.1])
def test_what_must_come_is_drafted_first(weight: float | None) -> None:
    torch.manual_seed(0)
    selector, scores = weight and Rank4(weight), torch.randn(BS, DEPTH, VOCAB)
    known = leads((STRETCH, CHAIN, True), NONE, (STRETCH[:2], CHAIN[:2], True))
    tree = drafted(scores, known, 12, selector)
    assert STRETCH in paths(tree, 0)
    assert [290, 7] in paths(tree, 2)
    chain = drafted(scores, known, DEPTH, selector, grow_chain)
    assert chain.tokens[0, 1:6].tolist() == STRETCH
    assert chain.tokens[2, 1:3].tolist() == [290, 7]
    alone = drafted(scores, None, 12) if selector is None else None
    if alone is not None:
        assert tree.tokens[1].tolist() == alone.tokens[1].tolist(), "a request without leads is drafted as ever"


@pytest.mark.usefixtures("either_ops")
def test_a_stretch_begins_where_the_draft_thinks() -> None:
    torch.manual_seed(1)
    scores = torch.randn(BS, DEPTH, VOCAB)
    for depth, token in enumerate([50, 51, STRETCH[0]]):
        scores[:, depth, token] = 12.0
    known = leads((STRETCH, CHAIN, False), NONE, ([STRETCH[0], 8], [-1, 0], False))
    tree = drafted(scores, known, 8)
    assert [50, 51, *STRETCH[:4]] in paths(tree, 0)
    assert [50, 51, STRETCH[0]] in paths(tree, 1) and [50, 51, *STRETCH[:4]] not in paths(tree, 1)
    assert [50, 51, STRETCH[0], 8] in paths(tree, 2)


def test_of_several_ways_the_likeliest_comes_first() -> None:
    torch.manual_seed(2)
    scores = torch.randn(1, DEPTH, VOCAB)
    scores[0, 0, 61] = 6.0
    trie = ([60, 61, 62, 63, 64, 65], [-1, -1, -1, 0, 1, 2], True)
    tree = drafted(scores, leads(trie), 10)
    assert paths(tree, 0)[1:3] == [[61], [61, 64]]
    assert [60, 63] in paths(tree, 0) or [62, 65] in paths(tree, 0)


def test_no_two_children_of_a_node_have_one_token() -> None:
    torch.manual_seed(3)
    for trial in range(40):
        scores = torch.randn(BS, DEPTH, VOCAB) * 3
        scores[..., [*STRETCH, 60, 61]] += 9  # the draft has them all among its own
        trie = ([60, 61, 290, 60, 7, 7], [-1, -1, 0, 2, 1, 3], bool(trial % 2))
        known = leads((STRETCH, CHAIN, trial % 3 > 0), trie, NONE)
        tree = drafted(scores, known, 40, Rank4(0.3) if trial % 4 else None)
        for row in range(BS):
            every = list(map(tuple, paths(tree, row)))
            assert len(set(every)) == len(every)


@pytest.mark.parametrize("broken", [False, True])
def test_a_tree_of_all_paths_holds_no_token_twice(broken: bool) -> None:
    """Two of the draft's own candidates are left, whose paths just fill the tree, also of a draft that says nothing."""
    torch.manual_seed(5)
    scores = torch.randn(BS, 3, VOCAB)
    scores[..., STRETCH] += 9
    if broken:
        scores[:] = torch.nan
    trie = ([290, 7, 291, 7, 292, 8], [-1, 0, 1, -1, 3, 4], True)
    tree = drafted(scores, leads(trie, trie, NONE), 2 + 4 + 8)
    for row in range(BS):
        every = list(map(tuple, paths(tree, row)))
        assert len(set(every)) == len(every)


def test_a_lead_comes_behind_the_one_before_alone() -> None:
    torch.manual_seed(4)
    scores = torch.randn(1, DEPTH, VOCAB) * 0.01  # the draft knows nothing
    tree = drafted(scores, leads((STRETCH, CHAIN, True)), 40)
    for path in paths(tree, 0):
        for before, token in pairwise(path):
            if token in (290, 291, 292):
                assert (before, token) in ((7, 291), (7, 292)) or token == 290
