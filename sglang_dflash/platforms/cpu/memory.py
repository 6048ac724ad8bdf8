"""The KV pool of the plain-CPU platform."""

from __future__ import annotations

import math

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose memory the operating system hands out page by page, on first touch."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


class CpuKVPool(MHATokenToKVPool):
    """Keys and values of all layers in plain memory: each layer `[slots, kv_heads, head_dim]`.

    Memory is taken as slots are first used, so a large pool costs a small machine nothing at start-up.
    """

    def _create_buffers_normal(self) -> None:
        key_shape, value_shape = self._kv_buffer_shapes()
        self.k_buffer = [lazy_zeros(key_shape, self.store_dtype) for _ in range(self.layer_num)]
        self.v_buffer = [lazy_zeros(value_shape, self.store_dtype) for _ in range(self.layer_num)]

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None  # describes the Triton copy, which this pool does without

    def _store_kv_layer(self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        self.k_buffer[layer_idx].index_copy_(0, loc, cache_k)
        self.v_buffer[layer_idx].index_copy_(0, loc, cache_v)
