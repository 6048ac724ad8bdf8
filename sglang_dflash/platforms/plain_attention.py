"""Attention over a paged KV pool in plain torch, on any device: what a CPU serves with, and CUDA in float32.

Every forward pass is a list of *spans*: a few requests, each with the same number of query tokens, which
gather the keys and values of their slots side by side and attend to them in one call. What decides who sees
whom is worked out once a forward pass; a layer only writes, gathers and attends. Spans are made on the host, from
lengths that only the device has for certain: on a GPU every pass waits for them, and no CUDA graph can hold one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sglang_dflash.kernels.attention import Sight
from sglang_dflash.platforms import PLAIN_ATTENTION
from sglang_dflash.platforms.sight import sight_of

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

# Padded key rows a span may gather: few enough to stay in a core's cache between the gather and the
# attention, enough to serve many short requests in one call.
SPAN_TOKENS = 8192


@dataclass
class Span:
    """Some requests of a forward pass with w query tokens each, and the L key slots they are padded to.

    tokens: rows of the batch's queries, b*w of them. slots [b*L] int64. prefix_lens [b]: keys before the
    first query token. first_keys [b]: how many keys before those no query sees (None: 0).
    query_pos [b, w]: positions of the query tokens, and of the keys they wrote. window_mask [b, w, w] bool: query i
    may see the key of query j (None: any), if the layer lets it. padded: some request has fewer than L keys.
    """

    tokens: slice
    b: int
    w: int
    slots: torch.Tensor
    prefix_lens: torch.Tensor
    query_pos: torch.Tensor
    window_mask: torch.Tensor | None
    padded: bool
    first_keys: torch.Tensor | None = None
    swa_slots: torch.Tensor | None = None
    masks: dict[Sight, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, sight: Sight, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask [b, 1, w, L] in dtype of the layers of one kind; None where everything is seen.

        The layers of a model are of few kinds, so each is built when its first layer asks.
        """
        if sight not in self.masks:
            self.masks[sight] = self._build_mask(sight, dtype)
        return self.masks[sight]

    def is_plainly_causal(self, sight: Sight) -> bool:
        """Whether query i sees exactly the first i+1 keys, which needs no mask tensor."""
        whole_prompt = self.b == 1 and self.w == self.slots.numel()
        return whole_prompt and self.window_mask is None and sight == Sight(causal=True)

    def _build_mask(self, sight: Sight, dtype: torch.dtype) -> torch.Tensor | None:
        one_sees_all = self.w == 1 or (not sight.causal and self.window_mask is None)
        if one_sees_all and not self.padded and not sight.window:
            return None
        b, w, key_count, device = self.b, self.w, self.slots.numel() // self.b, self.slots.device
        window = self.window_mask
        if window is None:
            window = torch.ones(b, w, w, dtype=torch.bool, device=device)
        own = self.prefix_lens[:, None] + torch.arange(w, device=device)  # [b, w]: columns of the window's own keys
        columns = torch.arange(key_count, device=device)
        seen = (columns < self.prefix_lens[:, None])[:, None].repeat(1, w, 1)
        if sight.window:
            before = columns if self.first_keys is None else columns + self.first_keys[:, None, None]
            seen &= before >= sight.first_keys(self.prefix_lens, self.query_pos)[..., None]
        seen.scatter_(2, own[:, None].expand(b, w, w), sight.within(window, self.query_pos))
        nothing = torch.zeros(b, 1, w, key_count, dtype=dtype, device=device)
        return nothing.masked_fill_(~seen[:, None], float("-inf"))


