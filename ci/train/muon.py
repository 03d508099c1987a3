"""Muon: momentum whose update is made orthogonal, for the weight matrices inside the blocks.

After Keller Jordan's Muon (2024): Newton-Schulz iteration of order five, Nesterov momentum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of [..., rows, columns] towards one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.transpose(-2, -1).contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-2, -1) if transposed else x


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions, or three where the first counts matrices (experts)."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer: Tensor = state["momentum"]
                buffer.lerp_(p.grad, 1 - momentum)
                update = orthogonalise(p.grad.lerp(buffer, momentum))
                scale = math.sqrt(max(1.0, p.shape[-2] / p.shape[-1]))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-lr * scale)
