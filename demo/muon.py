"""Muon for many small matrices: orthogonalized momentum, all matrices of one shape in one batched product.

torch.optim.Muon handles one matrix after another, some 2,500 launches a step for this model; here it is about 150.
"""

from __future__ import annotations

import torch


class BatchedMuon:
    """Updates have the root-mean-square size of AdamW's (0.2), so one learning rate serves both."""

    def __init__(self, params: list[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for p in params:
            groups.setdefault(p.shape, []).append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for params, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([p.grad for p in params])
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonalize(grad.lerp(buffer, self.momentum)).to(grad.dtype)
            scale = 0.2 * max(grad.shape[1:]) ** 0.5
            torch._foreach_mul_(params, 1 - lr * self.weight_decay)
            torch._foreach_add_(params, list((update * scale).unbind(0)), alpha=-lr)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(n, rows, columns) -> nearest semi-orthogonal matrices, roughly: a quintic Newton-Schulz iteration in bf16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x
