from __future__ import annotations

import itertools
import math

import pytest
import torch

from sglang_dflash import kernels
from sglang_dflash.kernels import lattice
from sglang_dflash.kernels.sampling import gumbel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_lse(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, 777) * 6 + 40).to(dtype)
    values, indices, lse = kernels.topk_lse(logits, 16)
    assert (values.dtype, indices.dtype, lse.dtype) == (torch.float32, torch.int64, torch.float32)
    for row in range(5):
        plain = logits[row].double().tolist()
        assert values[row].tolist() == sorted(plain, reverse=True)[:16]
        assert [plain[i] for i in indices[row].tolist()] == values[row].tolist()
        assert len(set(indices[row].tolist())) == 16
        assert lse[row].item() == pytest.approx(math.log(math.fsum(map(math.exp, plain))), abs=1e-5)


def test_on_a_cpu_the_likeliest_tokens_alone_are_given_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, noise = torch.randn(6, 777), kernels.Noise(torch.tensor([5, 6]), torch.tensor([30, 40]), torch.ones(2))
    every = gumbel(noise.seeds.repeat_interleave(3), torch.tensor([30, 31, 32, 40, 41, 42]), 777)
    for most in (100, 777):
        monkeypatch.setattr(lattice, "LIKELIEST", most)
        values, indices, lse = kernels.topk_lse(logits, 16, noise)
        kept = logits >= logits.topk(most).values[:, -1:]
        want = (logits + every).masked_fill(~kept, -torch.inf)
        torch.testing.assert_close(values, want.topk(16).values)
        assert torch.equal(indices, want.topk(16).indices)
        torch.testing.assert_close(lse, want.logsumexp(-1))


def test_noise_that_counts_nothing_changes_no_bit() -> None:
    logits, seeds = torch.randn(6, 777), torch.tensor([5, 6])
    mixed = kernels.topk_lse(logits, 16, kernels.Noise(seeds, seeds, torch.tensor([1.0, 0.0])))
    silent = kernels.topk_lse(logits, 16, kernels.Noise(seeds, seeds, torch.zeros(2)))
    for one, other, plain in zip(mixed, silent, kernels.topk_lse(logits, 16), strict=True):
        assert torch.equal(one[3:], plain[3:]) and not torch.equal(one[:3], plain[:3])
        assert torch.equal(other, plain)


def test_without_transitions_it_is_the_log_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 100)
    unary, tokens, lse = kernels.topk_lse(logits.view(-1, 100), 8)
    logp = kernels.lattice_logp(unary.view(2, 3, 8), lse.view(2, 3), None)
    assert logp.shape == (2, 3, 1, 8)
    torch.testing.assert_close(logp[:, :, 0], logits.log_softmax(-1).gather(2, tokens.view(2, 3, 8)))


def test_with_transitions_the_candidates_share_their_unary_probability() -> None:
    torch.manual_seed(0)
    logits, transitions = torch.randn(2, 3, 100) * 2, torch.randn(2, 3, 8, 8)
    unary, _, lse = (x.view(2, 3, *x.shape[1:]) for x in kernels.topk_lse(logits.view(-1, 100), 8))
    logp = kernels.lattice_logp(unary, lse, transitions)
    assert logp.shape == (2, 3, 8, 8)
    for b, i, p in ((0, 0, 0), (1, 2, 7), (0, 1, 3)):
        all_logits = logits[b, i].tolist()
        share = math.fsum(map(math.exp, unary[b, i].tolist())) / math.fsum(map(math.exp, all_logits))
        scores = (unary[b, i] + transitions[b, i, p]).double().exp().tolist()
        want = [math.log(share * score / sum(scores)) for score in scores]
        assert logp[b, i, p].tolist() == pytest.approx(want, abs=1e-5)


def test_no_transition_score_is_as_no_transitions() -> None:
    torch.manual_seed(0)
    unary = torch.randn(2, 3, 8)
    lse = unary.logsumexp(-1) + 0.5
    with_zeros = kernels.lattice_logp(unary, lse, torch.zeros(2, 3, 8, 8))
    torch.testing.assert_close(with_zeros, kernels.lattice_logp(unary, lse, None).expand(-1, -1, 8, -1))


@pytest.mark.parametrize("transitions", [None, torch.zeros(1, 1, 2, 2)])
def test_rounding_never_makes_a_candidate_more_than_certain(transitions: torch.Tensor | None) -> None:
    unary = torch.tensor([[[10.0, -30.0]]])
    too_low = torch.tensor([[9.9999]])
    assert kernels.lattice_logp(unary, too_low, transitions).max() == 0


@pytest.mark.parametrize("transitions", [None, torch.zeros(1, 1, 2, 2)])
def test_a_candidate_ruled_out_has_no_probability(transitions: torch.Tensor | None) -> None:
    logp = kernels.lattice_logp(torch.tensor([[[1.0, -torch.inf]]]), torch.tensor([[1.0]]), transitions)
    assert (logp == torch.tensor([0.0, -torch.inf])).all()


@pytest.mark.parametrize("transitions", [None, torch.zeros(1, 2, 2, 2)])
def test_a_nan_of_the_draft_still_gives_a_tree(transitions: torch.Tensor | None) -> None:
    unary = torch.tensor([[[2.0, 1.0], [torch.nan, torch.nan]]])
    logp = kernels.lattice_logp(unary, torch.tensor([[3.0, torch.nan]]), transitions)
    assert logp[:, 0].isfinite().all() and (logp[:, 1] == -torch.inf).all()
    tokens = torch.tensor([[[10, 11], [20, 21]]])
    grown, parents, *_ = kernels.grow(tokens, logp, torch.tensor([5]), 4)
    assert (grown.tolist(), parents.tolist()) == ([[5, 10, 11, 20, 21]], [[0, 0, 0, 1, 1]])


def test_transitions_are_the_selector_s() -> None:
    torch.manual_seed(0)
    bs, d, k, r, vocab = 2, 3, 4, 8, 50
    unary, lse = torch.randn(bs, d, k), torch.randn(bs, d) + 4
    tokens = torch.rand(bs, d, vocab).argsort(-1)[..., :k]
    bonus, gate = torch.tensor([1, 2]), torch.randn(bs, d, r)
    a, b = torch.randn(vocab, r), torch.randn(vocab, r)
    logp = kernels.selector_logp(unary, lse, tokens, bonus, gate, a, b)
    assert logp.shape == (bs, d, k, k)
    transitions = torch.empty(bs, d, k, k)
    for i, depth, p, c in itertools.product(range(bs), range(d), range(k), range(k)):
        before = bonus[i] if depth == 0 else tokens[i, depth - 1, p]
        transitions[i, depth, p, c] = (a[before] * gate[i, depth] * b[tokens[i, depth, c]]).sum()
    torch.testing.assert_close(logp, kernels.lattice_logp(unary, lse, transitions))
    assert torch.equal(logp[:, 0], logp[:, 0, :1].expand(bs, k, k))
