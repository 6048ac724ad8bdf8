"""A small world for the budget: what steps cost, and what targets accept, known to the test alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sglang_dflash.budget import Budget, Choice, Shape

ANY = 1 << 30
SHAPES = (
    Shape(0, 0, 1, ANY), Shape(2, 2, 3, 341), Shape(4, 4, 5, 204), Shape(7, 7, 8, 128), Shape(15, 10, 11, 64),
    Shape(31, 15, 16, 32),
)  # fmt: skip
# Milliseconds of a target's and a draft's linear layers by tokens, measured on an H200 (docs/gpu.md).
TOKENS = [1, 64, 128, 192, 256, 512, 1024, 2048, 4096]
TARGET = [3.9, 4.1, 4.6, 5.5, 7.0, 11.9, 22.8, 45.7, 91.4]
DRAFT = [0.70, 0.74, 0.82, 1.03, 1.25, 2.1, 4.1, 8.3, 16.6]


def roof(requests: int, shape: Shape) -> float:
    """Seconds of a step."""
    drafting = np.interp(requests * shape.block, TOKENS, DRAFT) if shape.nodes else 0.0
    return float(np.interp(requests * shape.verified, TOKENS, TARGET) + drafting) / 1000


@dataclass
class World:
    """likely: the chance that the smallest shape has the right child; each wider one makes up for a share of misses.

    checks: seconds that the host takes for grammars behind a pass, of each request.
    """

    likely: float
    cost: Callable[[int, Shape], float] = roof
    noise: float = 0.03
    checks: float = 0.0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def chances(self) -> np.ndarray:
        """By shape, the chance that a node has the right child; 0 where nothing is drafted."""
        found = 1 - (1 - self.likely) * 0.75 ** np.arange(len(SHAPES) - 1)
        return np.array([0.0, *found]) if self.likely > 0 else np.zeros(len(SHAPES))

    def accept(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """Walked nodes and how many: node indices that smaller trees hold are those that they would have accepted."""
        shape, bs = SHAPES[choice.shape], len(choice.requests)
        nodes, lens = np.zeros((bs, shape.depth + 1), dtype=np.int64), np.ones(bs, dtype=np.int64)
        chances = self.chances()
        for row in np.flatnonzero(choice.drafting):
            for depth in range(1, shape.depth + 1):
                fits = np.flatnonzero(self.rng.random() < chances[: choice.shape + 1])
                if not len(fits):
                    break
                node = max(nodes[row, depth - 1], SHAPES[fits[0] - 1].nodes) + 1
                if node > shape.nodes:
                    break
                nodes[row, depth], lens[row] = node, depth + 1
            nodes[row, lens[row] :] = nodes[row, lens[row] - 1]
        return nodes, lens

    def seconds(self, bs: int, shape: Shape) -> float:
        """Of a step."""
        return self.cost(bs, shape) + bs * self.checks

    def run(self, budget: Budget, bs: int, steps: int, drafting: bool = True) -> tuple[float, float, np.ndarray]:
        """Tokens, seconds and steps by shape of a batch of so many requests."""
        sort = int(self.checks > 0)
        requests, kinds = np.arange(bs), np.full(bs, 2 * sort)
        budget.cost.begin(requests, np.full(bs, sort == 1))
        tokens = seconds = 0.0
        taken = np.zeros(len(SHAPES), dtype=np.int64)
        for _ in range(steps):
            choice = budget.choose(requests, kinds, np.full(bs, drafting), sort)
            nodes, lens = self.accept(choice)
            shape = SHAPES[choice.shape]
            took = (1 + self.noise * self.rng.standard_normal()) * self.seconds(bs, shape)
            checks = bs * self.checks if sort else 0.0
            if sort:
                budget.cost.checks_took(requests, checks)
            budget.learn(choice, nodes, lens)
            budget.cost.took(bs, choice.shape, took, sort, checks)
            tokens, seconds, taken[choice.shape] = tokens + lens.sum(), seconds + took, taken[choice.shape] + 1
        return tokens, seconds, taken

    def tokens(self, bs: int, steps: int = 400) -> np.ndarray:
        """What a step of each shape emits, by trial."""
        emitted = []
        for index in range(len(SHAPES)):
            choice = Choice(index, np.arange(bs), np.zeros(bs, dtype=np.int64), np.ones(bs, dtype=bool), 0, 0)
            emitted.append(np.mean([self.accept(choice)[1].sum() for _ in range(max(1, steps // bs))]))
        return np.array(emitted)

    def best(self, bs: int, steps: int = 400) -> tuple[int, float]:
        """The best shape for such a batch, by trial, and its tokens a second."""
        seconds = [self.seconds(bs, shape) if bs <= shape.most else np.inf for shape in SHAPES]
        rates = self.tokens(bs, steps) / seconds
        return int(rates.argmax()), float(rates.max())


def told(budget: Budget, cost: Callable[[int, Shape], float] = roof) -> Budget:
    """A budget that has measured its passes before serving."""
    sizes = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
    for index, shape in enumerate(SHAPES):
        budget.cost.expect(index, sizes, np.array([cost(size, shape) for size in sizes]))
    return budget
