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
from sglang_dflash.step.grammar import looks_ahead
from sglang_dflash.step.penalties import Penalised
from sglang_dflash.tree import DraftTree


def depends_on_history(req: Any) -> bool:
    """Whether a request's logits depend on the tokens before as no path can tell: custom logit processors, and grammars
    that cannot look ahead.

    Such a request takes its one token at the root, as plain decoding does, while the rest of the batch walks on.
    """
    return bool(req.custom_logit_processor or (req.grammar is not None and not looks_ahead(req.grammar)))


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


def sample_nodes(logits: Tensor, info: Any, positions: Tensor, tree: DraftTree) -> Tensor:
    """The target's sample at each node, int64 [bs, w]; on a CPU at those alone that its own samples lead to.

    logits [bs * w, V]: the target's at the nodes; info: the batch's SamplingBatchInfo; positions [bs * w] int64.
    """
    if logits.is_cpu:
        return _sample_along(logits, info, positions, tree)
    if info.is_all_greedy:
        return logits.argmax(-1).view(tree.tokens.shape)
    return _sample(logits, positions, info, slice(None)).view(tree.tokens.shape)


def _sample_along(logits: Tensor, info: Any, positions: Tensor, tree: DraftTree) -> Tensor:
    """A sample costs a CPU as much as a layer: none is drawn where no walk can come. Other nodes' are 0."""
    bs, w = tree.tokens.shape
    sampled = torch.zeros_like(tree.tokens)
    walking, node = torch.arange(bs), torch.zeros(bs, dtype=torch.int64)
    while len(walking):
        rows = walking * w + node
        token = _sample(logits[rows], positions[rows], info, walking)
        sampled[walking, node] = token
        follows = (tree.parents[walking] == node[:, None]) & (tree.tokens[walking] == token[:, None])
        follows[:, 0] = False  # the root, its own parent
        on = follows.any(1)
        walking, node = walking[on], follows[on].int().argmax(1)
    return sampled


def _sample(logits: Tensor, positions: Tensor, info: Any, requests: slice | Tensor) -> Tensor:
    """A token of each row, of the requests named: equally many rows of each, neighbours."""
    filtered = info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling
    return kernels.sample(logits, positions, *settings_of(info, requests), filtered)


def settings_of(info: Any, requests: slice | Tensor) -> tuple[Tensor, ...]:
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
