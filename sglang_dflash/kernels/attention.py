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


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    prefix_lens: Tensor,
    pages: Tensor,
    page_size: int,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor | None,
    scale: float,
    softcap: float,
    reach: int = 0,
) -> Tensor:
    """Attention of a window pass, [bs * w, heads, size] in q's dtype: each window token sees the whole prefix and those
    window tokens that the mask names. Writes the window's keys and values into the caches.

    prefix_lens [bs] int32: tokens before the window; pages [bs, P] int32: where they are, page_size slots a page;
    reach: how many tokens of the prefix, the last ones, are seen, 0: all; the others as in `window_attention`.
    """
    bs, w, _ = mask.shape
    positions = torch.arange(pages.shape[1] * page_size, device=q.device)
    at = pages[:, positions // page_size].long() * page_size + positions % page_size  # [bs, L]
    group, scaled = q.shape[1] // k.shape[1], q.float().view(bs, w, *q.shape[1:]) * scale
    keys, values = (cache[at].float().repeat_interleave(group, 2) for cache in (key_cache, value_cache))
    scores = torch.einsum("bwhd,blhd->bhwl", scaled, keys)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    unseen = positions >= prefix_lens[:, None]
    if reach:
        unseen |= positions < prefix_lens[:, None] - reach
    scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num()  # no prefix, no weights
    out = torch.einsum("bhwl,blhd->bwhd", weights, values).reshape(q.shape)
    window_attention(q, k, v, mask, lse, out, key_cache, value_cache, slots, scale, softcap)
    return out.to(q.dtype)
