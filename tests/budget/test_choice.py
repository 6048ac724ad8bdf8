"""The budget in worlds whose truth the test knows: it finds the best shape, leaves useless drafts, notices change."""

from __future__ import annotations

import numpy as np
import pytest
from world import SHAPES, World, roof, told

from sglang_dflash.budget import Budget, Shape


@pytest.mark.parametrize("bs", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("likely", [0.8, 0.4])
@pytest.mark.parametrize("measured", [True, False])
def test_it_comes_near_the_best_fixed_shape(bs: int, likely: float, measured: bool) -> None:
    world, budget = World(likely), Budget(SHAPES, 512)
    if measured:
        told(budget)
    world.run(budget, bs, 300)
    tokens, seconds, _ = world.run(budget, bs, max(100, 6000 // bs))
    assert tokens / seconds > 0.96 * world.best(bs, 10_000)[1]


@pytest.mark.parametrize("bs", [1, 64])
def test_a_useless_draft_costs_no_more_than_probes(bs: int) -> None:
    world, budget = World(0.0), told(Budget(SHAPES, 512))
    world.run(budget, bs, 100)
    tokens, seconds, taken = world.run(budget, bs, 500)
    assert tokens / seconds > 0.98 * bs / roof(bs, SHAPES[0])
    assert 0 < 500 - taken[0] < 50  # it goes on looking


def test_a_topic_that_drafts_well_is_noticed_within_fifty_steps() -> None:
    budget = told(Budget(SHAPES, 512))
    World(0.0).run(budget, 1, 500)
    World(0.85).run(budget, 1, 50)
    *_, taken = World(0.85).run(budget, 1, 50)
    assert taken[0] < 10


def test_a_draft_that_fails_is_left_within_fifty_steps() -> None:
    budget = told(Budget(SHAPES, 512))
    World(0.85).run(budget, 16, 200)
    World(0.0).run(budget, 16, 50)
    *_, taken = World(0.0).run(budget, 16, 50)
    assert taken[0] > 40


def test_a_wrong_table_heals() -> None:
    """Measured before serving, the best shape looked four times as expensive as it is, and the worst one cheap."""

    def wrong(bs: int, shape: Shape) -> float:
        return roof(bs, shape) * {0: 0.5, 15: 2.0, 31: 4.0}.get(shape.nodes, 1.0)

    world, budget = World(0.8), told(Budget(SHAPES, 512), wrong)
    world.run(budget, 4, 4000)
    tokens, seconds, _ = world.run(budget, 4, 1000)
    assert tokens / seconds > 0.95 * world.best(4, 10_000)[1]


@pytest.mark.parametrize("bs", [64, 128])
@pytest.mark.parametrize("dear", [0, 2])
def test_one_shape_that_looked_twice_as_dear_is_found_out(bs: int, dear: int) -> None:
    world, budget = World(0.5), told(Budget(SHAPES, 512), lambda bs, s: (1 + (s.nodes == dear)) * roof(bs, s))
    world.run(budget, bs, 400)
    tokens, seconds, _ = world.run(budget, bs, 200)
    assert tokens / seconds > 0.95 * world.best(bs, 10_000)[1]


@pytest.mark.parametrize(("bs", "likely"), [(64, 0.25), (64, 0.65), (128, 0.65)])
def test_what_was_learned_wrongly_is_found_out(bs: int, likely: float) -> None:
    """As where others were at work on the GPU while steps of the best shape were taken, plain decoding among them."""
    world, budget = World(likely), told(Budget(SHAPES, 512))
    world.run(budget, bs, 300)
    best, rate = world.best(bs, 10_000)
    for _ in range(50):
        budget.cost.took(bs, best, 1.3 * world.seconds(bs, SHAPES[best]))
    world.run(budget, bs, 1000)
    tokens, seconds, _ = world.run(budget, bs, 300)
    assert tokens / seconds > 0.97 * rate


@pytest.mark.parametrize("slow", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("bs", [16, 64])
def test_plain_steps_timed_among_arriving_prompts_are_soon_timed_anew(bs: int, slow: float) -> None:
    """As when a load begins: the host was busy with prompts between a few steps, all of them of the smallest shapes."""
    world, budget = World(0.0), told(Budget(SHAPES, 512))
    world.run(budget, 256, 300)
    for shape in (0, 0, 1, 1, 0, 1) * 20:
        budget.cost.took(bs, shape, slow * world.seconds(bs, SHAPES[shape]))
    world.run(budget, bs, 100)
    tokens, seconds, _ = world.run(budget, bs, 200)
    assert tokens / seconds > 0.97 * bs / roof(bs, SHAPES[0])


@pytest.mark.parametrize("likely", [0.3, 0.5, 0.65])
@pytest.mark.parametrize("bs", [16, 64])
def test_a_host_that_does_not_keep_up_is_no_reason_against_wider_trees(bs: int, likely: float) -> None:
    """No step is faster than its host; how wide a tree is costs the host nothing."""
    world, budget = World(likely, lambda bs, shape: max(roof(bs, shape), 0.010)), told(Budget(SHAPES, 512))
    world.run(budget, bs, 200)
    tokens, seconds, _ = world.run(budget, bs, 200)
    assert tokens / seconds > 0.9 * world.best(bs, 10_000)[1]


@pytest.mark.parametrize("bs", [4, 16])
def test_where_nothing_was_measured_a_smaller_shape_is_soon_timed(bs: int) -> None:
    """On a CPU each token costs: what a wide step takes says little of what a plain one would."""

    def cpu(bs: int, shape: Shape) -> float:
        return 0.05 + 0.004 * bs * shape.verified + (0.001 * bs * shape.block if shape.nodes else 0.0)

    world, budget = World(0.3, cpu), Budget(SHAPES, 512)
    world.run(budget, bs, 100)
    tokens, seconds, _ = world.run(budget, bs, 100)
    assert tokens / seconds > 0.9 * world.best(bs, 10_000)[1]


def test_requests_that_cannot_draft_neither_count_nor_teach() -> None:
    world, budget = World(0.8), told(Budget(SHAPES, 512))
    *_, taken = world.run(budget, 4, 100, drafting=False)
    assert taken[0] == 100  # and no probes: there is nothing to see
    before = budget.gain.expected(np.arange(4)).copy()
    world.run(budget, 4, 20, drafting=False)
    assert (budget.gain.expected(np.arange(4)) == before).all()


def test_no_shape_is_taken_by_more_requests_than_it_is_for() -> None:
    world, budget = World(0.95, cost=lambda bs, shape: 1.0), Budget(SHAPES, 512)  # where the widest always pays
    for bs in (1, 32, 33, 64, 65, 128, 300, 500):
        _, _, taken = world.run(budget, bs, 8)
        assert all(bs <= SHAPES[index].most for index in np.flatnonzero(taken))


def test_one_shape_is_always_taken() -> None:
    budget = Budget([Shape(15, 8, 9, 1 << 30)], 8)
    choice = budget.choose(np.arange(3), np.zeros(3, dtype=np.int64), np.ones(3, dtype=bool))
    assert choice.shape == 0


@pytest.mark.parametrize("bs", [1, 16])
@pytest.mark.parametrize("checks", [4e-3, 0.1e-3])
def test_what_grammars_cost_is_priced(bs: int, checks: float) -> None:
    """Grammars come to a server that has served plain requests, and what is known of those stays."""
    plain, world = World(0.85), World(0.7, checks=checks)
    budget = told(Budget(SHAPES, 512))
    plain.run(budget, bs, 300)
    known, usual = budget.cost.seconds(bs), budget.gain._usual[0].copy()
    world.run(budget, bs, 100)
    *_, taken = world.run(budget, bs, 200)
    tokens, seconds = world.tokens(bs, 10_000), np.array([world.seconds(bs, shape) for shape in SHAPES])
    assert taken @ tokens / (taken @ seconds) > 0.96 * (tokens / seconds).max()
    assert (budget.cost.seconds(bs) == known).all() and (budget.gain._usual[0] == usual).all()


@pytest.mark.parametrize("bs", [1, 4])
def test_grammars_alone_are_priced_where_nothing_was_measured(bs: int) -> None:
    world = World(0.7, lambda bs, shape: 0.05 + 0.003 * bs * shape.verified, checks=20e-3)
    budget = Budget(SHAPES, 512)
    world.run(budget, bs, 100)
    *_, taken = world.run(budget, bs, 200)
    tokens, seconds = world.tokens(bs, 10_000), np.array([world.seconds(bs, shape) for shape in SHAPES])
    assert taken @ tokens / (taken @ seconds) > 0.93 * (tokens / seconds).max()


@pytest.mark.parametrize("likely", [0.8, 0.0])
@pytest.mark.parametrize("bs", [64, 256])
def test_prompts_are_read_beside_trees_where_these_pay_and_beside_roots_that_have_room(likely: float, bs: int) -> None:
    """Where they do not pay, the first steps with prompts tell; at 64 even roots with useless trees take less time than
    roots and a pass of the prompt's own.
    """
    world, budget = World(likely), told(Budget(SHAPES, 512))
    trees = [0 < shape.nodes <= 4 for shape in SHAPES]
    assert not budget.reads_beside(trees)  # nobody runs
    for _ in range(20):
        choice = budget.choose(np.arange(bs), np.zeros(bs, dtype=np.int64), np.ones(bs, dtype=bool), 0, trees)
        assert trees[choice.shape]
        budget.learn(choice, *world.accept(choice))
    assert budget.reads_beside(trees) is (likely > 0 or bs == 64)
    assert budget.reads_beside([True, *trees[1:]])
    assert not budget.reads_beside([False] * len(SHAPES))


def test_one_shape_reads_prompts_where_it_has_room() -> None:
    budget = Budget(SHAPES[2:3], 8)
    assert budget.reads_beside([True]) and not budget.reads_beside([False])
