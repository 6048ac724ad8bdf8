"""The hot ops of a draft step: in plain torch (`plain`), and compiled from csrc/ for a GPU (`compiled`).

`kernels.grow` and the rest are the plain ones until `use_compiled` is called. Every op is vectorised over requests and
nodes, has shapes that depend only on its arguments' shapes, and never asks the device for a value, so a CUDA graph may
capture it.
"""

from __future__ import annotations

from typing import Any

from sglang_dflash.kernels import plain
from sglang_dflash.kernels.lattice import Noise
from sglang_dflash.kernels.leads import Leads
from sglang_dflash.kernels.penalties import Emitted
from sglang_dflash.kernels.rows import Pools

__all__ = ["Emitted", "Leads", "Noise", "Pools", "use_compiled"]  # and every op of `plain`

_ops: Any = plain


def use_compiled() -> None:
    """Let this process run the compiled ops from now on: its tensors must be on a CUDA device."""
    global _ops
    from sglang_dflash.kernels import compiled

    compiled.library()
    _ops = compiled


def __getattr__(name: str) -> Any:
    if name not in plain.__all__:
        raise AttributeError(f"there is no op {name!r}")
    return getattr(_ops, name)
