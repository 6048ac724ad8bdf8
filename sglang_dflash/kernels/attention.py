"""Attention of a window to itself, joined with its attention to the prefix; and who sees whom there.

Row i of a window sees the prefix's keys from its first key on, and those keys of the window that a mask names. Whatever
a layer is (full, sliding, causal, of a draft with a window of its own), it comes to these two, by its `Sight`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sight(NamedTuple):
    """What a layer lets the rows of a window pass see; 0: all.

    reach: how many tokens of the prefix, the last ones, every row sees: a draft's own window. window: how many
    positions before its own a row sees, and as many after: a sliding layer; positions count by depth in a tree. causal:
    no row sees one after it.
    """

    reach: int = 0
    window: int = 0
    causal: bool = False

    @property
    def prefix_keys(self) -> int:
        """The most keys of the prefix that a row sees, the last ones; 0: all."""
        return min((most for most in (self.reach, self.window) if most), default=0)

    def first_keys(self, prefix_lens: Tensor, positions: Tensor) -> Tensor:
        """The first key of the prefix that each row sees, [bs, w]. prefix_lens [bs], positions [bs, w]."""
        first = torch.zeros_like(positions)
        if self.reach:
            first = torch.maximum(first, prefix_lens[:, None] - self.reach)
        return torch.maximum(first, positions - self.window) if self.window else first

    def within(self, mask: Tensor, positions: Tensor) -> Tensor:
        """Of the window's keys that the pass's mask names, [bs, w, w] bool, those that this layer lets each row see."""
        if self.causal:
            mask = mask.tril()
        if self.window:
            mask = mask & ((positions[:, :, None] - positions[:, None]).abs() <= self.window)
        return mask


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
    first_keys: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Attention of a window pass, [bs * w, heads, size] in q's dtype: each window token sees the prefix and those
    window tokens that the mask names. Writes the window's keys and values into the caches.

    prefix_lens [bs] int32: tokens before the window; pages [bs, P] int32: where they are, page_size slots a page;
    reach: how many tokens of the prefix, the last ones, are seen, 0: all; first_keys [bs, w] int32: the first that each
    row sees, none of them before the reach; sinks [heads]: the score of a key that every row sees and whose
    value is zero; k_scale, v_scale: what keys and values are divided by in caches of another type than theirs, such as
    eight bits, and the window's are attended to as rounded as the prefix's; the others as in `window_attention`.
    """
    bs, w, _ = mask.shape
    if key_cache.dtype != k.dtype:
        k, v = rounded(k, k_scale, key_cache), rounded(v, v_scale, value_cache)
        scale = scale * k_scale
    else:
        v_scale = 1.0
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
    unseen = unseen[:, None].expand(bs, w, -1)
    if first_keys is not None:
        unseen = unseen | (positions < first_keys[..., None])
    scores = scores.masked_fill(unseen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    weights = (scores - lse[..., None]).exp().nan_to_num()  # no prefix, no weights
    out = torch.einsum("bhwl,blhd->bwhd", weights, values).reshape(q.shape)
    window_attention(q, k, v, mask, lse, out, key_cache, value_cache, slots, scale, softcap)
    return (out * v_scale).to(q.dtype)


def rounded(x: Tensor, scale: float, cache: Tensor) -> Tensor:
    """Keys or values as a cache of another type holds them: divided by its scale, in their type, then rounded."""
    return (x if scale == 1 else x / scale).to(cache.dtype)
