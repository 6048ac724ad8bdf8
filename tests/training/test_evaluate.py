"""Offline accept lengths against counting by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from loading import load

from sglang_dflash.training.data import Answers, pack
from sglang_dflash.training.draft import Draft, DraftShape
from sglang_dflash.training.evaluate import TREES, accepted, evaluate, every_position, lattice, served
from sglang_dflash.training.target import Target
from sglang_dflash.tree import Lattice, grow, grow_chain

SHAPE = DraftShape(layers=1, features=(0, 1), block=6, intermediate=48, rank=8, candidates=4)


def paths(tokens: torch.Tensor, parents: torch.Tensor) -> set[tuple[int, ...]]:
    """Every path of a tree [n + 1] from below its root."""
    found: dict[int, tuple[int, ...]] = {0: ()}
    for i in range(1, len(tokens)):
        found[i] = (*found[int(parents[i])], int(tokens[i]))
    return set(found.values())


def test_emitted_tokens_are_the_longest_path_of_the_answer_and_one() -> None:
    torch.manual_seed(0)
    n, depth, k = 40, 5, 4
    tokens = torch.stack([torch.randperm(9)[:k] for _ in range(n * depth)]).view(n, depth, k)
    lattice = Lattice(tokens, torch.randn(n, depth, k, k).log_softmax(-1))
    gold = tokens.gather(2, torch.randint(2, (n, depth, 1)))[..., 0]
    gold[::5, 2:] = -1
    bonus = torch.full((n,), 7)
    got = accepted(lattice, bonus, gold)
    chain = grow_chain(lattice, bonus, depth)
    for i in range(n):
        trees = {"chain": (chain.tokens[i], chain.parents[i])}
        for size in TREES:
            tree = grow(lattice, bonus, size)
            trees[str(size)] = tree.tokens[i], tree.parents[i]
        for column, (nodes, parents) in enumerate(trees.values()):
            known, length = paths(nodes, parents), 0
            while length < depth and tuple(gold[i, : length + 1].tolist()) in known:
                length += 1
            assert got[i, column] == length + 1


def test_served_steps_begin_where_the_one_before_ended() -> None:
    emitted = np.array([[3, 1], [9, 1], [9, 2], [2, 1], [9, 1], [1, 1], [9, 9]])
    tokens, steps = served(emitted)  # 0 -> 3 -> 5 -> 6; 0 -> 1 -> 2 -> 4 -> 5 -> 6
    assert tokens == 6 and steps.tolist() == [3, 5]


def test_every_answer_position_is_looked_at_once(target: Target, make_answers: Callable[..., Answers]) -> None:
    torch.manual_seed(0)
    network, answers = Draft(SHAPE, target.config).eval(), make_answers(8)
    batch, used = pack(answers, np.arange(8), 3, 96)
    seen = [(int(r), int(a)) for rows, blocks, _ in every_position(network, target, batch) for r, a in
            zip(rows, blocks.anchors, strict=True)]  # fmt: skip
    assert sorted(seen) == [tuple(x) for x in batch.answer.nonzero().tolist()] and len(seen) > 100
    result = evaluate(network, target, answers, np.arange(used), 3, 96)
    assert set(result) == {"even", "odd"}
    assert all(1 <= v <= 6 for numbers in result.values() for v in numbers.values())


def test_the_exported_twin_gives_the_same_lattice(target: Target) -> None:
    export_twin = load("scripts/export_twin.py")
    torch.manual_seed(0)
    tied = Draft(SHAPE, target.config).eval()
    for parameter in tied.candidate_selector.parameters():
        torch.nn.init.normal_(parameter)
    twin = export_twin.expanded(tied, target)
    hidden, bonus = torch.randn(7, 5, 32), torch.randint(61, (7,))
    with torch.no_grad():
        ours, theirs = lattice(tied, target, hidden, bonus), lattice(twin, target, hidden, bonus)
        plain = Draft(DraftShape(**{**vars(SHAPE), "selector": "none"}), target.config)
        none = lattice(plain, target, hidden, bonus)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert (ours.logp - theirs.logp).abs().max() < 1e-4
    assert (ours.logp - none.logp).abs().max() > 0.1  # the selector says something
