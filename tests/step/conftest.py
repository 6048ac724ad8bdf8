"""One rank, unless a test has others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.runtime_context import get_parallel


@pytest.fixture(scope="session", autouse=True)
def one_rank() -> None:
    get_parallel().override_permanently(tp_size=1, tp_rank=0, tp_group=SimpleNamespace(rank_in_group=0, world_size=1))
