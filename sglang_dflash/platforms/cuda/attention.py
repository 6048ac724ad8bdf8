"""Attention of window passes: what every attention backend of SGLang's is given that they run beside.

A window's tokens see the prefix, in most layers all of it, and of their window a few ancestors. One op of ours attends
to both, and writes the window's keys and values. Nothing of it is planned on the host, and no mask as long as the
context is ever made. A backend says where the prefix is, and may have another way (`fa3.py`); its other passes, those
of prefills, are as SGLang made them.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.kernels.attention import Sight
from sglang_dflash.platforms import WITH_PROMPTS
from sglang_dflash.platforms.cuda import check_room
from sglang_dflash.platforms.sight import sight_of


class WindowAttention(AttentionBackend):
    """Window passes (TARGET_VERIFY) under `spec_info.window_mask`, for a class that derives from this one first and
    from SGLang's backend next.

    window_mask [bs, w, w] bool: window token i sees window token j, where the layer lets it. The keys and values of the
    window are written by the same kernel that attends to them.

    reach: how many tokens of the prefix, the last ones, a window pass sees; 0: all. masks_are_causal: a pass's mask
    names no later token, so that no layer needs to leave one out. windows_join: a pass of WITH_PROMPTS windows or more
    may have some whose prefix is another one of the same pass: there all keys are written before any is read.
    """

    needs_cpu_seq_lens = False  # bounds do, and a prefill's lengths are the host's own
    reach = 0
    masks_are_causal = True
    windows_join = False

    def pages(self, own_pool: bool) -> tuple[Tensor, int]:
        """Where the prefixes of this pass are: [bs, P] int32, and how many slots a page has. own_pool: in that of
        sliding layers, where a page that is seen no more may be any.
        """
        raise NotImplementedError

    def own_slots(self) -> Tensor:
        """Where the window's keys go in the pool of sliding layers, [bs * w]."""
        raise NotImplementedError

    def ways(self, width: int) -> Any:
        """The CUDA graphs SGLang is to record of windows of this width, as its runner names them; None: one."""
        return None

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
        check_room(max_bs, len(self._graph_masks[max_num_tokens // max_bs]))

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            bs, width = forward_batch.batch_size, forward_batch.spec_info.draft_token_num
            mask = getattr(forward_batch.spec_info, "window_mask", None)
            if mask is None:  # SGLang warming up
                mask = torch.ones(bs, width, width, dtype=torch.bool, device=self.device)
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
                if mask.shape[1] > 1:  # a root sees itself
                    mask[: len(given)].copy_(given)
            self._bind(lens, mask)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        super().init_forward_metadata_in_graph(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            self._begin()

    def _bind(self, prefix_lens: Tensor, mask: Tensor) -> None:
        self._prefix_lens, self._mask = prefix_lens, mask
        self._keys_first = self.windows_join and len(prefix_lens) >= WITH_PROMPTS

    def _begin(self) -> None:
        """Before a pass's layers: a captured graph holds what is launched from here on."""
        self._seen: dict[Sight, tuple[Tensor, Tensor | None]] = {}

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Tensor:
        if not forward_batch.forward_mode.is_target_verify():
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        sinks = kwargs.pop("sinks", None)
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
        slots = self.own_slots() if self._has_own_pool(layer) else forward_batch.out_cache_loc
        window = slots if save_kv_cache else None
        if self._keys_first and save_kv_cache:
            written = KVWriteLoc.for_batch(forward_batch)
            self.token_to_kv_pool.set_kv_buffer(layer, written, k, v, layer.k_scale, layer.v_scale)
            window = None
        out = self._attend(q, k, v, layer, window, sight, *self._seen_by(sight, forward_batch), sinks)
        return out.view(len(out), -1)

    def _has_own_pool(self, layer: Any) -> bool:
        """Whether this layer's keys are not in the pool that SGLang's slots count."""
        pool = self.token_to_kv_pool
        return isinstance(pool, SWAKVPool) and pool.layers_mapping[layer.layer_id][1]

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
        return kernels.tree_attention(
            q,
            k,
            v,
            mask,
            self._prefix_lens,
            *self.pages(self._has_own_pool(layer)),
            *self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            slots,
            layer.scaling,
            layer.logit_cap,
            sight.prefix_keys,
            first_keys,
            sinks,
            *(1.0 if scale is None else scale for scale in (layer.k_scale_float, layer.v_scale_float)),
        )
