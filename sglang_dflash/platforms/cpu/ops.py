"""Layer ops of SGLang whose plain-torch form is slow on a CPU, done in fewer passes."""

from __future__ import annotations


def register_ops(dispatch_key: str) -> None:
    """Make SGLang dispatch to the ops here under dispatch_key."""
