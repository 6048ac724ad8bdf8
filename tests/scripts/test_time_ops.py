"""What is timed on a GPU is called as the ops are: on a CPU, of small sizes, in plain torch."""

from __future__ import annotations

import pytest
import torch
from loading import load

from sglang_dflash.kernels import plain


def test_every_op_is_timed_with_arguments_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("scripts/time_ops.py")
    for name, small in {"NODES": 7, "DEPTH": 3, "VOCAB": 500, "TARGET_LAYERS": 2}.items():
        monkeypatch.setattr(script, name, small)
    torch.manual_seed(0)
    cases = script.cases(2)
    assert {name for name, _, _ in cases} == set(plain.__all__)
    for _, _, call in cases:
        call()
