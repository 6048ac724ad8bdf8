"""The Triton op against its plain meaning: interpreted on a CPU, compiled on a GPU where there is one.

Triton decides when it is imported whether it interprets, so that is done in a process of its own: this file, run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from sglang_dflash.kernels import flash, plain
from sglang_dflash.platforms.cuda import FAST_CAPABILITIES

MULTIPROCESSORS = 132  # an H100's, for the interpreter
ROUNDING = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@dataclass(frozen=True)
class Case:
    """A pass: prefixes of so many tokens, a window's tokens, heads, a head's size."""

    prefixes: tuple[int, ...]
    w: int
    heads: int
    kv_heads: int
    size: int
    page_size: int = 1
    softcap: float = 0.0
    writes: bool = True


CASES = {
    "narrow": Case((0, 7, 300), 3, 9, 3, 64),
    "narrow, split": Case((900, 1, 2100), 4, 4, 1, 64, page_size=16),
    "wide": Case((150, 0), 40, 4, 2, 64, page_size=64),
    "wide, split": Case((640, 65), 64, 4, 1, 128),
    "wider than a tile of keys": Case((33,), 90, 2, 2, 64, softcap=3.0),
    "large heads": Case((40, 90), 16, 2, 1, 256, page_size=16),
    "one token": Case((5, 1000), 1, 8, 2, 128, writes=False),
    "many": Case(tuple(range(3, 300, 5)), 2, 6, 3, 64),
}


def errors(case: Case, dtype: torch.dtype) -> tuple[float, bool]:
    """The widest difference to the plain op, of 1 + |value|, and whether both leave the same in the caches, and nothing
    in the counters."""
    torch.manual_seed(0)
    bs, w, room = len(case.prefixes), case.w, max(case.prefixes) + case.w
    columns = -(-room // case.page_size)
    pages = (1 + torch.randperm(bs * columns)).view(bs, columns).int()
    lens = torch.tensor(case.prefixes, dtype=torch.int32)
    at = lens[:, None] + torch.arange(w)
    slots = (pages.gather(1, at // case.page_size) * case.page_size + at % case.page_size).flatten().long()
    caches = torch.randn(2, (bs * columns + 1) * case.page_size, case.kv_heads, case.size).to(dtype)
    caches[:, slots] = torch.nan  # what lies there before the window does is never read
    qkv = torch.randn(bs * w, case.heads + 2 * case.kv_heads, case.size).to(dtype)
    q, k, v = qkv.split([case.heads, case.kv_heads, case.kv_heads], 1)
    mask = (torch.rand(bs, w, w) < 0.3) | torch.eye(w, dtype=torch.bool)
    results = []
    for op in (plain.tree_attention, flash.tree_attention):
        own = caches.clone().nan_to_num() if op is plain.tree_attention else caches.clone()
        to = slots if case.writes else None
        out = op(q, k, v, mask, lens, pages, case.page_size, *own, to, case.size**-0.5, case.softcap)
        results.append((out.float(), own.nan_to_num()))
    (want, filled), (got, also_filled) = results
    left = int(flash.counters(q.device).abs().sum())
    return ((got - want).abs() / (1 + want.abs())).max().item(), torch.equal(filled, also_filled) and left == 0


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[float, bool]]:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # the interpreter multiplies no bfloat16
@pytest.mark.parametrize("name", CASES)
def test_interpreted(interpreted: dict[str, tuple[float, bool]], name: str, dtype: str) -> None:
    error, same_cells = interpreted[f"{name}, {dtype}"]
    assert error < ROUNDING[dtype]
    assert same_cells


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, dtype: str, poisoned_memory: None) -> None:
    with torch.device("cuda"):
        for _ in range(3):  # what a launch leaves behind is the next one's beginning
            error, same_cells = errors(CASES[name], getattr(torch, dtype))
            assert error < ROUNDING[dtype]
            assert same_cells


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in FAST_CAPABILITIES,
    reason="needs a GPU with FlashAttention-3: compute capability 8 or 9",
)
@pytest.mark.parametrize("prefix", [40, 300, 2000])
def test_is_as_exact_as_flash_attention(prefix: int) -> None:
    """Behind the same prefix, a chain: what trees change in bfloat16 texts is not this op being less exact."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    bs, w, heads, kv_heads, size = 4, 16, 32, 8, 128
    with torch.device("cuda"):
        torch.manual_seed(0)
        q = torch.randn(bs * w, heads, size).bfloat16()
        caches = torch.randn(2, bs * (prefix + w), kv_heads, size).bfloat16()
        pages = torch.randperm(bs * (prefix + w)).view(bs, prefix + w)
        k, v = caches[:, pages[:, prefix:].flatten()]
        lens = torch.full((bs,), prefix, dtype=torch.int32)
        mask = torch.ones(bs, w, w, dtype=torch.bool).tril()
        args = (mask, lens, pages.int(), 1, *caches, None, size**-0.5, 0.0)
        truth = plain.tree_attention(q.float(), k.float(), v.float(), *args)
        ours = flash.tree_attention(q, k, v, *args)
        theirs = flash_attn_with_kvcache(
            q=q.view(bs, w, heads, size),
            k_cache=caches[0][:, None],
            v_cache=caches[1][:, None],
            page_table=pages.int(),
            cache_seqlens=lens + w,
            causal=True,
        ).view(q.shape)
    assert rms(ours - truth) < 1.1 * rms(theirs - truth)
    assert rms(theirs - truth) < 0.01 * rms(truth), "else the two attend to different things"


def rms(x: torch.Tensor) -> float:
    return x.float().square().mean().sqrt().item()


if __name__ == "__main__":
    flash.multiprocessors = lambda device: MULTIPROCESSORS
    print(
        json.dumps(
            {
                f"{name}, {dtype}": errors(case, getattr(torch, dtype))
                for name, case in CASES.items()
                for dtype in ("float32", "float16")
            }
        )
    )
