"""How much to draft, and when prompts are read: numbers in, a choice out; nothing of SGLang."""

from __future__ import annotations

from sglang_dflash.budget.choice import Budget, Choice
from sglang_dflash.budget.cost import Cost
from sglang_dflash.budget.gain import Gain
from sglang_dflash.budget.gather import Gather
from sglang_dflash.budget.shape import Shape

__all__ = ["Budget", "Choice", "Cost", "Gain", "Gather", "Shape"]
