"""The platform's rotary embedding against SGLang's plain-torch one."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from sglang_dflash.platforms.cpu.rope import rotate

HEAD = 16


def make_rope(rotary_dim: int = HEAD, neox: bool = True, dtype: torch.dtype = torch.float32) -> RotaryEmbedding:
    return RotaryEmbedding(HEAD, rotary_dim, 128, 10000, neox, dtype)


def check(rope: RotaryEmbedding, positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    query, key = torch.randn(len(positions), 4 * HEAD).to(dtype), torch.randn(len(positions), 2 * HEAD).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    expected = rope.forward_native(positions, query.clone(), key.clone())
    for ours, theirs in zip(rotate(rope, positions, query, key), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope_args", [{}, {"rotary_dim": HEAD // 2}, {"neox": False}])
def test_same_rotation(rope_args: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(make_rope(dtype=dtype, **rope_args), torch.tensor([0, 3, 3, 100]), dtype)


def test_queries_that_are_slices_of_a_wider_row() -> None:
    rope, positions = make_rope(), torch.tensor([5, 6, 9])
    query, key, _ = torch.randn(3, 5 * HEAD).split([2 * HEAD, HEAD, 2 * HEAD], dim=-1)
    expected = rope.forward_native(positions, query.contiguous(), key.contiguous())
    for ours, theirs in zip(rotate(rope, positions, query, key), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_kept_angles_are_those_of_the_positions() -> None:
    rope, positions = make_rope(), torch.tensor([1, 2, 3])
    check(rope, positions)
    check(rope, positions)
    positions += 7  # in place, as a reused buffer would
    check(rope, positions)
    check(rope, torch.tensor([8, 9]))
    rope._last_angles = (positions, torch.zeros(3, 1, HEAD), torch.zeros(3, 1, HEAD))
    with pytest.raises(AssertionError):
        check(rope, positions)  # the control: kept angles are indeed used
