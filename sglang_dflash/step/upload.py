"""From the host to the device, without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(device: torch.device, host: Tensor) -> Tensor:
    """On the device; pinned first, else the host waits until the GPU has come so far."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def upload_numbers(device: torch.device, *parts: Any) -> tuple[Tensor, ...]:
    """Sequences of integers on the device, int64, in one copy."""
    arrays = [np.asarray(part, dtype=np.int64) for part in parts]
    return upload(device, torch.from_numpy(np.concatenate(arrays))).split([len(array) for array in arrays])
