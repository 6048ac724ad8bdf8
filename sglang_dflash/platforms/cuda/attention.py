"""Attention of window passes on Hopper and Ampere, in one of two ways, whichever is faster.

In most layers every window token sees the whole prefix, so that part is plain attention without a mask, however long it
is. What a token sees of its window is a few ancestors. Narrow windows, and all windows behind short prefixes, are
attended to by one op of ours. Where wide windows meet a long prefix, FlashAttention-3 attends to it, and a second op
joins what each token sees of its window. No mask as long as the context is ever made, and nothing is planned on the
host.

A draft that sees only the last tokens of its context never meets a long prefix: its passes go to the one op, and so do
all layers with a sliding window.

Which way a pass goes is decided by the longest prefix that the host thinks possible; CUDA graphs are recorded of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from sglang.srt.layers.attention import flashattention_backend
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.kernels.attention import Sight
from sglang_dflash.platforms.cuda import SHORT_PREFIX, is_narrow, parts_of
from sglang_dflash.platforms.sight import sight_of


def capture_both_ways(capture: Callable[[Any], None], runner: Any) -> None:
    """Around SGLang's capture of a runner's CUDA graphs: where a window pass has two ways, graphs of both."""
    backend = parts_of(runner.attn_backend)[0]
    if isinstance(backend, WindowAttentionBackend):
        runner.attention_graph_variants = backend.ways(runner.captured_req_width)
    capture(runner)


class Ways:
    """The CUDA graphs SGLang records of each batch size, and which one a batch replays."""

    short, long = "short prefix", "long prefix"
    capture_labels: ClassVar[tuple[str, ...]] = (short, long)

    @classmethod
    def select(cls, forward_batch: Any) -> str:
        """By the host's bounds on the lengths, which no prefix exceeds; a pass of SGLang's own may have none."""
        bounds = forward_batch.seq_lens_cpu
        return cls.short if bounds is not None and int(bounds.max()) <= SHORT_PREFIX else cls.long


class WindowAttentionBackend(flashattention_backend.FlashAttentionBackend):
    """SGLang's FlashAttention-3 backend, with window passes (TARGET_VERIFY) under `spec_info.window_mask`.

    window_mask [bs, w, w] bool: window token i sees window token j, where the layer lets it. The keys and values of the
    window are written by the same kernel that attends to them.

    reach: how many tokens of the prefix, the last ones, a window pass sees; 0: all. masks_are_causal: a pass's mask
    names no later token, so that no layer needs to leave one out.
    """

    reach = 0
    masks_are_causal = True

    def ways(self, width: int) -> type[Ways] | None:
        """Of attending to windows of this width; None if there is one."""
        return None if self._has_one_way(width) else Ways

    def _has_one_way(self, width: int) -> bool:
        return self.reach > 0 or is_narrow(width, self.num_attention_heads, self.num_kv_heads)

    def make_room(self, requests_by_width: dict[int, int]) -> None:
        """Make what graphs of these widths read, each for so many requests; once, as graphs keep the addresses."""
        most = max(requests_by_width.values())
        super().init_cuda_graph_state(most, max(width * bs for width, bs in requests_by_width.items()))
        self._graph_lens = torch.ones(most, dtype=torch.int32, device=self.device)
        self._graph_masks = {  # rows that only pad a batch see themselves: nothing undefined comes of them
            width: torch.eye(width, dtype=torch.bool, device=self.device).repeat(bs, 1, 1)
            for width, bs in requests_by_width.items()
        }

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Asked by the graph runner of each width; new tables would leave the graphs before it without theirs."""
        room = self._graph_masks[max_num_tokens // max_bs]
        if len(room) < max_bs:
            raise ValueError(f"graphs of {max_bs} requests need tables of as many, and room was made for {len(room)}")

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            bs, width = forward_batch.batch_size, forward_batch.spec_info.draft_token_num
            mask = getattr(forward_batch.spec_info, "window_mask", None)
            if mask is None:  # SGLang warming up
                mask = torch.ones(bs, width, width, dtype=torch.bool, device=self.device)
            self._in_one = self._has_one_way(width) or Ways.select(forward_batch) == Ways.short
            self._bind(forward_batch.seq_lens.to(torch.int32), mask.contiguous())
            self._begin()

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if forward_batch.forward_mode.is_target_verify():
            bs = forward_batch.batch_size
            lens, mask = self._graph_lens[:bs], self._graph_masks[forward_batch.spec_info.draft_token_num][:bs]
            if not in_capture:
                lens.copy_(forward_batch.seq_lens[:bs])
                given = forward_batch.spec_info.window_mask
                mask[: len(given)].copy_(given)
            else:
                self._in_one = get_capture_attention_variant() != Ways.long
            self._bind(lens, mask)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        super().init_forward_metadata_in_graph(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            self._begin()

    def _bind(self, prefix_lens: Tensor, mask: Tensor) -> None:
        self._prefix_lens, self._mask = prefix_lens, mask

    def _begin(self) -> None:
        """Before a pass's layers: a captured graph holds what is launched from here on."""
        self._seen: dict[Sight, tuple[Tensor, Tensor | None]] = {}
        self._schedule()

    def _schedule(self) -> None:
        """Share the prefix's tiles out among the multiprocessors: once a pass, as all layers read the same lengths."""
        if self._in_one:
            return
        bs, width, _ = self._mask.shape
        self._tiles = self._get_scheduler_metadata(
            batch_size=bs,
            max_seqlen_q=width,
            max_seqlen_k=self.forward_metadata.page_table.shape[1] * self.page_size,
            num_heads=self.num_attention_heads,
            num_heads_k=self.num_kv_heads,
            headdim=self.head_dim,
            cache_seqlens=self._prefix_lens,
            qkv_dtype=self.kv_cache_dtype,
            page_size=self.page_size,
            has_softcap=self.has_softcap,
            num_splits=self.num_splits,
        )

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Tensor:
        if not forward_batch.forward_mode.is_target_verify():
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if kwargs:
            raise NotImplementedError(
                f"layer {layer.layer_id} asks attention for {sorted(kwargs)}, which window passes do not have: serve "
                "this model without DFLASH"
            )
        sight = self._sight(layer)
        q, k, v = (
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            k.view(-1, layer.tp_k_head_num, layer.head_dim),
            v.view(-1, layer.tp_v_head_num, layer.head_dim),
        )
        window = forward_batch.out_cache_loc if save_kv_cache else None
        mask, first_keys = self._seen_by(sight, forward_batch)
        if self._in_one or sight.window:
            out = self._attend_in_one(q, k, v, layer, window, mask, sight.prefix_keys, first_keys)
        else:
            out = self._attend_in_two(q, k, v, layer, window, mask)
        return out.view(len(out), -1)

    def _sight(self, layer: Any) -> Sight:
        sight = sight_of(layer, self.reach)
        return sight._replace(causal=False) if self.masks_are_causal else sight

    def _seen_by(self, sight: Sight, forward_batch: Any) -> tuple[Tensor, Tensor | None]:
        """The window's keys that each row of such a layer sees, and its first of the prefix; once a pass and kind."""
        if not (sight.window or sight.causal):
            return self._mask, None
        if sight not in self._seen:
            positions = forward_batch.positions.view(self._mask.shape[:2])
            first_keys = sight.first_keys(self._prefix_lens, positions).to(torch.int32) if sight.window else None
            self._seen[sight] = sight.within(self._mask, positions), first_keys
        return self._seen[sight]

    def _attend_in_one(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        slots: Tensor | None,
        mask: Tensor,
        reach: int,
        first_keys: Tensor | None,
    ) -> Tensor:
        return kernels.tree_attention(
            q,
            k,
            v,
            mask,
            self._prefix_lens,
            self.forward_metadata.page_table,
            self.page_size,
            *self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            slots,
            layer.scaling,
            layer.logit_cap,
            reach,
            first_keys,
        )

    def _attend_in_two(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, slots: Tensor | None, mask: Tensor
    ) -> Tensor:
        bs, width, _ = self._mask.shape
        keys, values = self.get_paged_mha_kv_cache(layer)
        out, lse, *_ = self.flash_attn_with_kvcache(
            q=q.reshape(bs, width, *q.shape[1:]),
            k_cache=keys,
            v_cache=values,
            page_table=self.forward_metadata.page_table,
            cache_seqlens=self._prefix_lens,
            softmax_scale=layer.scaling,
            causal=False,
            softcap=layer.logit_cap,
            scheduler_metadata=self._tiles,
            num_splits=self.num_splits,
            return_softmax_lse=True,
            ver=self.fa_impl_ver,
        )
        out = out.view(q.shape)
        kernels.window_attention(
            q,
            k,
            v,
            mask,
            lse,
            out,
            *self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            slots,
            layer.scaling,
            layer.logit_cap,
        )
        return out
