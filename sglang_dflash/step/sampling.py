"""Sampling at every node of a tree with SGLang's own sampler.

What is emitted is always the target's own sample, so greedy text and every sampled distribution are what they are
without speculation, whatever was drafted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask
from torch import Tensor

_PER_REQUEST = ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed")


def depends_on_history(req: Any) -> bool:
    """Whether a request's logits depend on the tokens before: penalties, grammars, custom logit processors.

    Such a request takes its one token at the root, as plain decoding does, while the rest of the batch walks on.
    """
    params = req.sampling_params
    return bool(
        req.grammar is not None
        or req.custom_logit_processor
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.repetition_penalty != 1.0
        or params.min_new_tokens > 0
    )


def adjust_logits(
    logits: Tensor,
    batch: Any,
    bonus_tokens: Tensor,
    grammar_barrier: Callable[[], None] | None,
) -> None:
    """Apply the batch's biases in place: logit bias at every node, what depends on history at the root alone.

    logits [bs, w, V]; bonus_tokens [bs] int64: the roots.
    """
    info = batch.sampling_info
    penalised = info.acc_additive_penalties is not None or info.acc_scaling_penalties is not None
    with_history = batch.has_grammar or penalised or info.has_custom_logit_processor
    if info.logit_bias is not None:
        free = logits[:, 1:] if with_history else logits
        free += info.logit_bias[:, None]
    if not with_history:
        return
    mask = None
    if batch.has_grammar:
        mask = build_grammar_vocab_mask(
            reqs=batch.reqs,
            tree=GrammarTree.from_linear_chain(bonus_tokens[:, None]),
            sampling_info=info,
            device=logits.device,
            barrier=grammar_barrier,
        )
    root = logits[:, 0].contiguous()
    dataclasses.replace(info, grammar_mask=mask).apply_logits_bias(root)
    if info.has_custom_logit_processor:
        apply_custom_logit_processor(root, info)
    logits[:, 0] = root


def sample_nodes(runner: Any, output: Any, info: Any, positions: Tensor, width: int) -> Tensor:
    """The target's sample at each node, int64 [bs, width].

    runner: the target's model runner; output: its LogitsProcessorOutput with `next_token_logits` [bs * width, V],
    which sampling overwrites; info: the batch's SamplingBatchInfo; positions [bs * width] int64 of the nodes.
    """
    settings = () if info.is_all_greedy else _PER_REQUEST  # of which greedy sampling reads none
    per_node = dataclasses.replace(
        info,
        **{name: value.repeat_interleave(width, 0) for name in settings if (value := getattr(info, name)) is not None},
        has_custom_logit_processor=False,
        grammars=None,
        sampling_mask_batch_indices=None,
    )
    return runner.sampler(output, per_node, False, [], [], positions).to(torch.int64).view(-1, width)
