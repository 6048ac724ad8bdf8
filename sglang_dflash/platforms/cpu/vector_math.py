"""What torch computes element by element with MKL, settled before threads ask for it."""

from __future__ import annotations

import torch

FUNCTIONS = (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.cosh, torch.erf, torch.erfc, torch.erfinv, torch.exp,
    torch.expm1, torch.lgamma, torch.log, torch.log10, torch.log1p, torch.log2, torch.rsqrt, torch.sin, torch.sinh,
    torch.sqrt, torch.tan, torch.tanh, torch.trunc,
)  # fmt: skip


def settle() -> None:
    """Call each function once from this thread alone, before any tensor that threads share.

    MKL 2024 chooses a function's kernel in its first call, and a thread that calls beside it may run an inexact one
    (errors of 1e-5 in float32; pytorch/pytorch#188792): a prompt's scores, or a table of angles for good.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for function in FUNCTIONS:
            function(one)
