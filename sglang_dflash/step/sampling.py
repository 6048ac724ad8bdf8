"""Sampling at the nodes of a tree: with noise known beforehand, from a seed that every request has.

What is emitted is always the target's own sample, so greedy text and every sampled distribution are what they are
without speculation, whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.sampler import apply_custom_logit_processor
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.step.grammar import Grammars
from sglang_dflash.step.penalties import Penalised
from sglang_dflash.tree import DraftTree


def adjust_logits(logits: Tensor, info: Any, tree: DraftTree, penalised: Penalised | None) -> None:
    """Apply the batch's biases in place: penalties and logit bias at every node, custom processors at the root alone.

    logits [bs, w, V]; info: the batch's SamplingBatchInfo.
    """
    if penalised is not None:
        penalised.along(logits, tree)
    if info.logit_bias is not None:
        logits += info.logit_bias[:, None]
    if not info.has_custom_logit_processor:
        return
    root = logits[:, 0].contiguous()
    apply_custom_logit_processor(root, info)
    logits[:, 0] = root


def sample_nodes(
    logits: Tensor, info: Any, positions: Tensor, tree: DraftTree, grammars: Grammars | None = None
) -> Tensor:
    """The target's sample at each node, int64 [bs, w]; on a CPU at those alone that its own samples lead to.

    logits [bs * w, V]: the target's at the nodes; info: the batch's SamplingBatchInfo; positions [bs * w] int64;
    grammars: of the batch, whose masks made ahead are in the logits. What walks need of others is made on the way.
    """
    if logits.is_cpu:
        return _sample_along(logits, info, positions, tree, grammars, None)
    sampled = _sample(logits, positions, info, slice(None)).view(tree.tokens.shape)
    if grammars is None or not grammars.open:
        return sampled
    return _sample_along(logits, info, positions, tree, grammars, sampled)


def _sample_along(
    logits: Tensor, info: Any, positions: Tensor, tree: DraftTree, grammars: Grammars | None, sampled: Tensor | None
) -> Tensor:
    """The samples that walks come by, followed on the host: on a CPU, whom one costs as much as a layer, and under
    grammars that have not masked every node. Others stay as in sampled [bs, w], or are 0 where nothing was sampled.
    """
    bs, w = tree.tokens.shape
    trees = (tree.tokens.tolist(), tree.parents.tolist()) if grammars is None else (grammars.tokens, grammars.parents)
    known = None if sampled is None else sampled.flatten().tolist()
    nodes = dict.fromkeys(range(bs) if known is None or grammars is None else sorted(grammars.open), 0)
    children = {row: _children(trees[0][row], trees[1][row]) for row in nodes}
    chosen: dict[int, int] = {}

    def draw(requests: list[int], rows: list[int]) -> list[int]:
        tokens: list[int] = _sample(logits[rows], positions[rows], info, requests).tolist()
        return tokens

    while nodes:
        rows = [row * w + node for row, node in nodes.items()]
        tokens = draw(list(nodes), rows) if known is None else [known[row] for row in rows]
        if grammars is not None:
            tokens = grammars.settle(nodes, tokens, logits, draw)
        chosen.update(zip(rows, tokens, strict=True))
        after = zip(nodes.items(), tokens, strict=True)
        nodes = {row: child for (row, node), token in after if (child := children[row].get((node, token)))}
    if grammars is not None:
        grammars.step_back()
    sampled = torch.zeros_like(tree.tokens) if sampled is None else sampled
    places, found = torch.tensor([*chosen.items()], dtype=torch.int64, device=sampled.device).view(-1, 2).unbind(1)
    return sampled.flatten().index_copy(0, places, found).view(bs, w)


def _children(tokens: list[int], parents: list[int]) -> dict[tuple[int, int], int]:
    """A tree's nodes by their parent and token."""
    return {(parents[node], tokens[node]): node for node in range(1, len(tokens))}


def _sample(logits: Tensor, positions: Tensor, info: Any, requests: slice | list[int]) -> Tensor:
    """A token of each row, of the requests named: equally many rows of each, neighbours."""
    if info.is_all_greedy and not logits.is_cpu:
        return logits.argmax(-1)
    filtered = info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling
    return kernels.sample(logits, positions, *settings_of(info, requests), filtered)


def settings_of(info: Any, requests: slice | list[int]) -> tuple[Tensor, ...]:
    """Seeds, temperatures, top-k, top-p and min-p of the requests named, in the order of `kernels.sample`."""
    temperatures = info.temperatures[:, 0]
    by_request = (info.sampling_seed, temperatures, info.top_ks, info.top_ps, info.min_ps)
    return tuple(x[requests] for x in by_request)


def sample_from_probs(
    original: Callable[..., Any], sampler: Any, probs: Tensor, info: Any, positions: Tensor, unfiltered: bool
) -> tuple[Tensor, None]:
    """Around the choice of SGLang's sampler, which a prefill's first tokens come from: by the same noise as all others.

    probs [bs, V]: at the request's temperature already, and still needed; positions [bs] int64.
    """
    seeds, temperatures, *filters = settings_of(info, slice(None))
    one = torch.ones_like(temperatures)
    every = kernels.sample(probs.log(), positions.to(torch.int64), seeds, one, *filters, not unfiltered)
    return every.to(torch.int32), None
