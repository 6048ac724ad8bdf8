"""Growing a draft tree from a lattice, and walking it."""

from __future__ import annotations

import torch
from torch import Tensor


def _smallest(cost: Tensor, count: int) -> Tensor:
    """Indices of the `count` smallest of each row, ascending, ties by lowest index.

    cost [bs, M] float32, all >= 0.

    A top-k over unique integer keys does this at a fifth of a stable sort's price: a non-negative double
    orders as its own bits do, and a double made from a float32 leaves its low 29 bits free for the index.
    """
    key = cost.double().view(torch.int64) + torch.arange(cost.shape[1], device=cost.device)
    return key.topk(count, largest=False).indices


def _kept_widths(d: int, k: int, n: int) -> list[int]:
    """How many nodes of each depth can be among the n best: all, or n less the ancestors each needs."""
    widths, width = [], 1
    for depth in range(min(d, n)):
        width = min(width * k, n - depth)
        widths.append(width)
    return widths


def grow(
    tokens: Tensor, logp: Tensor, bonus_tokens: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The n most probable paths of a lattice, as a tree in best-first order under the bonus token.

    tokens [bs, d, K] int64; logp [bs, d, Kp, K] float32, all <= 0; bonus_tokens [bs] int64. The lattice must
    hold n nodes. Returns tokens, parents, depths [bs, n+1] int64, path log-probabilities [bs, n+1] float32,
    root first, and the ancestor mask [bs, n+1, n+1] bool.

    The order is total: higher path log-probability first, then lower depth, then lower parent (its node
    index), then the parent's own order of its candidates: higher log-probability, lower rank (place k in
    tokens[b, depth-1, k]).
    """
    bs, d, k = tokens.shape
    widths = _kept_widths(d, k, n)
    total = 1 + sum(widths)
    logp, ranks = logp.sort(dim=-1, descending=True, stable=True)

    # All kept nodes stand in one row, depth after depth, the root first. A node's code packs (depth, parent's
    # place in that row, rank).
    cost, rank = logp.new_zeros(bs, 1), tokens.new_zeros(bs, 1)
    costs, codes = [cost], [rank]
    first_parent = 0
    for depth, width in enumerate(widths, start=1):
        before = (rank if logp.shape[2] > 1 else torch.zeros_like(rank))[..., None].expand(-1, -1, k)
        extended = (cost[..., None] - logp[:, depth - 1].gather(1, before)).flatten(1)
        best = _smallest(extended, width)
        rank = ranks[:, depth - 1].gather(1, before).flatten(1).gather(1, best)
        codes.append((depth * total + first_parent + best // k) * k + rank)
        costs.append(extended.gather(1, best))
        first_parent += cost.shape[1]
        cost = costs[-1]

    every_cost = torch.cat(costs, 1)
    chosen = _smallest(every_cost, n + 1)
    code = torch.cat(codes, 1).gather(1, chosen)
    place, rank = code // k, code % k
    depths = place // total
    node_of_place = torch.zeros_like(every_cost, dtype=torch.int64)
    node_of_place.scatter_(1, chosen, torch.arange(n + 1, device=tokens.device).expand(bs, -1))
    parents = node_of_place.gather(1, place % total)
    with_root = torch.cat([bonus_tokens[:, None, None].expand(-1, 1, k), tokens], 1).flatten(1)
    path_logp = 0.0 - every_cost.gather(1, chosen)
    return with_root.gather(1, depths * k + rank), parents, depths, path_logp, ancestor_mask(parents, min(d, n))


def grow_chain(tokens: Tensor, logp: Tensor, bonus_tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Greedy descent: at each depth the most probable candidate after the one before, ties by lowest rank.

    Arguments as in `grow`, n <= d. Returns tokens [bs, n+1] int64 and path log-probabilities [bs, n+1]
    float32.
    """
    best_logp, best = logp[:, :n].max(-1)  # [bs, n, Kp]: the choice after every predecessor, followed below
    if logp.shape[2] > 1 and n > 0:
        path = [best[:, 0, :1]]
        for depth in range(1, n):
            path.append(best[:, depth].gather(1, path[-1]))
        rank = torch.cat(path, 1)
        before = torch.nn.functional.pad(rank[:, :-1], (1, 0))
        best_logp = best_logp.gather(2, before[..., None])
    else:
        rank = best[..., 0]
    drafted = tokens[:, :n].gather(2, rank[..., None])[..., 0]
    path_logp = torch.nn.functional.pad(best_logp[..., 0].cumsum(1), (1, 0))
    return torch.cat([bonus_tokens[:, None], drafted], 1), path_logp


def ancestor_mask(parents: Tensor, max_depth: int) -> Tensor:
    """mask[b, i, j]: node i sees node j, that is j is i or an ancestor of i.

    parents [bs, w] int64, the root its own parent; max_depth: no node is deeper. Returns [bs, w, w] bool.
    """
    bs, w = parents.shape
    above = parents[..., None]  # above[b, i, t] is t+1 steps above node i; each round doubles the steps
    while above.shape[2] < max_depth:
        farther = above.gather(1, above[..., -1:].expand_as(above))
        above = torch.cat([above, farther], 2)
    mask = torch.eye(w, dtype=torch.bool, device=parents.device).repeat(bs, 1, 1)
    return mask.scatter_(2, above, True)


def parents_of(mask: Tensor) -> Tensor:
    """Each node's parent, the root its own, [bs, w] int64: `ancestor_mask` the other way.

    mask [bs, w, w] bool, parents before their children: a node's last ancestor is its parent.
    """
    index = torch.arange(mask.shape[1], device=mask.device)
    return (mask & (index < index[:, None])).mul(index).amax(-1)


def walk(
    tokens: Tensor, parents: Tensor, mask: Tensor, sampled: Tensor, limit: Tensor | None, d: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the root, follow each node's sample for as long as it is the token of a child.

    tokens, parents [bs, w] int64 and mask [bs, w, w] bool: the trees, children of a node with distinct
    tokens; sampled [bs, w] int64: the target's sample at each node; limit [bs] int64: deepest node each request
    may pass, >= 0; d: no node is deeper. Returns nodes [bs, d+1] int64 (padded with the last), what is
    emitted [bs, d+1] int64 (padded with 0), its length [bs] int32, and the last of it [bs] int64.
    """
    follows = tokens == sampled.gather(1, parents)
    follows[:, 0] = True
    # A node is passed if it and all its ancestors follow; as parents precede children, in index order.
    passed = (mask <= follows[:, None]).all(-1)
    if limit is not None:
        passed &= mask.sum(-1) <= limit[:, None] + 1  # a node sees its depth of ancestors, and itself
    index = torch.arange(tokens.shape[1], device=tokens.device)
    last = (passed * index).amax(1, keepdim=True)
    nodes = torch.where(passed, index, last).topk(d + 1, largest=False).values
    lens = passed.sum(1, dtype=torch.int32)
    emitted = sampled.gather(1, nodes) * (index[: d + 1] < lens[:, None])
    return nodes, emitted, lens, sampled.gather(1, last)[:, 0]
