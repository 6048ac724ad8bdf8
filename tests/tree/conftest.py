from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def ops(either_ops: None) -> None:
    """Every test here holds for the plain and the compiled ops alike."""
