"""The plain-CPU KV pool."""

from __future__ import annotations

import torch

from sglang_dflash.platforms.cpu.memory import CpuKVPool, lazy_zeros


def make_pool(dtype: torch.dtype = torch.float32) -> CpuKVPool:
    return CpuKVPool(
        64, 16, dtype, head_num=2, head_dim=4, layer_num=3, device="cpu",
        enable_memory_saver=False, enable_kv_cache_copy=True,
    )  # fmt: skip


def test_lazy_zeros() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        zeros = lazy_zeros((5, 2, 3), dtype)
        assert zeros.shape == (5, 2, 3)
        assert zeros.dtype == dtype
        assert not zeros.any()


def test_bfloat16_rows_are_kept_as_written() -> None:
    pool = make_pool(torch.bfloat16)
    k, v = torch.randn(2, 2, 4).bfloat16(), torch.randn(2, 2, 4).bfloat16()
    pool.set_kv_buffer(None, torch.tensor([17, 40]), k, v, layer_id_override=1)
    assert torch.equal(pool.get_key_buffer(1)[[17, 40]], k)
    assert torch.equal(pool.get_value_buffer(1)[[17, 40]], v)
    assert not pool.get_key_buffer(0).any()
