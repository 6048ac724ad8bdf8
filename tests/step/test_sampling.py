"""Each node is sampled under its own request's settings, whatever its neighbours in the batch ask for."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from scipy.stats import chisquare
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from torch import Tensor

from sglang_dflash.step import sampling
from sglang_dflash.tree import DraftTree, walk

BS, WIDTH, VOCAB, DRAWS, ALL = 3, 4, 8, 2000, 1 << 30
TEMPERATURES = [0.3, 1.0, 2.5]
LOGITS = torch.linspace(-1.5, 2.0, VOCAB)


def info(**changed: Any) -> SamplingBatchInfo:
    """Three requests, each with a temperature and a seed of its own."""
    settings = {
        "temperatures": torch.tensor(TEMPERATURES)[:, None],
        "top_ps": torch.ones(BS),
        "top_ks": torch.full((BS,), ALL, dtype=torch.int32),
        "min_ps": torch.zeros(BS),
        "is_all_greedy": False,
        "is_any_greedy": False,
        "need_top_p_sampling": False,
        "need_top_k_sampling": False,
        "need_min_p_sampling": False,
        "vocab_size": VOCAB,
        "sampling_seed": torch.tensor([11, 12, 13]),
        "device": "cpu",
    }
    return SamplingBatchInfo(**{**settings, **changed})


def tree_of(tokens: Tensor) -> DraftTree:
    """tokens [bs, WIDTH]: a root, its two children, and a child of the first of these."""
    parents, depths = (torch.tensor(x).expand(len(tokens), -1) for x in ([0, 0, 0, 1], [0, 1, 1, 2]))
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool().expand(len(tokens), -1, -1)
    return DraftTree(tokens, parents, depths, mask, torch.zeros(tokens.shape), 2)


def drawn() -> Tensor:
    """Samples [DRAWS, BS, WIDTH] of nodes that all have the same logits, at positions of their own."""
    logits, at = LOGITS.repeat(BS * WIDTH, 1), torch.arange(BS * WIDTH)
    rounds = [sampling._sample(logits, at + i * WIDTH * BS, info(), slice(None)) for i in range(DRAWS)]
    return torch.stack(rounds).view(DRAWS, BS, WIDTH)


def p_values(samples: Tensor) -> list[float]:
    """Of each request's nodes having the distribution at its own temperature."""
    counts = [torch.bincount(samples[:, row].flatten(), minlength=VOCAB) for row in range(BS)]
    expected = [(LOGITS.double() / t).softmax(-1) * DRAWS * WIDTH for t in TEMPERATURES]
    return [float(chisquare(c, e * (c.sum() / e.sum())).pvalue) for c, e in zip(counts, expected, strict=True)]


def test_neighbours_of_other_temperatures_change_no_distribution() -> None:
    assert min(p_values(drawn())) > 0.001


def repeat(settings: Tensor, times: int, dim: int) -> Tensor:
    """The bug that is near: it gives rows 0, 1, 2, 0, 1, 2 where 0, 0, 0, 0, 1, 1 are meant."""
    return settings.repeat(times, *[1] * (settings.dim() - 1))


def test_settings_laid_out_by_node_would_be_seen() -> None:
    with patch.object(torch.Tensor, "repeat_interleave", repeat):
        assert max(p_values(drawn())) < 1e-6


def test_what_is_sampled_along_the_walk_is_what_every_node_s_sample_leads_to() -> None:
    torch.manual_seed(0)
    for _ in range(200):
        logits, positions = torch.randn(BS * WIDTH, 4), torch.randint(99, (BS * WIDTH,))
        tokens = torch.rand(BS, 4).argsort(-1)
        tokens[:, 3] = torch.randint(4, (BS,))
        tree = tree_of(tokens)
        every = sampling._sample(logits, positions, info(), slice(None)).view(BS, WIDTH)
        along = sampling.sample_nodes(logits, info(), positions, tree)
        for one, other in zip(vars(walk(tree, every)).values(), vars(walk(tree, along)).values(), strict=True):
            assert torch.equal(one, other)


def test_greedy_rows_of_a_mixed_batch_are_the_argmax() -> None:
    logits, positions = torch.randn(BS * WIDTH, VOCAB), torch.arange(BS * WIDTH)
    greedy = info(top_ks=torch.tensor([1, ALL, 1], dtype=torch.int32), need_top_k_sampling=True)
    got = sampling._sample(logits, positions, greedy, slice(None)).view(BS, WIDTH)
    assert torch.equal(got[[0, 2]], logits.argmax(-1).view(BS, WIDTH)[[0, 2]])


@pytest.mark.parametrize("filters", [{}, {"top_ps": torch.tensor([0.8, 1.0, 0.9]), "need_top_p_sampling": True}])
def test_a_prefill_s_sample_is_the_one_that_a_tree_s_root_would_have(filters: dict[str, Any]) -> None:
    logits, positions = torch.randn(BS, VOCAB), torch.arange(5, 5 + BS)
    settings = info(**filters)
    probs = (logits / settings.temperatures).softmax(-1)
    kept = probs.clone()
    got, capture = sampling.sample_from_probs(lambda: None, None, probs, settings, positions, not filters)
    assert capture is None and got.dtype == torch.int32
    assert torch.equal(probs, kept)  # log-probabilities are made of them
    assert torch.equal(got.long(), sampling._sample(logits, positions, settings, slice(None)))
