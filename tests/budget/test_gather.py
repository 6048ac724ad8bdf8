"""Prompts that wait for others: as long as a pass saved is worth more than their places, and never for long."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sglang_dflash.budget import Gather
from sglang_dflash.budget.gather import STEPS

# Seconds of passes on an H200, by width, then by requests: weights take 4.5 ms to read, 64 tokens more take 1 to 1.5.
PASSES = {1: {1: 4.5e-3, 64: 4.7e-3}, 8: {16: 5.1e-3, 32: 7.4e-3, 64: 12.4e-3}, 16: {64: 23.4e-3}}
IN_PROPORTION = {1: {1: 1e-3, 64: 64e-3}, 8: {64: 512e-3}}


def gather(passes: dict[int, dict[int, float]], tokens: int = 110) -> Gather:
    made = Gather()
    made.expect(passes)
    made.read(1, tokens)
    return made


def seconds(tokens: int) -> float:
    sizes, times = [1, 64, 128, 256, 512, 1024], [4.5e-3, 4.7e-3, 5.1e-3, 7.4e-3, 12.4e-3, 23.4e-3]
    return float(np.interp(tokens, sizes, times))


def closed_loop(one: Gather, at_once: int, step: float, accepted: float, answers: int = 600) -> tuple[float, float]:
    """Tokens a second of so many clients, each asking anew when answered, and the median wait for a first token."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(256, rng.gamma(4, 50, answers)).astype(int) + 1
    now, waits, left = 0.0, [], list(range(answers))
    waiting = [(0.0, left.pop()) for _ in range(at_once)]
    running: dict[int, int] = {}
    while running or waiting:
        if waiting and not one.waits(now, len(running), len(waiting)):
            new, waiting = waiting[:16], waiting[16:]
            one.read(len(new), 110 * len(new))
            now += seconds(110 * len(new)) + 1e-3
            waits += [now - since for since, _ in new]
            running |= {i: lengths[i] - 1 for _, i in new}
            continue
        one.waits(now, len(running), 0) if not waiting else None
        now += step
        for i in list(running):
            running[i] -= 1 + rng.poisson(accepted - 1)
            if running[i] <= 0:
                del running[i]
                if left:
                    waiting.append((now, left.pop()))
    return lengths.sum() / now, float(np.median(waits))


@pytest.mark.parametrize(("at_once", "step", "accepted", "gain"), [(64, 8.8e-3, 3.5, 1.04), (128, 10.5e-3, 2.6, 1.03)])
def test_a_loaded_server_makes_more_tokens_a_second(at_once: int, step: float, accepted: float, gain: float) -> None:
    alone, _ = closed_loop(Gather(), at_once, step, accepted)
    together, waits = closed_loop(gather(PASSES), at_once, step, accepted)
    assert together > gain * alone
    assert waits < (STEPS + 3) * step


@pytest.mark.parametrize("at_once", [1, 4])
def test_few_requests_wait_for_nobody(at_once: int) -> None:
    """Prompts come too seldom."""
    assert closed_loop(gather(PASSES), at_once, 6e-3, 5.8, 60) == closed_loop(Gather(), at_once, 6e-3, 5.8, 60)


def often(one: Gather, count: int = 20, apart: float = 0.001) -> float:
    """Prompts come and are read, one by one; the time after them."""
    for i in range(count):
        one.waits(i * apart, 64, 1)
        one.read(1, 110)
    return count * apart


def test_no_prompt_waits_longer_than_some_steps() -> None:
    """Not one that others have joined, nor where there is no memory to read it in."""
    one = gather(PASSES)
    now = often(one)
    assert [one.waits(now, 64, 1 + (i > 0)) for i in range(5)] == [True] * STEPS + [False] * (5 - STEPS)


def test_enough_prompts_wait_no_longer() -> None:
    one = gather(PASSES)
    now = often(one)
    assert not one.waits(now, 64, 40)


@pytest.mark.parametrize(
    "make",
    [
        Gather,
        lambda: gather(IN_PROPORTION),
        lambda: gather(PASSES, tokens=2000),
    ],
    ids=["nothing is known of passes", "a pass over two takes twice as long", "prompts are long"],
)
def test_nobody_waits_where_nothing_is_saved(make: Callable[[], Gather]) -> None:
    one = make()
    for i in range(20):
        assert not one.waits(i * 1e-3, 64, 1)
        one.read(1, 2000 if one._usual == 2000 else 110)


def test_nobody_waits_while_nobody_decodes() -> None:
    one = gather(PASSES)
    now = often(one)
    assert not one.waits(now, 0, 1)


def test_places_that_become_free_are_prompts_that_come() -> None:
    """A full server: prompts always wait, and count as there when there is a place for them."""
    one = gather(PASSES)
    now = often(one)
    assert one.waits(now, 64, 1)
    assert one.waits(now + 0.001, 64, 2)
    one.read(2, 220)
    assert one.waits(now + 0.002, 64, 1)
