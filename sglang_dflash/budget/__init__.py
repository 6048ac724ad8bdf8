"""How much to draft: numbers in, a shape out; nothing of SGLang."""

from __future__ import annotations

from sglang_dflash.budget.choice import Budget, Choice
from sglang_dflash.budget.cost import Cost
from sglang_dflash.budget.gain import Gain
from sglang_dflash.budget.shape import Shape

__all__ = ["Budget", "Choice", "Cost", "Gain", "Shape"]
