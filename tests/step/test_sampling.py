"""Each node is sampled under its own request's settings, whatever its neighbours in the batch ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from scipy.stats import chisquare
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from torch import Tensor

from sglang_dflash.step.sampling import sample_nodes

WIDTH, VOCAB, DRAWS = 4, 8, 2000
TEMPERATURES = [0.3, 1.0, 2.5]
LOGITS = torch.linspace(-1.5, 2.0, VOCAB)


def info() -> SamplingBatchInfo:
    """Three requests, each with settings of its own."""
    return SamplingBatchInfo(
        temperatures=torch.tensor(TEMPERATURES)[:, None],
        top_ps=torch.tensor([0.7, 0.8, 0.9]),
        top_ks=torch.tensor([3, 5, 7], dtype=torch.int32),
        min_ps=torch.tensor([0.0, 0.1, 0.2]),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=True,
        vocab_size=VOCAB,
        sampling_seed=torch.tensor([11, 12, 13]),
        device="cpu",
    )


def by_temperature(output: Any, per_node: SamplingBatchInfo, *_: object) -> Tensor:
    """A sampler that heeds temperatures alone, row by row."""
    return torch.multinomial((output.next_token_logits / per_node.temperatures).softmax(-1), 1)[:, 0]


def drawn() -> Tensor:
    """Samples [DRAWS, 3, WIDTH] of nodes that all have the same logits."""
    torch.manual_seed(0)
    output = SimpleNamespace(next_token_logits=LOGITS.repeat(3 * WIDTH, 1))
    runner, positions = SimpleNamespace(sampler=by_temperature), torch.zeros(3 * WIDTH, dtype=torch.int64)
    return torch.stack([sample_nodes(runner, output, info(), positions, WIDTH) for _ in range(DRAWS)])


def p_values(samples: Tensor) -> list[float]:
    """Of each request's nodes having the distribution at its own temperature."""
    counts = [torch.bincount(samples[:, row].flatten(), minlength=VOCAB) for row in range(3)]
    expected = [(LOGITS.double() / t).softmax(-1) * DRAWS * WIDTH for t in TEMPERATURES]
    return [float(chisquare(c, e * (c.sum() / e.sum())).pvalue) for c, e in zip(counts, expected, strict=True)]


def test_neighbours_of_other_temperatures_change_no_distribution() -> None:
    assert min(p_values(drawn())) > 0.001


def test_settings_laid_out_by_node_would_be_seen() -> None:
    """The bug that is near: `repeat` gives rows 0, 1, 2, 0, 1, 2 where 0, 0, 0, 0, 1, 1 are meant."""

    def repeat(settings: Tensor, times: int, dim: int) -> Tensor:
        return settings.repeat(times, *[1] * (settings.dim() - 1))

    with patch.object(torch.Tensor, "repeat_interleave", repeat):
        assert max(p_values(drawn())) < 1e-6


@pytest.mark.parametrize("name", ["temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed"])
def test_every_setting_reaches_each_node_of_its_request(name: str) -> None:
    seen: list[SamplingBatchInfo] = []

    def sampler(output: Any, per_node: SamplingBatchInfo, *_: object) -> Tensor:
        seen.append(per_node)
        return torch.zeros(3 * WIDTH, dtype=torch.int32)

    sample_nodes(SimpleNamespace(sampler=sampler), None, info(), torch.zeros(3 * WIDTH), WIDTH)
    given, got = getattr(info(), name), getattr(seen[0], name)
    for row in range(3):
        assert (got[row * WIDTH : (row + 1) * WIDTH] == given[row]).all()
