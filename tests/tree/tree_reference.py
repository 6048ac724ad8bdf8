"""Plain-Python meanings of grow and walk, one request at a time, and random lattices to try them on."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from sglang_dflash.tree import DraftTree, Lattice


@dataclass
class Case:
    lattice: Lattice
    bonus: torch.Tensor
    n: int


@st.composite
def cases(draw: st.DrawFn, max_d: int = 5, max_k: int = 5, max_n: int = 40, min_n: int = 0) -> Case:
    """A small batch of lattices, half of them with quantised scores so that paths tie, and a fitting n.

    Tokens come from a small vocabulary, so the same token stands at many places of a tree.
    """
    bs, d, k = draw(st.integers(1, 3)), draw(st.integers(1, max_d)), draw(st.integers(1, max_k))
    transitions, quantised = draw(st.booleans()), draw(st.booleans())
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kp = k if transitions else 1
    if quantised:
        levels = torch.tensor([0.0, -0.5, -1.0, -1.5, -4.0, -torch.inf])
        logp = levels[torch.randint(len(levels), (bs, d, kp, k), generator=rng)]
    else:
        logp = (torch.randn(bs, d, kp, k, generator=rng) * 3).log_softmax(-1) - 0.01
    logp[:, 0] = logp[:, 0, :1]
    tokens = torch.rand(bs, d, k + 2, generator=rng).argsort(-1)[..., :k].contiguous()
    lattice = Lattice(tokens, logp)
    n = draw(st.integers(min_n, min(max_n, lattice.node_count)))
    return Case(lattice, torch.randint(k + 2, (bs,), generator=rng), n)


def step_logp(lattice: Lattice, b: int, path: tuple[int, ...], rank: int) -> np.float32:
    """Log-probability of the candidate of this rank after the ranks of path."""
    rows = lattice.logp[b, len(path)].numpy()
    before = path[-1] if path and len(rows) > 1 else 0
    return rows[before, rank]


def grow_by_heap(lattice: Lattice, b: int, bonus: int, n: int) -> dict[str, list]:
    """Best-first search: pop the best open node n times, opening the children of each popped one."""
    _, d, k = lattice.tokens.shape
    tree: dict[str, list] = {"tokens": [bonus], "parents": [0], "depths": [0], "logp": [np.float32(0)]}
    paths: list[tuple[int, ...]] = [()]
    heap: list[tuple] = []

    def open_children(node: int) -> None:
        if len(paths[node]) < d:
            for rank in range(k):
                step = step_logp(lattice, b, paths[node], rank)
                heapq.heappush(heap, (-(tree["logp"][node] + step), len(paths[node]) + 1, node, -step, rank))

    open_children(0)
    for _ in range(n):
        cost, depth, parent, _, rank = heapq.heappop(heap)
        paths.append((*paths[parent], rank))
        tree["tokens"].append(int(lattice.tokens[b, depth - 1, rank]))
        tree["parents"].append(parent)
        tree["depths"].append(depth)
        tree["logp"].append(-cost)
        open_children(len(paths) - 1)
    return tree


def best_paths(lattice: Lattice, b: int, n: int) -> list[tuple[int, ...]]:
    """The n first of all paths (as ranks): every path written down, sorted by the order grow promises."""
    _, d, k = lattice.tokens.shape
    keys: dict[tuple[int, ...], tuple] = {(): (np.float32(0), 0, (), np.float32(0), 0)}
    for depth in range(1, d + 1):
        for path in itertools.product(range(k), repeat=depth):
            parent, step = keys[path[:-1]], step_logp(lattice, b, path[:-1], path[-1])
            keys[path] = (parent[0] - step, depth, parent, -step, path[-1])
    del keys[()]
    return sorted(keys, key=keys.__getitem__)[:n]


def paths_of(tree: DraftTree, lattice: Lattice, b: int) -> list[tuple[int, ...]]:
    """Each drafted node's path as ranks, found by following parents."""
    found: list[tuple[int, ...]] = [()]
    for node in range(1, tree.tokens.shape[1]):
        parent, depth = int(tree.parents[b, node]), int(tree.depths[b, node])
        candidates = lattice.tokens[b, depth - 1].tolist()
        found.append((*found[parent], candidates.index(int(tree.tokens[b, node]))))
    return found[1:]


def walk_by_hand(tree: DraftTree, b: int, sampled: list[int], limit: int | None) -> list[int]:
    """Nodes passed from the root: while the sample at a node is a child's token, go there."""
    tokens, parents = tree.tokens[b].tolist(), tree.parents[b].tolist()
    nodes = [0]
    while limit is None or len(nodes) <= limit:
        here = nodes[-1]
        child = [i for i in range(1, len(tokens)) if parents[i] == here and tokens[i] == sampled[here]]
        if not child:
            break
        nodes += child
    return nodes
