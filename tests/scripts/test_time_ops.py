"""What is timed on a GPU is called as the ops are: on a CPU, of small sizes, in plain torch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from loading import load
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sglang_dflash.kernels import plain


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script = load("scripts/time_ops.py")
    for name, small in {"NODES": 7, "DEPTH": 3, "VOCAB": 500, "TARGET_LAYERS": 2}.items():
        monkeypatch.setattr(script, name, small)
    torch.manual_seed(0)
    return script


def test_every_op_is_timed_with_arguments_that_it_takes(script: ModuleType) -> None:
    cases = script.cases(2)
    assert {name for name, _, _ in cases} == set(plain.__all__)
    for _, _, call in cases:
        call()


def test_what_is_captured_reads_no_value_on_the_host(script: ModuleType) -> None:
    """Tensors without values: who asks for one is told so, as under a graph's capture."""
    without_values, asks = FakeTensorMode(allow_non_fake_inputs=True), set()

    def fake(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return without_values.from_tensor(x)
        return type(x)(*map(fake, x)) if hasattr(x, "_fields") else x

    for name, _, call in script.cases(2):
        op, args = call.__defaults__
        try:
            with without_values:
                op(*map(fake, args))
        except DataDependentOutputException:
            asks.add(name)
    assert asks == script.ON_A_CPU
