"""A two-layer toy target with random weights, and a data set it might have answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy import CONFIG, random_weights

from sglang_dflash.training.data import Answers, Document, write_shard
from sglang_dflash.training.target import Target


@pytest.fixture
def target() -> Target:
    return Target(CONFIG, random_weights()).eval()


@pytest.fixture
def make_answers(tmp_path: Path) -> Callable[..., Answers]:
    """make_answers(documents, seed=0): answers that count upwards, so that there is something to learn."""

    def make(documents: int, seed: int = 0) -> Answers:
        rng, made = np.random.default_rng(seed), []
        for i in range(documents):
            prompt, answer = int(rng.integers(2, 9)), int(rng.integers(12, 40))
            start = int(rng.integers(0, 61))
            tokens = [(start + 3 * j) % 61 for j in range(prompt + answer)]
            made.append(Document(tokens, [(prompt, prompt + answer)], i % 2))
        path = tmp_path / f"answers-{documents}-{seed}"
        path.mkdir()
        write_shard(path / "shard-00000.npz", made[: documents // 2])
        write_shard(path / "shard-00001.npz", made[documents // 2 :])
        (path / "manifest.json").write_text(json.dumps({"sources": ["even", "odd"]}))
        return Answers(path)

    return make
