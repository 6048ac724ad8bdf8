"""The Triton op against its plain meaning: interpreted on a CPU, compiled on a GPU where there is one.

Triton decides when it is imported whether it interprets, so that is done in a process of its own: this file, run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from sglang_dflash.kernels import flash, plain
from sglang_dflash.kernels.attention import Sight
from sglang_dflash.platforms.cpu import vector_math
from sglang_dflash.platforms.cuda import FAST_CAPABILITIES

MULTIPROCESSORS = 132  # an H100's, for the interpreter
Op = Callable[..., torch.Tensor]
EIGHT_BITS, K_SCALE, V_SCALE = torch.float8_e4m3fn, 2.0, 0.5
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
    reach: int = 0
    slides: int = 0
    sinks: bool = False
    eight_bits: bool = False

    def first_keys(self) -> torch.Tensor | None:
        """Of rows whose window slides: each a place further than the row before, some on the same."""
        if not self.slides:
            return None
        at = torch.tensor(self.prefixes)[:, None] + torch.arange(self.w) * 2 // 3
        return Sight(self.reach, self.slides).first_keys(torch.tensor(self.prefixes), at).int()


CASES = {
    "narrow": Case((0, 7, 300), 3, 9, 3, 64),
    "narrow, split": Case((900, 1, 2100), 4, 4, 1, 64, page_size=16),
    "wide": Case((150, 0), 40, 4, 2, 64, page_size=64),
    "wide, split": Case((640, 65), 64, 4, 1, 128),
    "wider than a tile of keys": Case((33,), 90, 2, 2, 64, softcap=3.0),
    "large heads": Case((40, 90), 16, 2, 1, 256, page_size=16),
    "one token": Case((5, 1000), 1, 8, 2, 128, writes=False),
    "many": Case(tuple(range(3, 300, 5)), 2, 6, 3, 64),
    "reach": Case((0, 7, 99, 100, 101, 300), 3, 9, 3, 64, reach=100),
    "reach, split": Case((2100, 511, 4000), 4, 4, 1, 64, page_size=16, reach=512),
    "reach, wide": Case((900, 20), 40, 4, 2, 64, page_size=16, reach=33),
    "reach, one key": Case((50,), 16, 2, 1, 128, reach=1),
    "slides": Case((0, 7, 99, 100, 101, 300), 5, 9, 3, 64, slides=100),
    "slides, split": Case((2100, 511, 4000), 4, 4, 1, 64, page_size=16, slides=512),
    "slides past the prefix": Case((900, 20, 3), 40, 4, 2, 64, page_size=16, slides=9),
    "slides within a reach": Case((900, 20), 16, 4, 2, 64, reach=30, slides=33),
    "sinks": Case((0, 7, 300), 3, 8, 2, 64, sinks=True),
    "sinks, split": Case((900, 1, 2100), 4, 4, 1, 64, page_size=16, sinks=True),
    "sinks, slides, wide": Case((640, 65), 64, 4, 1, 128, slides=70, sinks=True),
    "eight bits": Case((0, 7, 300), 3, 9, 3, 64, eight_bits=True),
    "eight bits, split": Case((900, 1, 2100), 4, 4, 1, 64, page_size=16, eight_bits=True),
    "eight bits, large heads": Case((0, 90), 16, 2, 1, 256, page_size=16, eight_bits=True),
    "eight bits, wide": Case((640, 65), 40, 4, 1, 128, softcap=3.0, sinks=True, eight_bits=True),
}
WHOLE = [name for name, case in CASES.items() if not (case.reach or case.slides)]


def outputs(case: Case, dtype: torch.dtype, *ops: tuple[Op, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each of the (op, its reach) gives for a pass, and the caches that it leaves. The plain op reads zeros where
    no op may look, the others NaN.
    """
    torch.manual_seed(0)
    bs, w, room = len(case.prefixes), case.w, max(case.prefixes) + case.w
    columns = -(-room // case.page_size)
    pages = (1 + torch.randperm(bs * columns)).view(bs, columns).int()
    lens = torch.tensor(case.prefixes, dtype=torch.int32)
    at = lens[:, None] + torch.arange(w)
    slots = (pages.gather(1, at // case.page_size) * case.page_size + at % case.page_size).flatten().long()
    caches = torch.randn(2, (bs * columns + 1) * case.page_size, case.kv_heads, case.size)
    caches[:, slots] = torch.nan  # what lies there before the window does is never read
    most = Sight(case.reach, case.slides).prefix_keys
    if most:  # nor what lies before the first key
        for row, length in zip(pages, case.prefixes, strict=True):
            unseen = torch.arange(max(0, length - most))
            caches[:, (row[unseen // case.page_size] * case.page_size + unseen % case.page_size).long()] = torch.nan
    qkv = torch.randn(bs * w, case.heads + 2 * case.kv_heads, case.size).to(dtype)
    q, k, v = qkv.split([case.heads, case.kv_heads, case.kv_heads], 1)
    if case.eight_bits and not q.is_cuda:  # the interpreter does not round to eight bits as torch and a GPU do
        k, v = (x.to(EIGHT_BITS).to(dtype) * scale for x, scale in ((k, K_SCALE), (v, V_SCALE)))
    mask = (torch.rand(bs, w, w) < 0.3) | torch.eye(w, dtype=torch.bool)
    first_keys, sinks = case.first_keys(), (torch.randn(case.heads) * 3).to(dtype) if case.sinks else None
    results = []
    for op, reach in ops:
        own = caches.nan_to_num() if op is plain.tree_attention else caches.clone()
        own = own.to(EIGHT_BITS if case.eight_bits else dtype)
        to = slots if case.writes else None
        out = op(
            q, k, v, mask, lens, pages, case.page_size, *own, to, case.size**-0.5, case.softcap, reach, first_keys,
            sinks, K_SCALE, V_SCALE,
        )  # fmt: skip
        results.append((out.float(), own.float().nan_to_num()))
    return results


def errors(case: Case, dtype: torch.dtype) -> tuple[float, bool]:
    """The widest difference to the plain op, of 1 + |value|, and whether both leave the same in the caches, and nothing
    in the counters."""
    most = Sight(case.reach, case.slides).prefix_keys
    ops = (plain.tree_attention, most), (flash.tree_attention, most)
    (want, filled), (got, also_filled) = outputs(case, dtype, *ops)
    left = int(flash.counters(got.device).abs().sum())
    return ((got - want).abs() / (1 + want.abs())).max().item(), torch.equal(filled, also_filled) and left == 0


def changed(case: Case, dtype: torch.dtype) -> tuple[float, bool]:
    """By how much a reach of the longest prefix changes what the op gives, and whether it leaves the same caches."""
    ops = (flash.tree_attention, 0), (flash.tree_attention, max(case.prefixes))
    (whole, filled), (reached, also_filled) = outputs(case, dtype, *ops)
    return (reached - whole).abs().max().item(), torch.equal(filled, also_filled)


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


@dataclass(frozen=True)
class Reached:
    """A pass of one token whose values tell which keys it saw: key i of the prefix holds i in its value's first place,
    all keys the same score.
    """

    prefix: int
    reach: int

    def mean_key(self, op: Op) -> float:
        q, k, v = torch.zeros(3, 1, 1, 64)
        v[..., 0] = self.prefix  # the token's own
        caches = torch.zeros(2, self.prefix + 2, 1, 64)
        caches[1, : self.prefix, 0, 0] = torch.arange(self.prefix)
        pages = torch.arange(self.prefix + 2, dtype=torch.int32)[None]
        mask, lens = torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([self.prefix], dtype=torch.int32)
        out = op(q, k, v, mask, lens, pages, 1, *caches, None, 1.0, 0.0, self.reach)
        return float(out[0, 0, 0])


def test_a_reach_of_w_is_w_keys_and_not_one_more_or_less() -> None:
    """The control of the cases above, counted by hand: keys prefix - reach to prefix - 1, then the token itself."""
    for prefix, reach in ((40, 8), (8, 8), (7, 8), (9, 8), (9, 0)):
        first = max(0, prefix - reach) if reach else 0
        mean = sum(range(first, prefix + 1)) / (prefix + 1 - first)
        assert Reached(prefix, reach).mean_key(plain.tree_attention) == pytest.approx(mean, rel=1e-5)
        assert Reached(prefix, reach + 1).mean_key(plain.tree_attention) != pytest.approx(mean, rel=1e-3) or (
            reach >= prefix
        )


def test_a_window_sees_its_keys_as_a_later_pass_reads_them() -> None:
    """In eight bits: two tokens of a chain in one pass are the same two in a pass each, and not so if rounded later."""
    torch.manual_seed(0)
    prefix, size = 5, 64
    caches = torch.randn(2, prefix + 2, 1, size).to(EIGHT_BITS)
    pages, slots = torch.arange(prefix + 2, dtype=torch.int32)[None], torch.arange(prefix, prefix + 2)
    q, k, v = torch.randn(3, 2, 1, size)

    def run(first: int, count: int, exact: bool) -> torch.Tensor:
        rows, lens = slice(first, first + count), torch.tensor([prefix + first], dtype=torch.int32)
        own = caches.float() * torch.tensor([K_SCALE, V_SCALE]).view(2, 1, 1, 1) if exact else caches
        mask = torch.ones(1, count, count, dtype=torch.bool).tril()
        new = q[rows], k[rows], v[rows]
        return plain.tree_attention(
            *new, mask, lens, pages, 1, *own, slots[rows], 0.02, 0.0, k_scale=K_SCALE, v_scale=V_SCALE
        )

    both, unrounded = run(0, 2, False), run(0, 2, True)
    assert torch.allclose(both, torch.cat([run(0, 1, False), run(1, 1, False)]), atol=1e-6)
    assert (both - unrounded).abs().max() > 1e-3
    wrote = torch.stack([k / K_SCALE, v / V_SCALE]).to(EIGHT_BITS).float()
    assert torch.equal(caches[:, prefix:].float(), wrote)


def test_a_sight_names_each_row_s_first_key_and_neighbours() -> None:
    """By hand: a tree of root, child, child's child and a second child, behind 10 tokens."""
    lens, at = torch.tensor([10]), torch.tensor([[10, 11, 12, 11]])
    seen = torch.ones(1, 4, 4, dtype=torch.bool)
    assert Sight().first_keys(lens, at).tolist() == [[0, 0, 0, 0]]
    assert Sight(reach=3).first_keys(lens, at).tolist() == [[7, 7, 7, 7]]
    assert Sight(window=3).first_keys(lens, at).tolist() == [[7, 8, 9, 8]]
    assert Sight(reach=2, window=3).first_keys(lens, at).tolist() == [[8, 8, 9, 8]]
    assert Sight(reach=20, window=11).first_keys(lens, at).tolist() == [[0, 0, 1, 0]]
    assert [Sight(*both).prefix_keys for both in ((0, 0), (3, 0), (0, 4), (3, 2))] == [0, 3, 4, 2]
    near = [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    assert Sight(window=1).within(seen, at)[0].int().tolist() == near
    assert torch.equal(Sight(causal=True).within(seen, at), seen.tril())
    assert torch.equal(Sight(window=2).within(seen, at), seen)


@pytest.mark.parametrize("name", WHOLE)
def test_a_reach_wider_than_every_prefix_changes_no_bit(interpreted: dict[str, tuple[float, bool]], name: str) -> None:
    assert interpreted[f"{name}, wide reach"] == [0.0, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("name", WHOLE)
def test_a_reach_wider_than_every_prefix_changes_no_bit_compiled(name: str) -> None:
    with torch.device("cuda"):
        assert changed(CASES[name], torch.bfloat16) == (0.0, True)


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
    vector_math.settle()
    flash.multiprocessors, flash.shared_memory = lambda device: MULTIPROCESSORS, lambda device: flash.ROOMY
    found = {
        f"{name}, {dtype}": errors(case, getattr(torch, dtype))
        for name, case in CASES.items()
        for dtype in ("float32", "float16")
    }
    found |= {f"{name}, wide reach": changed(CASES[name], torch.float32) for name in WHOLE}
    print(json.dumps(found))
