"""What the budget believes of steps: seconds that heal, and what smaller trees would have accepted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from world import SHAPES, roof, told

from sglang_dflash.budget import Budget, Cost, Gain, Shape
from sglang_dflash.tree import Lattice, grow, walk


def test_a_first_step_gives_costs_their_scale_where_none_were_measured() -> None:
    cost = Cost(SHAPES, 8)
    expected = cost.seconds(4)
    cost.took(4, 1, 0.5)
    assert cost.seconds(4) == pytest.approx(expected * 0.5 / expected[1])
    assert (np.diff(cost.seconds(64)) > 0).all() and cost.seconds(64)[0] > cost.seconds(4)[0]


def test_a_hiccup_is_no_cost() -> None:
    cost = told(Budget(SHAPES, 8)).cost
    cost.took(16, 3, 10.0)  # a kernel compiled on the way
    assert cost.seconds(16)[3] < 1.1 * roof(16, SHAPES[3])


def test_a_lasting_change_is_believed() -> None:
    """Contexts grow, and every step takes as much longer: shapes that were not taken since are thought to follow."""
    cost = told(Budget(SHAPES, 8)).cost
    for _ in range(60):
        cost.took(16, 3, 2 * roof(16, SHAPES[3]))
    assert cost.seconds(16)[3] == pytest.approx(2 * roof(16, SHAPES[3]), rel=0.05)
    assert cost.seconds(16)[4] == pytest.approx(roof(16, SHAPES[4]) + roof(16, SHAPES[3]), rel=0.05)


def test_a_step_faster_than_believed_is_no_hiccup() -> None:
    cost = told(Budget(SHAPES, 8), lambda bs, shape: 3 * roof(bs, shape)).cost  # another server ran beside it
    cost.took(16, 3, roof(16, SHAPES[3]))
    assert cost.seconds(16)[3] == pytest.approx(roof(16, SHAPES[3]))
    for _ in range(20):
        cost.took(16, 3, roof(16, SHAPES[3]))
    cost.took(16, 3, 0.2 * roof(16, SHAPES[3]))  # one is none either
    assert cost.seconds(16)[3] > 0.8 * roof(16, SHAPES[3])


def test_larger_batches_than_were_measured_cost_in_proportion() -> None:
    cost = told(Budget(SHAPES, 8)).cost
    assert cost.seconds(1024)[0] == pytest.approx(4 * roof(256, SHAPES[0]))


def test_a_verified_tree_tells_what_smaller_ones_would_have_accepted() -> None:
    """Held to trees grown so small, ties included, walked with the same samples."""
    rng = torch.Generator().manual_seed(3)
    bs, depth, k = 64, 6, 4
    shapes = [Shape(n, min(n, depth), depth + 1, 99) for n in (0, 2, 4, 7, 15, 31)]
    logits = torch.randint(0, 4, (bs, depth, k, k), generator=rng).float()  # few values: many ties
    lattice = Lattice(torch.arange(k).expand(bs, depth, k).contiguous(), logits.log_softmax(-1))
    root = torch.zeros(bs, dtype=torch.int64)
    target = torch.randint(0, k, (bs, depth + 2), generator=rng)  # a token a depth, whatever the path

    def walked(nodes: int) -> tuple[np.ndarray, np.ndarray]:
        tree = grow(lattice, root, nodes)
        result = walk(tree, target.gather(1, tree.depths))
        return result.nodes.numpy(), result.lens.numpy()

    seen = Gain(shapes, bs).accepted(5, *walked(31))
    for index, shape in enumerate(shapes):
        assert (seen[:, index] == walked(shape.nodes)[1] - 1).all()
    assert seen[:, 5].max() > 3


def test_larger_trees_bring_more_in_the_ratio_that_was_seen() -> None:
    """A request that only small trees were tried for is expected to accept more of a large one, as others do."""
    shapes = [Shape(0, 0, 1, 99), Shape(1, 1, 2, 99), Shape(2, 2, 3, 99)]
    gain, kinds = Gain(shapes, 2), np.zeros(1, dtype=np.int64)
    one, other = np.array([0]), np.array([1])
    for step in range(600):  # the second node is right every other time that the first one is
        lens = np.array([2 + step % 2])
        gain.learn(one, kinds, 2, np.array([[0, 1, 2]]), lens)
    for _ in range(100):
        gain.learn(other, kinds, 1, np.array([[0, 1]]), np.array([2]))
    assert gain.expected(other)[0] == pytest.approx([0, 1, 1.5], abs=0.05)


def test_new_requests_are_thought_to_be_like_others_of_their_kind() -> None:
    gain = Gain(SHAPES, 4)
    for _ in range(300):
        for kind, length in ((0, 3), (1, 1)):
            gain.learn(np.array([kind]), np.array([kind]), 1, np.array([[0, 1, 2]]), np.array([length]))
    gain.begin(np.array([2, 3]), np.array([0, 1]))
    greedy, sampled = gain.expected(np.array([2, 3]))[:, 1]
    assert greedy > 1.9 and sampled < 0.1


def test_a_large_batch_tells_at_once_what_is_usual() -> None:
    """Where drafts do not pay few steps draft, and new requests are to be judged by those few."""
    gain, many, sampled = Gain(SHAPES, 200), np.arange(128), np.ones(128, dtype=np.int64)
    for _ in range(12):
        gain.learn(many, sampled, 1, np.tile([0, 0, 0], (128, 1)), np.ones(128, dtype=np.int64))
    gain.begin(np.array([150]), np.array([1]))
    assert gain.expected(np.array([150]))[0, 1] < 0.1
