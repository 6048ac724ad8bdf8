"""Sampling with noise known beforehand: SGLang's own noise, every filter by its meaning, the distribution asked for."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from sglang_dflash import kernels
from sglang_dflash.kernels import sampling
from sglang_dflash.kernels.sampling import gumbel

ALL, FREE = 2**32, 1 << 30  # SGLang's top-k for none


def noise(seed: int, position: int, token: int) -> float:
    """As SGLang's `multinomial_with_seed` and `murmur_hash32` have it, in Python's integers and doubles."""
    h = 0
    for word in (seed % 2**64 % ALL, seed % 2**64 // ALL, position, token):
        k = word * 0xCC9E2D51 % ALL
        k = (k << 15 | k >> 17) % ALL * 0x1B873593 % ALL
        h ^= k
        h = ((h << 13 | h >> 19) % ALL * 5 + 0xE6546B64) % ALL
    h ^= 16
    h = (h ^ h >> 16) * 0x85EBCA6B % ALL
    h = (h ^ h >> 13) * 0xC2B2AE35 % ALL
    h ^= h >> 16
    log = math.log(h / (ALL - 1)) if h else -1.8e308
    return -math.log(-min(log, -(2.0**-32)))


def reference(
    logits: Tensor, seed: int, position: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    """One row's token, by a sort and a loop."""
    scaled = (logits.double() / temperature).tolist()
    if top_k == 1:
        return scaled.index(max(scaled))
    weights = [math.exp(x - max(scaled)) for x in scaled]
    best, chosen = -math.inf, -1
    for token, x in enumerate(scaled):
        if weights[token] == 0:
            continue
        above = [w for w in weights if w > weights[token]]
        kept = len(above) < top_k and (top_p >= 1 or sum(above) / sum(weights) < top_p) and weights[token] >= min_p
        if kept and x + noise(seed, position, token) > best:
            best, chosen = x + noise(seed, position, token), token
    return chosen


def draw(logits: Tensor, positions: list[int], *settings: tuple[int, float, int, float, float]) -> list[int]:
    """settings: of each request seed, temperature, top-k, top-p, min-p."""
    seeds, temperatures, top_ks, top_ps, min_ps = (torch.tensor(x) for x in zip(*settings, strict=True))
    filtered = any(k != FREE or p < 1 or m > 0 for _, _, k, p, m in settings)
    sampled = kernels.sample(
        logits, torch.tensor(positions), seeds, temperatures, top_ks.int(), top_ps.float(), min_ps.float(), filtered
    )
    assert sampled.dtype == torch.int64
    return sampled.tolist()


