"""Steps that are no model's; the servers that they are for are the script's own."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from loading import ROOT, load


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return load("scripts/time_streaming.py")


def test_a_step_gives_each_request_a_token_and_takes_its_time(script: ModuleType) -> None:
    steps, batch = script._Steps(0.05), SimpleNamespace(reqs=[None] * 3)
    steps.step(None, batch)
    started = time.monotonic()
    result = steps.step(None, batch, is_verify=False)
    assert time.monotonic() - started > 0.04
    assert result.next_token_ids.shape == (3,)
