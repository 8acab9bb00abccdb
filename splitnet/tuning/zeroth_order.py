"""Training without gradients: forward passes alone, so that peers need no backward pass and keep nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_SEEDS = 2**63 - 1


class ZerothOrder(torch.optim.Optimizer):
    """MeZO: estimates the slope along one random direction by two forward passes, and steps along it.

    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333, algorithm 1;
    the estimate is SPSA's (Spall, 1992). Directions are made from seeds, never stored.

    Args:
        params: what is trained.
        lr: step size; with one direction per step a tenth to a hundredth of what a first-order method takes.
        eps: how far to go along the direction in both ways.
        directions: estimates per step, averaged; each takes two forward passes.
        weight_decay: as in AdamW.
        seed: of the directions. The same seed, data and options give the same steps.

    Use it with a closure that computes the loss and does not call `backward()`:

        optimizer.step(lambda: model(**batch).loss)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        eps: float = 1e-3,
        directions: int = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if lr <= 0 or eps <= 0 or directions < 1:
            raise ValueError(f"lr and eps must be above 0 and directions at least 1: got {lr}, {eps}, {directions}")
        defaults = {
            "lr": lr,
            "eps": eps,
            "directions": directions,
            "weight_decay": weight_decay,
            "seed": seed,
            "step": 0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Takes a step; returns the mean of the losses that were computed for it.

        Raises:
            ValueError: there is no closure.
        """
        if closure is None:
            raise ValueError(
                "a step needs a closure that computes the loss: optimizer.step(lambda: model(**batch).loss)"
            )
        first = self.param_groups[0]
        eps, directions = first["eps"], first["directions"]
        before = [parameter.clone() for parameter in self._trained()]
        seeds = self._seeds(first["seed"], first["step"], directions)
        slopes: list[float] = []
        losses: list[float] = []
        try:
            for seed in seeds:
                ahead = self._loss_at(before, seed, eps, closure)
                behind = self._loss_at(before, seed, -eps, closure)
                slopes.append((ahead - behind) / (2 * eps))
                losses += [ahead, behind]
        finally:
            for parameter, value in zip(self._trained(), before, strict=True):
                parameter.copy_(value)
        for seed, slope in zip(seeds, slopes, strict=True):
            for group, parameter, direction in self._along(seed):
                parameter.sub_(direction, alpha=group["lr"] * slope / directions)
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
        return sum(losses) / len(losses)

    def _loss_at(self, before: list[torch.Tensor], seed: int, distance: float, closure: Callable[[], Any]) -> float:
        for value, (_, parameter, direction) in zip(before, self._along(seed), strict=True):
            parameter.copy_(value).add_(direction, alpha=distance)
        return float(closure())

    def _along(self, seed: int) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
        """Each parameter with its part of a direction, made again from the seed."""
        generator = torch.Generator().manual_seed(seed)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    yield group, parameter, direction.to(parameter.device, parameter.dtype)

    def _trained(self) -> Iterator[torch.Tensor]:
        for group in self.param_groups:
            yield from (parameter for parameter in group["params"] if parameter.requires_grad)

    @staticmethod
    def _seeds(seed: int, step: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return [int(number) for number in torch.randint(_SEEDS, (count,), generator=generator)]
