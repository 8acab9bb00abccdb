"""Gradients without gradients: from forward passes alone, so that peers need no backward pass and keep nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_SEEDS = 2**63 - 1


@torch.no_grad()
def estimate_gradients(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[], Any],
    *,
    seed: int,
    directions: int = 1,
    eps: float = 1e-3,
) -> float:
    """Sets `grad` of what is trained to an estimate, for any torch optimizer.

    Along each random direction the loss is computed a little ahead and a little behind; the slope times the direction
    is the estimate of SPSA (Spall, 1992). With plain SGD this is MeZO (Malladi et al., "Fine-Tuning Language Models
    with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333, algorithm 1), and with Adam its variant of appendix B.
    MeZO stores no direction; here they are no larger than what a client trains of its own.

    Args:
        parameters: those that do not require gradients stay as they are.
        loss: computes the loss of the model as it is now.
        seed: of the directions; take another one for every step.
        directions: that are averaged over; each takes two forward passes.
        eps: how far to go along a direction.

    Returns:
        The mean of the losses.

    Raises:
        whatever `loss` raises; parameters and gradients are as before then.
    """
    if directions < 1 or eps <= 0:
        raise ValueError(f"directions must be at least 1 and eps above 0, got {directions} and {eps}")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    before = [parameter.clone() for parameter in trained]
    estimates = [torch.zeros_like(parameter) for parameter in trained]
    generator = torch.Generator().manual_seed(seed % _SEEDS)
    total = 0.0

    def loss_at(direction: list[torch.Tensor], distance: float) -> float:
        for parameter, value, along in zip(trained, before, direction, strict=True):
            parameter.copy_(value).add_(along, alpha=distance)
        return float(loss())

    try:
        for _ in range(directions):
            direction = [
                torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                for parameter in trained
            ]
            ahead, behind = loss_at(direction, eps), loss_at(direction, -eps)
            total += ahead + behind
            for estimate, along in zip(estimates, direction, strict=True):
                estimate.add_(along, alpha=(ahead - behind) / (2 * eps * directions))
    finally:
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
    for parameter, estimate in zip(trained, estimates, strict=True):
        parameter.grad = estimate
    return total / (2 * directions)