def test_the_noise_is_sglang_s() -> None:
    seeds = torch.tensor([0, 42, -1, 2**63 - 1, -(2**63), 2**32 + 5])
    positions = torch.tensor([0, 1, 77, 40_000, 2**20, 9])
    got = gumbel(seeds, positions, 300)
    want = [[noise(s, p, t) for t in range(300)] for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)]
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-4)  # of the lowest, which seldom decide
    high = want > -1.5
    torch.testing.assert_close(got.double()[high], want[high], rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SGLang's hash runs on a GPU")
def test_a_seeded_sample_is_sglang_s_own() -> None:
    from sglang.srt.layers.sampler import sampling_from_probs_torch

    torch.manual_seed(0)
    logits = torch.randn(64, 50_000, device="cuda") * 3
    seeds, positions = torch.randint(2**62, (64,), device="cuda"), torch.arange(64, device="cuda")
    want = sampling_from_probs_torch(logits.softmax(-1), seeds, positions)
    ones = torch.ones(64, device="cuda")
    for ops in (kernels.plain, kernels.compiled):
        got = ops.sample(logits, positions, seeds, ones, (ones * FREE).int(), ones, ones * 0, False)
        assert torch.equal(got, want.long())


FILTERS = {
    "none": (FREE, 1.0, 0.0),
    "top-k": (5, 1.0, 0.0),
    "top-p": (FREE, 0.8, 0.0),
    "min-p": (FREE, 1.0, 0.2),
    "all": (20, 0.6, 0.03),
    "greedy": (1, 0.5, 0.0),
    "narrow": (2, 1.0, 0.0),
}


@pytest.mark.usefixtures("either_ops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [37, 9001])
def test_each_request_is_sampled_by_its_own_settings(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    w = 2
    logits = (torch.randn(w * len(FILTERS), vocab + 3) * 3).to(dtype)[:, :vocab]  # rows of no whole vectors
    settings = [(100 + i, 0.5 + 0.2 * i, *kept) for i, kept in enumerate(FILTERS.values())]
    positions = [7 * i % 11 for i in range(len(logits))]
    if vocab > 1000:  # the reference is quadratic in the likely ones
        logits[logits < logits.float().topk(60).values[:, -1:]] = -torch.inf
    got = draw(logits, positions, *settings)
    want = [reference(x, settings[i // w][0], positions[i], *settings[i // w][1:]) for i, x in enumerate(logits)]
    assert got == want


@pytest.mark.usefixtures("either_ops")
def test_equal_ones_are_kept_together_and_what_is_nothing_is_never_drawn() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[3.0, 3.0, 3.0, 1.0, nan, -inf]] * 12 + [[-inf, nan, -inf, 1.0, -inf, -inf]] * 12)
    drawn = draw(logits, list(range(24)), (5, 1.0, 2, 1.0, 0.0), (6, 1.0, FREE, 0.9, 0.0))
    assert set(drawn[:12]) == {0, 1, 2}
    assert set(drawn[12:]) == {3}
    assert draw(torch.full((1, 6), -inf), [0], (1, 1.0, 3, 0.5, 0.1)) == [0]


@pytest.mark.parametrize("name", ["none", "top-p"])
def test_samples_have_the_distribution_asked_for_and_neighbours_none_in_common(name: str) -> None:
    logits, temperature, rows = torch.linspace(-1.5, 2.0, 8), 0.8, 4000
    top_k, top_p, min_p = FILTERS[name]
    settings = [(seed, temperature, top_k, top_p, min_p) for seed in (11, 12)]
    one, two = torch.tensor(draw(logits.repeat(2 * rows, 1), [*range(rows)] * 2, *settings)).view(2, rows)
    probs = (logits / temperature).double().softmax(-1)
    if name == "top-p":
        probs = torch.where(probs.flip(0).cumsum(0).flip(0) - probs < top_p, probs, 0)
    kept = probs > 0
    probs = probs / probs.sum()
    for samples in (one, two):
        counts = torch.bincount(samples, minlength=8)
        assert counts[~kept].sum() == 0
        assert chisquare(counts[kept], (probs * rows)[kept]).pvalue > 0.001
    for before, after in ((one, two), (one[:-1], one[1:])):  # neighbouring requests, neighbouring positions
        assert independent(before, after, probs) > 0.001


def independent(before: Tensor, after: Tensor, probs: Tensor) -> float:
    """The p-value of two series of samples having nothing to do with each other."""
    kept = probs > 0
    joint = (probs[:, None] * probs)[kept][:, kept].flatten()
    counts = torch.bincount(before * 8 + after, minlength=64).view(8, 8)[kept][:, kept].flatten()
    return float(chisquare(counts, joint * counts.sum()).pvalue)


def test_noise_reused_at_two_positions_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.linspace(-1.5, 2.0, 8)
    monkeypatch.setattr(sampling, "gumbel", lambda seeds, at, vocab: gumbel(seeds, at // 2 * 2, vocab))
    drawn = torch.tensor(draw(logits.repeat(4000, 1), [*range(4000)], (1, 1.0, *FILTERS["none"])))
    assert independent(drawn[:-1], drawn[1:], logits.double().softmax(-1)) < 1e-6


def test_noise_by_rank_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    logits, settings = torch.randn(8, 40) * 3, [(i, 3.0, *FILTERS["top-k"]) for i in range(8)]
    want = [reference(row, i, 3, 3.0, *FILTERS["top-k"]) for i, row in enumerate(logits)]
    assert draw(logits, [3] * 8, *settings) == want
    ranked, order = logits.sort(-1, descending=True)
    by_rank = order.gather(1, torch.tensor(draw(ranked, [3] * 8, *settings))[:, None])[:, 0]
    assert by_rank.tolist() != want


def test_the_noise_is_gumbel_s() -> None:
    for seeds, positions in ((torch.zeros(64), torch.arange(64)), (torch.arange(64), torch.zeros(64))):
        drawn = gumbel(seeds.long(), positions.long(), 500).flatten()
        assert kstest(drawn.numpy(), "gumbel_r").pvalue > 0.001


@pytest.mark.usefixtures("either_ops")
def test_a_row_is_sampled_alike_wherever_it_stands() -> None:
    torch.manual_seed(2)
    logits, settings = torch.randn(8, 20_000) * 4, [(i, 0.9, 50, 0.9, 0.01) for i in range(8)]
    together = draw(logits, [3] * 8, *settings)
    assert together == [draw(logits[i : i + 1], [3], settings[i])[0] for i in range(8)]
