"""Linear layers with oneDNN-packed weights."""

from __future__ import annotations

import torch


def pack_linear_layers(model: torch.nn.Module) -> None:
    """Placeholder."""
