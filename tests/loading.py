"""Modules of files that are in no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def load(path: str) -> Any:
    """The module of a file of the repository, made anew. path: from the root."""
    spec = importlib.util.spec_from_file_location(f"{__name__}.{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # where dataclasses look up annotations
    spec.loader.exec_module(made)
    return made
