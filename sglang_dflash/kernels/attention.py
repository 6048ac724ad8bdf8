"""Attention of a window to itself, joined with its attention to the prefix."""

from __future__ import annotations

import torch
from torch import Tensor


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    prefix_lse: Tensor,
    out: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor | None,
    scale: float,
    softcap: float,
) -> None:
    """Complete in place what attention to the prefix alone gave, with what each window token sees of the window; write
    the window's keys and values into the caches.

    q [bs * w, heads, size]; k, v [bs * w, kv_heads, size]; mask [bs, w, w] bool, each token seeing itself; prefix_lse
    [bs, heads, w] float32: natural log-sum-exp of the scores over the prefix, -inf without one; out [bs * w, heads,
    size]: attention to the prefix, then to both; key_cache, value_cache [room, kv_heads, size]; slots [bs * w] int64:
    where each token's go, None: nowhere (slot 0, SGLang's sink, may come more than once); scale: of the scores;
    softcap: scores are softcap * tanh(score / softcap), 0 for none.
    """
    if slots is not None:
        key_cache[slots], value_cache[slots] = k, v
    bs, w, _ = mask.shape
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    q, prefix = (x.float().view(bs, w, heads, size).transpose(1, 2) for x in (q, out))
    k, v = (x.float().reshape(bs, w, kv_heads, size).transpose(1, 2) for x in (k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    lse = torch.logaddexp(scores.logsumexp(-1), prefix_lse)
    old = (prefix_lse - lse).exp()[..., None]
    both = torch.where(old > 0, prefix, 0) * old + (scores - lse[..., None]).exp() @ v
    out.copy_(both.transpose(1, 2).reshape(out.shape))
