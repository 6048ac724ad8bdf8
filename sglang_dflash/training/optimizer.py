"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """x [n, rows, columns] with its singular values brought near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.bfloat16().mT if tall else x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), scaled to AdamW's usual update size (arXiv 2502.16982).

    Matrices of one shape go through together: a small model's step is launches, not work.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            same: list[Tensor] = group["params"]
            state = self.state[same[0]]  # one momentum for all of a shape
            gradient = torch.stack([p.grad for p in same])
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonal(gradient.lerp(state["momentum"], group["momentum"]))
            size = 0.2 * max(same[0].shape) ** 0.5
            torch._foreach_mul_(same, 1 - group["lr"] * group["decay"])
            torch._foreach_add_(same, list(update.to(same[0].dtype).unbind()), alpha=-group["lr"] * size)


def optimizers(model: nn.Module, kind: str, decay: float) -> list[torch.optim.Optimizer]:
    """What trains the model's parameters: AdamW alone ("adamw"), or with Muon for matrices ("muon")."""
    matrices = [p for n, p in model.named_parameters() if kind == "muon" and p.ndim == 2 and "codebook" not in n]
    mine = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in mine]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=decay, fused=rest[0].is_cuda)
    return [adamw, Muon(matrices, lr=0.0, decay=decay)] if matrices else [adamw]
