"""Window passes beside SGLang's FlashAttention-3 backend, on Hopper and Ampere: in one of two ways, whichever is
faster.

In most layers every window token sees the whole prefix, so that part is plain attention without a mask, however long it
is. Narrow windows, and all windows behind short prefixes, are attended to by the one op. Where wide windows meet a long
prefix, FlashAttention-3 attends to it, and a second op joins what each token sees of its window.

A draft that sees only the last tokens of its context never meets a long prefix: its passes go to the one op, and so do
all layers with a sliding window or sinks. And so does every pass over keys and values in eight bits: FlashAttention-3
would round its queries to eight bits too.

Which way a pass goes is decided by the longest prefix that the host thinks possible; CUDA graphs are recorded of both.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.layers.attention import flashattention_backend
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.kernels.attention import Sight
from sglang_dflash.platforms.cuda import SHORT_PREFIX, is_narrow
from sglang_dflash.platforms.cuda.attention import WindowAttention


class Ways:
    """The CUDA graphs SGLang records of each batch size, and which one a batch replays."""

    short, long = "short prefix", "long prefix"
    capture_labels: ClassVar[tuple[str, ...]] = (short, long)

    @classmethod
    def select(cls, forward_batch: Any) -> str:
        """By the host's bounds on the lengths, which no prefix exceeds; a pass of SGLang's own may have none."""
        bounds = forward_batch.seq_lens_cpu
        return cls.short if bounds is not None and int(bounds.max()) <= SHORT_PREFIX else cls.long


class FlashAttentionWindows(WindowAttention, flashattention_backend.FlashAttentionBackend):
    """SGLang's FlashAttention-3 backend, with window passes."""

    def pages(self, own_pool: bool) -> tuple[Tensor, int]:
        tables = self.forward_metadata
        return tables.swa_page_table if own_pool else tables.page_table, self.page_size

    def own_slots(self) -> Tensor:
        return self.forward_metadata.swa_out_cache_loc

    def ways(self, width: int) -> type[Ways] | None:
        return None if self._has_one_way(width) else Ways

    def _has_one_way(self, width: int) -> bool:
        in_eight_bits = self.kv_cache_dtype.itemsize == 1
        return self.reach > 0 or in_eight_bits or is_narrow(width, self.num_attention_heads, self.num_kv_heads)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if forward_batch.forward_mode.is_target_verify():
            width = forward_batch.spec_info.draft_token_num
            self._in_one = self._has_one_way(width) or Ways.select(forward_batch) == Ways.short
        super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if in_capture:
            self._in_one = get_capture_attention_variant() != Ways.long
        super().init_forward_metadata_out_graph(forward_batch, in_capture)

    def _begin(self) -> None:
        super()._begin()
        if not self._in_one:
            self._schedule()

    def _schedule(self) -> None:
        """Share the prefix's tiles out among the multiprocessors: once a pass, as all layers read the same lengths."""
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

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        slots: Tensor | None,
        sight: Sight,
        mask: Tensor,
        first_keys: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if self._in_one or sight.window or sinks is not None:
            return super()._attend(q, k, v, layer, slots, sight, mask, first_keys, sinks)
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
