"""Ops from the CUDA sources against their plain meaning: on a CPU's emulation, and on a GPU where there is one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_dflash.kernels import Emitted, Leads, Noise, Pools, compiled, plain
from sglang_dflash.kernels import lattice as lattice_ops
from sglang_dflash.kernels.penalties import END
from sglang_dflash.kernels.sampling import gumbel

# One rounding of each type, relative.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["cpu", "cuda"], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if request.param == "cpu":
        library = request.getfixturevalue("cpu_library")
        monkeypatch.setattr(compiled, "library", lambda: library)
    torch.manual_seed(0)
    with torch.device(request.param):
        yield request.param


def agree(op: str, *args: Any, **tolerance: float) -> None:
    got, want = getattr(compiled, op)(*args), getattr(plain, op)(*args)
    for x, y in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
        assert x.dtype == y.dtype
        if x.dtype.is_floating_point:
            torch.testing.assert_close(x, y, **{"rtol": 0, "atol": 0, **tolerance})
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("rows", "vocab", "padding", "k"),
    [(1, 16, 0, 16), (3, 777, 7, 16), (2, 40_000, 0, 16), (300, 100, 4, 5), (1, 5001, 7, 32), (2, 8200, 0, 1)],
)
def test_topk_lse(dtype: torch.dtype, rows: int, vocab: int, padding: int, k: int) -> None:
    logits = (torch.randn(rows, vocab + padding) * 4).to(dtype)
    logits[:, vocab:] = 99  # rows of the head that are no token
    logits = logits[:, :vocab]
    values, indices, lse = compiled.topk_lse(logits, k)
    want_values, _, want_lse = plain.topk_lse(logits, k)
    assert torch.equal(values, want_values)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    # Equal logits are common in 16 bits: the lower index comes first.
    first = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(indices, first)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("bs", "each", "vocab", "k"), [(1, 1, 16, 16), (3, 4, 776, 16), (2, 2, 20_000, 5)])
def test_topk_lse_with_noise(
    dtype: torch.dtype, bs: int, each: int, vocab: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lattice_ops, "LIKELIEST", vocab)  # the compiled one gives every token noise
    logits = (torch.randn(bs * each, vocab) * 4).to(dtype)
    logits[:, 3], logits[:, 7] = -torch.inf, 40.0
    weights = torch.tensor([0.7, 0.0, 1.3])[:bs]
    noise = Noise(torch.randint(-(2**62), 2**62, (bs,)), torch.randint(1 << 20, (bs,)), weights)
    values, indices, lse = compiled.topk_lse(logits, k, noise)
    want_values, _, want_lse = plain.topk_lse(logits, k, noise)
    rough = {"rtol": 1e-5, "atol": 2e-3}  # of noise in fast intrinsics
    torch.testing.assert_close(values, want_values, **rough)
    torch.testing.assert_close(lse, want_lse, **rough)
    seeds, positions, weights = (x.repeat_interleave(each) for x in noise)
    every = gumbel(seeds, positions + torch.arange(bs * each) % each, vocab)
    scores = logits.float() + torch.where(weights > 0, weights, 0)[:, None] * every
    torch.testing.assert_close(scores.gather(1, indices), values, **rough)
    assert all(len(set(row)) == k for row in indices.tolist())
    greedy = weights == 0
    for ops in (compiled, plain):
        for mixed, alone in zip(ops.topk_lse(logits, k, noise), ops.topk_lse(logits, k), strict=True):
            assert torch.equal(mixed[greedy], alone[greedy])


def test_topk_of_all_equal_of_infinite_and_of_broken_logits() -> None:
    logits = torch.stack([torch.zeros(3000), torch.full((3000,), -torch.inf), torch.arange(3000.0), torch.zeros(3000)])
    logits[1, 70] = 1.0
    logits[3, 5:900] = torch.nan
    values, indices, lse = compiled.topk_lse(logits, 4)
    assert indices.tolist() == [[0, 1, 2, 3], [70, 0, 1, 2], [2999, 2998, 2997, 2996], [0, 1, 2, 3]]
    assert values[1].tolist() == [1.0, *[-torch.inf] * 3]
    torch.testing.assert_close(lse[:3], logits[:3].logsumexp(-1))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("bs", "d", "k", "r"), [(1, 1, 4, 8), (3, 5, 16, 128), (2, 15, 16, 64), (1, 2, 32, 33)])
def test_lattice(dtype: torch.dtype, bs: int, d: int, k: int, r: int) -> None:
    vocab = 200
    unary = torch.randn(bs, d, k).sort(-1, descending=True).values
    lse = unary.logsumexp(-1) + 0.3
    tokens = torch.rand(bs, d, vocab).argsort(-1)[..., :k].contiguous()
    bonus, gate = torch.randint(vocab, (bs,)), torch.randn(bs, d, r).to(dtype)
    a, b = torch.randn(vocab, r).to(dtype), torch.randn(vocab, r).to(dtype)
    agree("selector_logp", unary, lse, tokens, bonus, gate, a, b, atol=2e-5, rtol=2e-5)
    agree("lattice_logp", unary, lse, None, atol=1e-6)
    unary[0, 0, 1] = -torch.inf
    lse[-1, -1] = torch.nan
    agree("selector_logp", unary, lse, tokens, bonus, gate, a, b, atol=2e-5, rtol=2e-5)
    agree("lattice_logp", unary, lse, None, atol=1e-6)


def tries(bs: int, m: int, vocab: int) -> Leads:
    """Random ones of few tokens, so that some come twice; of the second request none, of the third some are gaps."""
    tokens = torch.randint(vocab, (bs, m))
    before = (torch.rand(bs, m) * torch.arange(m)).long() - 1
    before[torch.rand(bs, m) < 0.3] = -1
    tokens[1:2], before[1:2] = -1, -1
    tokens[2:3] = torch.where(torch.rand(1, m) < 0.3, -1, tokens[2:3])
    return Leads(tokens, before, torch.randint(2, (bs,)))


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(
    ("bs", "d", "k", "m"), [(1, 6, 16, 12), (4, 3, 8, 6), (3, 1, 32, 24), (2, 15, 16, 12), (9, 2, 5, 4), (5, 7, 16, 1)]
)
def test_leads(bs: int, d: int, k: int, m: int, linked: bool) -> None:
    for trial in range(4):
        vocab = 2 * k  # most leads are among the draft's own candidates too
        leads, tokens = tries(bs, m, vocab), torch.rand(bs, d, vocab).argsort(-1)[..., :k].contiguous()
        unary = (torch.randn(bs, d, k) * 3).sort(-1, descending=True).values
        if trial == 3:
            unary[0, 0, 1:], unary[-1, -1, 0] = -torch.inf, torch.nan
        agree("place_leads", unary, tokens, leads, equal_nan=True)
        placed_unary, placed = plain.place_leads(unary, tokens, leads)
        logp = placed_unary[:, :, None] + torch.randn(bs, d, k, k) * linked
        logp = logp.log_softmax(-1).nan_to_num(-torch.inf)[:, :, : k if linked else 1].contiguous()
        agree("follow_leads", logp, placed, leads, atol=1e-5)
        exact, chosen = compiled.follow_leads(logp, placed, leads), plain.follow_leads(logp, placed, leads)
        assert torch.equal(exact == -torch.inf, chosen == -torch.inf)
        no_lead = torch.cat([leads.tokens < 0, torch.ones(bs, 1).bool()], 1).all(1) & (leads.sure == 0)
        untouched = logp.expand(-1, -1, k, -1).clamp(min=-1e4)
        assert torch.equal(exact[no_lead], untouched[no_lead])


def test_leads_take_fewer_places_than_there_are_candidates() -> None:
    with pytest.raises(RuntimeError, match="4 of 4"):
        compiled.place_leads(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4).long(), tries(1, 4, 9))


def lattice(bs: int, d: int, kp: int, k: int, vocab: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logp = (torch.randn(bs, d, kp, k) * 3).log_softmax(-1)
    logp[:, 0] = logp[:, 0, :1]
    tokens = torch.rand(bs, d, vocab).argsort(-1)[..., :k].contiguous()
    return tokens, logp, torch.randint(vocab, (bs,))


@pytest.mark.parametrize(
    ("bs", "d", "kp", "k", "n"),
    [(2, 15, 16, 16, 63), (1, 2, 16, 16, 2), (1, 15, 1, 16, 31), (2, 8, 16, 16, 15), (1, 9, 16, 16, 255)],
)
@pytest.mark.parametrize("tied", [False, True])
def test_grow(bs: int, d: int, kp: int, k: int, n: int, tied: bool) -> None:
    tokens, logp, bonus = lattice(bs, d, kp, k)
    if tied:
        logp = (logp / 4).round()
    agree("grow", tokens, logp, bonus, n)
    agree("grow_chain", tokens, logp, bonus, min(d, n), atol=1e-5)  # torch adds up in another order


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("bs", "w", "vocab"), [(1, 1, 16), (3, 5, 777), (2, 4, 20_000)])
def test_sample(dtype: torch.dtype, bs: int, w: int, vocab: int) -> None:
    logits, none = (torch.randn(bs * w, vocab) * 4).to(dtype), torch.ones(bs)
    positions, seeds = torch.randint(1 << 20, (bs * w,)), torch.randint(1 << 62, (bs,))
    no_k = torch.full((bs,), 1 << 30, dtype=torch.int32)
    agree("sample", logits, positions, seeds, none * 0.7, no_k, none, none * 0, False)
    top_ks = torch.tensor([40, 1, 3], dtype=torch.int32)[:bs]
    agree("sample", logits, positions, seeds, torch.rand(bs) + 0.5, top_ks, none * 0.9, none * 0.02, True)


@pytest.mark.parametrize("spread", [0.3, 2.0])  # many are tried in turn; threads have more or fewer in question
def test_sample_where_few_of_many_are_kept(spread: float) -> None:
    logits, ones = torch.randn(6, 12_000) * spread, torch.ones(3)
    settings = torch.randint(1 << 20, (6,)), torch.randint(1 << 62, (3,)), torch.tensor([0.4, 1.0, 1.7])
    agree("sample", logits, *settings, torch.tensor([4, 60, 900], dtype=torch.int32), ones, ones * 0, True)
    any_k = torch.full((3,), 1 << 30, dtype=torch.int32)
    agree("sample", logits, *settings, any_k, torch.tensor([0.5, 0.2, 0.7]), torch.tensor([0, 0.05, 0]), True)


def test_sample_of_scores_almost_equal() -> None:
    positions, seeds = torch.randint(1 << 20, (4,)), torch.randint(1 << 62, (4,))
    noise, ones = gumbel(seeds, positions, 5000), torch.ones(4)
    logits = torch.where(noise > 4, torch.randn(4, 5000) * 0.02 - noise, -100)  # where bounds are the least above it
    for top_k, filtered in ((1 << 30, False), (200, True)):
        top_ks = torch.full((4,), top_k, dtype=torch.int32)
        agree("sample", logits, positions, seeds, ones, top_ks, ones, ones * 0, filtered)


def test_sample_leaves_out_no_token_near_another_or_at_a_border() -> None:
    vocab = 4099  # two parts
    at = torch.tensor([0, 1, *range(vocab // 2 - 9, vocab // 2 + 9), vocab - 2, vocab - 1])
    logits = torch.zeros(len(at), vocab).scatter_(1, at[:, None], 60.0)
    settings = torch.arange(len(at)), torch.arange(1), torch.ones(1)
    kept = torch.full((1,), 1 << 30, dtype=torch.int32), torch.ones(1), torch.zeros(1)
    for dtype in ROUNDING:
        assert torch.equal(compiled.sample(logits.to(dtype), *settings, *kept, False), at)


def emitted_of(requests: int, vocab: int) -> Emitted:
    """Every third request has no penalties; of the others each has emitted few tokens or many, some of which end it."""
    emitted = Emitted.none(requests, vocab, torch.get_default_device())
    emitted.grow(requests + 2)
    emitted.places.copy_(torch.where(torch.arange(requests) % 3 == 2, -1, torch.randperm(requests + 2)[:requests]))
    often = torch.rand(requests + 2, 1)
    emitted.counts.copy_(torch.randint(1, 9, emitted.counts.shape) * (torch.rand(emitted.counts.shape) < often**3))
    emitted.counts[:, 5] = 2
    emitted.counts += END * (torch.rand(emitted.counts.shape) < 0.05)
    emitted.settings.copy_(torch.rand(requests, 3) * 2 - torch.tensor([1.0, 1.0, -0.3]))
    emitted.fewest.copy_(torch.randint(30, (requests,)))
    return emitted


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("bs", "w", "vocab", "padding", "columns"),
    [
        (1, 1, 16, 0, 1),
        (5, 7, 777, 7, 9),
        (3, 16, 9001, 3, 16),
        (300, 1, 33, 0, 1),
        (40, 5, 101, 1, 5),
        (1, 256, 40, 0, 256),
    ],
)
@pytest.mark.parametrize("drafted", [False, True])
def test_penalise(
    dtype: torch.dtype, bs: int, w: int, vocab: int, padding: int, columns: int, drafted: bool
) -> None:
    emitted = emitted_of(bs + 4, vocab)
    requests = torch.arange(bs).flip(0)
    positions = torch.randint(30, (bs, columns))
    tree: tuple[Any, ...] = (None, None)
    if drafted:  # as many words as a tree has, so that paths repeat them
        words = torch.randint(vocab, (bs, w))
        mask = (torch.rand(bs, w, w) < 0.4).tril() | torch.eye(w, dtype=torch.bool)
        tree = words[:, torch.randint(w, (w,))].contiguous(), mask
    raw = (torch.randn(bs, w, vocab + padding) * 4).to(dtype)
    raw[:, :, 3] = -torch.inf
    for cut in (raw, raw[:, :, :vocab]):  # with tokens that are none, and as a view without
        got, want = (cut.clone(memory_format=torch.preserve_format) for _ in range(2))
        compiled.penalise(got, requests, positions, emitted, *tree)
        plain.penalise(want, requests, positions, emitted, *tree)
        assert torch.equal(got, want)
        free = emitted.places[requests] < 0
        assert torch.equal(got[free], cut[free]) and not torch.equal(got[~free], cut[~free])
    rows = raw[:, 0]
    got, want = rows.clone(), rows.clone()  # behind a prefill, cut from wider rows
    compiled.penalise(got[:, None, :vocab], requests, positions, emitted)
    plain.penalise(want[:, None, :vocab], requests, positions, emitted)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("bs", "n"), [(1, 1), (3, 4), (70, 16)])
def test_count_emitted(bs: int, n: int) -> None:
    got, want = (emitted_of(bs + 4, 7) for _ in range(2))
    want.places.copy_(got.places)
    want.counts.copy_(got.counts)
    before = got.counts.clone()
    requests, tokens = torch.arange(bs).flip(0), torch.randint(7, (bs, n))
    lens = torch.randint(n + 1, (bs,), dtype=torch.int32)
    lens[-1] = n
    compiled.count_emitted(got, requests, tokens, lens)
    plain.count_emitted(want, requests, tokens, lens)
    assert torch.equal(got.counts, want.counts)
    assert (got.counts - before).sum() == lens[got.places[requests] >= 0].sum() > 0


@pytest.mark.parametrize("ops", [plain, compiled])
def test_without_penalties_there_are_no_counts_to_read(ops: Any) -> None:
    emitted, requests = Emitted.none(4, 9, torch.get_default_device()), torch.tensor([3, 0])
    logits = torch.randn(2, 5, 9)
    as_was = logits.clone()
    ops.penalise(logits, requests, torch.zeros(2, 5, dtype=torch.int64), emitted)
    ops.count_emitted(emitted, requests, torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 3], dtype=torch.int32))
    assert torch.equal(logits, as_was)


@pytest.mark.parametrize("ops", [plain, compiled])
def test_counts_that_grew_are_found_where_they_are(ops: Any) -> None:
    emitted = emitted_of(4, 9)
    known, places = emitted.counts.clone(), emitted.places.clone()
    emitted.grow(11)
    assert torch.equal(emitted.counts[: len(known)], known) and not emitted.counts[len(known) :].any()
    assert emitted.address.item() == emitted.counts.data_ptr()
    emitted.places.copy_(torch.where(places < 0, -1, places + 5))
    emitted.counts[5:] = emitted.counts[:6].clone()
    emitted.counts[:5] = 77
    moved = torch.randn(4, 2, 9)
    old = Emitted(known, torch.tensor([known.data_ptr()]), places, emitted.settings, emitted.fewest)
    stayed, at = moved.clone(), torch.zeros(4, 2, dtype=torch.int64)
    ops.penalise(moved, torch.arange(4), at, emitted)
    ops.penalise(stayed, torch.arange(4), at, old)
    assert torch.equal(moved, stayed)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize(("n", "d"), [(0, 0), (3, 2), (63, 15), (255, 15)])
def test_walk_and_commit(n: int, d: int, limited: bool) -> None:
    bs = 3
    tokens, logp, bonus = lattice(bs, max(d, 1), 16, 16)
    tree, parents, _, _, mask = plain.grow(tokens, logp, bonus, n)
    sampled = torch.randint(40, tree.shape)
    for node in range(1, n + 1):  # samples that lead deep
        sampled.scatter_(1, parents[:, node : node + 1], tree[:, node : node + 1])
    limit = torch.tensor([0, 2, 99]) if limited else None
    args = (tree, parents, mask, sampled, limit, d)
    agree("walk", *args)
    nodes, _, lens, _ = plain.walk(*args)
    slots = 1 + torch.randperm(bs * (4 * n + 20)).view(bs, -1)[:, : n + 3].contiguous()
    agree("commit_rows", slots, torch.tensor([5, 0, 70]), nodes, lens, n + 1)
    source, destination, *_ = compiled.commit_rows(slots, torch.tensor([5, 0, 70]), nodes, lens, n + 1)
    rows = torch.zeros(bs * (4 * n + 20) + 1, dtype=torch.int64)  # of a pool that keeps the windows alone
    rows[slots.flatten()] = 1 + torch.randperm(slots.numel())
    for rows_by_slot, room in ((None, len(rows)), (rows, slots.numel() + 1)):
        caches = [torch.randn(room, 3, 40).to(torch.bfloat16) for _ in range(4)]
        got, want = ([cache.clone() for cache in caches] for _ in range(2))
        compiled.move_rows(Pools.of(got, rows_by_slot), source, destination, bs)
        plain.move_rows(Pools.of(want, rows_by_slot), source, destination, bs)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("bs", [1, 3, 70])
def test_assign_slots(bs: int) -> None:
    rows, columns = torch.randperm(bs + 2)[:bs], 300
    begin = torch.randint(columns - 100, (bs,))
    end = begin + torch.randint(100, (bs,))
    end[-1], begin[0], end[0] = begin[-1], columns - 70, columns  # of nothing, and to the end of its row
    slots = torch.randint(10_000, (int((end - begin).sum()),))
    got, want = (torch.zeros(bs + 2, columns, dtype=torch.int32) for _ in range(2))
    compiled.assign_slots(rows, got, begin, end, slots)
    plain.assign_slots(rows, want, begin, end, slots)
    assert torch.equal(got, want)
    assert torch.cat([want[row, a:b] for row, a, b in zip(rows, begin, end, strict=True)]).equal(slots.int())


@pytest.mark.parametrize(("bs", "w", "block"), [(1, 1, 1), (3, 64, 16), (70, 3, 3)])
def test_open_window(bs: int, w: int, block: int) -> None:
    slot_table = torch.randint(10_000, (bs + 2, 300), dtype=torch.int32)
    rows, prefix_lens = torch.randperm(bs + 2)[:bs], torch.randint(300 - w, (bs,))
    prefix_lens[0] = 300 - w  # to the end of its row
    held, most = (prefix_lens + torch.randint(2 * w, (bs,))).clamp(max=300), prefix_lens + torch.randint(40, (bs,))
    held[0], most[-1] = 300, 0
    agree("open_window", slot_table, rows, prefix_lens, held, most, torch.randint(40, (bs,)), 7, w, block)


@pytest.mark.parametrize("ops", [plain, compiled])
def test_a_window_without_room_writes_to_the_sink_and_is_walked_at_its_root(ops: Any) -> None:
    slot_table = torch.arange(100, 140, dtype=torch.int32).view(2, 20)
    prefix, bonus = torch.tensor([10, 18]), torch.tensor([7, 8])
    open_window = functools.partial(ops.open_window, slot_table, torch.tensor([1, 0]), prefix)
    slots, deepest, tokens, _ = open_window(torch.tensor([14, 20]), torch.tensor([19, 30]), bonus, 5, 4, 2)
    assert slots.tolist() == [[130, 131, 132, 133], [118, 119, 0, 0]]  # past the row of 20 begins another's
    assert deepest.tolist() == [7, 0]  # 10 committed, the bonus token, 7 drafted and a sample: 19
    assert tokens.tolist() == [[7, 5], [8, 5]]
    *_, no_more, _, _ = open_window(torch.tensor([14, 20]), torch.tensor([11, 0]), bonus, 5, 4, 2)
    assert no_more.tolist() == [0, 0]


@pytest.mark.parametrize("warps", [compiled.WARPS, 0], ids=["few tokens", "heads share warps"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("w", "heads", "kv_heads", "size"),
    [(1, 4, 4, 64), (5, 9, 3, 64), (40, 4, 1, 128), (3, 2, 2, 256), (7, 8, 1, 64), (9, 12, 2, 64), (6, 2, 1, 128)],
)
def test_window_attention(
    dtype: torch.dtype, w: int, heads: int, kv_heads: int, size: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "WARPS", warps)
    bs, scale = 3, size**-0.5
    qkv = torch.randn(bs * w, heads + 2 * kv_heads, size).to(dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    mask = (torch.rand(bs, w, w) < 0.3) | torch.eye(w, dtype=torch.bool)
    prefix, lse = torch.randn(bs * w, heads, size).to(dtype), torch.randn(bs, heads, w)
    lse[1] = -torch.inf  # no prefix: what a library's kernel leaves there may be anything
    prefix[w : 2 * w] = torch.nan
    slots = 1 + torch.randperm(bs * w + 5)[: bs * w]
    for softcap, to in ((0.0, slots), (3.0, None)):
        results = []
        for ops in (compiled, plain):
            out, caches = prefix.clone(), [torch.zeros(bs * w + 6, kv_heads, size, dtype=dtype) for _ in range(2)]
            ops.window_attention(q, k, v, mask, lse, out, *caches, to, scale, softcap)
            results.append((out, *caches))
        (got, *filled), (want, *expected) = results
        torch.testing.assert_close(got, want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        assert all(map(torch.equal, filled, expected))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_write_context(dtype: torch.dtype, size: int, normed: bool) -> None:
    tokens, layers, heads, room = 5, 3, 2, 20
    kv = torch.randn(tokens, 2, layers, heads, size).to(dtype)
    k_norm = torch.rand(layers, 1, size).to(dtype) if normed else None
    angles = torch.arange(50.0)[:, None] * torch.rand(size // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    positions, slots = torch.tensor([3, 4, 49, 0, 7]), torch.tensor([9, 2, 19, 0, 1])
    got, want = ([torch.zeros(room, heads, size, dtype=dtype) for _ in range(2 * layers)] for _ in range(2))
    for op, pools in ((compiled, got), (plain, want)):
        op.write_context(kv, k_norm, cos_sin, positions, slots, Pools.of(pools), 1e-6)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x[1:], y[1:], rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