class PlainAttnBackend(AttentionBackend):
    """Decode, (chunked) extend and window passes for models with multi-head or grouped-query attention.

    A window pass is a TARGET_VERIFY forward over w = `spec_info.draft_token_num` tokens a request after its
    committed prefix (`forward_batch.seq_lens`): token i sees the prefix and those window tokens j with
    `spec_info.window_mask[b, i, j]` (bool [bs, w, w]; absent or None: all), each as far as the layer's `Sight` goes: it
    is causal unless encoder-only, and a tree's parents come before their children, so its mask loses nothing by it.

    reach: how many tokens of the prefix, the last ones, a window pass sees; 0: all.
    """

    reach = 0

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        if model_runner.use_mla_backend:
            raise ValueError(
                f"attention backend {PLAIN_ATTENTION} has no multi-head latent attention (MLA), which this model "
                "uses; serve it with another backend of an accelerator, or with SGLANG_USE_CPU_ENGINE=1"
            )
        self.req_to_token_pool = model_runner.req_to_token_pool  # these three: for a backend around this one
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.kv_index_translator = model_runner.kv_index_translator
        self.req_to_token = self.req_to_token_pool.req_to_token
        self.swa_pool = self.token_to_kv_pool if isinstance(self.token_to_kv_pool, SWAKVPool) else None
        self.kernel = _sdpa_on(self.req_to_token.device)
        self.spans: list[Span] = []
        self.write_loc: KVWriteLoc | None = None

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.spans = []
            return
        if mode.is_decode():
            self.spans = self._even_spans(forward_batch, forward_batch.seq_lens - 1, 1, None)
        elif mode.is_target_verify():
            spec = forward_batch.spec_info
            window_mask = getattr(spec, "window_mask", None)
            self.spans = self._even_spans(forward_batch, forward_batch.seq_lens, spec.draft_token_num, window_mask)
        else:
            self.spans = self._extend_spans(forward_batch)
        swa_loc = None
        if self.swa_pool is not None:
            swa_loc = self.swa_pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)
            for span in self.spans:
                span.swa_slots = self.swa_pool.translate_loc_from_full_to_swa(span.slots).clamp_(min=0)
        self.write_loc = KVWriteLoc(forward_batch.out_cache_loc, swa_loc)

    def _even_spans(
        self, batch: ForwardBatch, prefix_lens: torch.Tensor, w: int, window_mask: torch.Tensor | None
    ) -> list[Span]:
        """The same w query tokens for every request: neighbours share a span up to its size."""
        positions = batch.positions.view(-1, w)
        first_keys = None
        if self.reach and batch.forward_mode.is_target_verify():
            first_keys = (prefix_lens - self.reach).clamp(min=0)
            prefix_lens = prefix_lens - first_keys
        lens = [prefix + w for prefix in prefix_lens.tolist()]
        spans, start = [], 0
        while start < len(lens):
            end, longest = start + 1, lens[start]
            while end < len(lens) and (end + 1 - start) * max(longest, lens[end]) <= SPAN_TOKENS:
                longest = max(longest, lens[end])
                end += 1
            rows = slice(start, end)
            first = None if first_keys is None else first_keys[rows]
            spans.append(
                Span(
                    tokens=slice(start * w, end * w),
                    b=end - start,
                    w=w,
                    slots=self._slots(batch.req_pool_indices[rows], longest, first),
                    prefix_lens=prefix_lens[rows],
                    query_pos=positions[rows],
                    window_mask=None if window_mask is None else window_mask[rows],
                    padded=min(lens[rows]) < longest,
                    first_keys=first,
                )
            )
            start = end
        return spans

    def _extend_spans(self, batch: ForwardBatch) -> list[Span]:
        """A span a request: each adds its own number of tokens."""
        spans, start = [], 0
        prefix_lens, extend_lens = batch.extend_prefix_lens.tolist(), batch.extend_seq_lens.tolist()
        for i, (prefix, w) in enumerate(zip(prefix_lens, extend_lens, strict=True)):
            rows, tokens = slice(i, i + 1), slice(start, start + w)
            spans.append(
                Span(
                    tokens=tokens,
                    b=1,
                    w=w,
                    slots=self._slots(batch.req_pool_indices[rows], prefix + w),
                    prefix_lens=batch.extend_prefix_lens[rows],
                    query_pos=batch.positions[tokens].view(1, w),
                    window_mask=None,
                    padded=False,
                )
            )
            start += w
        return spans

    def _slots(
        self, req_pool_indices: torch.Tensor, length: int, first_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        if first_keys is None:
            return self.req_to_token[req_pool_indices, :length].reshape(-1).to(torch.int64)
        columns = first_keys[:, None] + torch.arange(length, device=first_keys.device)
        columns = columns.clamp(max=self.req_to_token.shape[1] - 1)  # what pads a shorter request
        return self.req_to_token[req_pool_indices[:, None], columns].reshape(-1).to(torch.int64)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer. q [tokens, heads*head_dim]; k, v [tokens, kv_heads, head_dim] of the new tokens.

        Returns [tokens, heads*v_head_dim] in q's dtype. Raises ValueError for a feature it does not have.
        """
        sinks = kwargs.pop("sinks", None)
        if kwargs or layer.is_cross_attention:
            asked = "cross-attention" if layer.is_cross_attention else ", ".join(sorted(kwargs))
            raise ValueError(f"attention backend {PLAIN_ATTENTION} does not serve {asked} (layer {layer.layer_id})")
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, self.write_loc, k, v)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        in_swa = self.swa_pool is not None and self.swa_pool.layers_mapping[layer.layer_id][1]
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        with self.kernel():
            outs = [self._attend(q[span.tokens], keys, values, layer, span, in_swa, sinks) for span in self.spans]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    forward_decode = forward_extend

    def _attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        span: Span,
        in_swa: bool,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        sight = sight_of(layer)
        slots = span.swa_slots if in_swa else span.slots
        q = q.view(span.b, span.w, *q.shape[1:]).transpose(1, 2)
        k = _gather(keys, slots, span.b, q.dtype)
        v = _gather(values, slots, span.b, q.dtype)
        by_hand = layer.logit_cap > 0 or sinks is not None
        causal = not by_hand and span.is_plainly_causal(sight)
        mask = None if causal else span.mask(sight, q.dtype)
        if by_hand:
            out = _attention_by_hand(q, k, v, mask, layer.scaling, layer.logit_cap, sinks)
        else:
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=layer.scaling, enable_gqa=True
            )
        return out.transpose(1, 2).reshape(span.b * span.w, -1)


def _sdpa_on(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Which of torch's attention kernels to use: on a GPU the one made of matrix products, exact in float32."""
    return nullcontext if device.type == "cpu" else partial(sdpa_kernel, SDPBackend.MATH)


def _gather(buffer: torch.Tensor, slots: torch.Tensor, b: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of buffer [slots, kv_heads, head_dim] as [b, kv_heads, L, head_dim]."""
    rows = buffer.flatten(1).index_select(0, slots)
    rows = rows.view(b, -1, *buffer.shape[1:]).transpose(1, 2)
    return rows if rows.dtype == dtype else rows.to(dtype)


def _attention_by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with what torch's own does not have: scores squeezed into (-cap, cap) by tanh, unless cap is 0; and
    sinks [heads], each the score of one more key whose value is zero.
    """
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, dim=1).transpose(-1, -2)).float() * scale
    if cap > 0:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return weights.to(q.dtype) @ v.repeat_interleave(group, dim=1)
