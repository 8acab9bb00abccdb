"""Training by forward passes alone."""

from __future__ import annotations

import pytest
import torch

from splitnet.tuning.zeroth_order import ZerothOrder


def test_a_step_follows_the_slope_along_its_direction() -> None:
    """On a linear loss the estimate is exact: the step is the direction times its product with the gradient."""
    gradient = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = ZerothOrder([weights], lr=0.1, eps=0.01, seed=5)
    loss = optimizer.step(lambda: (weights * gradient).sum())
    assert loss == pytest.approx(0.0, abs=1e-12)
    step = weights.detach() / -0.1
    # step = (gradient . z) z, so that its product with the gradient is the square of (gradient . z)
    assert float(step @ gradient) > 0
    z = step / (step @ gradient).sqrt()
    assert torch.allclose(step, (gradient @ z) * z)


def test_many_directions_come_near_the_gradient() -> None:
    gradient = torch.randn(10, generator=torch.Generator().manual_seed(0))
    weights = torch.nn.Parameter(torch.ones(10))
    ZerothOrder([weights], lr=1.0, directions=2000).step(lambda: (weights * gradient).sum())
    assert float(torch.cosine_similarity(1 - weights.detach(), gradient, dim=0)) > 0.99


def test_it_minimises() -> None:
    target = torch.randn(8, generator=torch.Generator().manual_seed(1))
    weights = torch.nn.Parameter(torch.zeros(8))
    optimizer = ZerothOrder([weights], lr=0.02)
    losses = [optimizer.step(lambda: ((weights - target) ** 2).sum()) for _ in range(300)]
    assert losses[-1] < 0.01 * losses[0]


def test_the_same_seed_gives_the_same_steps_also_from_a_saved_state() -> None:
    def train(steps: int, weights: torch.nn.Parameter, state: object = None) -> object:
        optimizer = ZerothOrder([weights], lr=0.05, seed=3)
        if state is not None:
            optimizer.load_state_dict(state)  # type: ignore[arg-type]
        for _ in range(steps):
            optimizer.step(lambda: (weights**2).sum())
        return optimizer.state_dict()

    whole, parts = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    train(6, whole)
    train(4, parts, train(2, parts))
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, torch.ones(4))


def test_frozen_parameters_stay_and_errors_leave_everything_as_it_was() -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    weights = torch.nn.Parameter(torch.ones(2))
    optimizer = ZerothOrder([frozen, weights])

    def fails() -> float:
        raise RuntimeError("a peer was lost")

    with pytest.raises(RuntimeError, match="lost"):
        optimizer.step(fails)
    assert torch.equal(weights, torch.ones(2)) and torch.equal(frozen, torch.ones(2))
    optimizer.step(lambda: weights.sum())
    assert torch.equal(frozen, torch.ones(2)) and not torch.equal(weights, torch.ones(2))


def test_no_gradients_are_recorded_and_none_is_needed() -> None:
    weights = torch.nn.Parameter(torch.ones(2))

    def closure() -> torch.Tensor:
        loss = weights.sum()
        assert not loss.requires_grad
        return loss

    ZerothOrder([weights]).step(closure)
    with pytest.raises(ValueError, match="closure"):
        ZerothOrder([weights]).step()
