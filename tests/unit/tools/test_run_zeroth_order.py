"""Gradients from forward passes alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitnet.tools.tune.methods import TrainingSettings
from splitnet.tools.tune.run import IGNORED, Encoded, TuningRun, estimate_gradients


def grad(weights: torch.nn.Parameter) -> torch.Tensor:
    assert weights.grad is not None
    return weights.grad


def test_an_estimate_is_the_directional_derivative() -> None:
    """For a linear loss, the estimate is exactly the direction times the scalar product of direction and gradient."""
    gradient = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    loss = estimate_gradients([weights], lambda: (weights * gradient).sum() + 7, seed=5, eps=0.01)
    assert loss == pytest.approx(7.0)
    estimate = grad(weights)
    # The estimate is (gradient . z) z, so its product with the gradient is the square of (gradient . z).
    z = estimate / (estimate @ gradient).sqrt()
    assert torch.allclose(estimate, (gradient @ z) * z)
    assert torch.equal(weights, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("directions", "passes"), [(1, 2), (2, 3), (8, 9)])
def test_several_directions_share_the_loss_of_the_initial_point(directions: int, passes: int) -> None:
    weights = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    seen: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        seen.append(weights.detach().clone())
        return (weights**3).sum()

    assert estimate_gradients([weights], loss, seed=2, directions=directions) == pytest.approx(4.0, rel=1e-4)
    assert len(seen) == passes
    drawn = [(one - 1) / 1e-3 for one in seen[:directions]]
    assert torch.equal(seen[-1], torch.ones(4)) == (directions > 1)
    expected = sum(along * (3 * along.sum()) for along in drawn) / directions
    assert torch.allclose(grad(weights), torch.as_tensor(expected), rtol=2e-2, atol=2e-2)


def test_losses_of_all_points_may_be_computed_together() -> None:
    """`loss` may return the points at which `losses` computes all losses together."""
    one, other = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    asked: list[int] = []

    def losses(points: list[torch.Tensor]) -> list[torch.Tensor]:
        asked.append(len(points))
        return [(point**2).sum() for point in points]

    first = estimate_gradients([one], lambda: (one**2).sum(), seed=1, directions=3)
    second = estimate_gradients([other], lambda: other.detach().clone(), seed=1, directions=3, losses=losses)
    assert (asked, second) == ([4], first) and torch.equal(grad(other), grad(one))


def test_many_directions_come_near_the_gradient() -> None:
    gradient = torch.randn(10, generator=torch.Generator().manual_seed(0))
    weights = torch.nn.Parameter(torch.ones(10))
    estimate_gradients([weights], lambda: (weights * gradient).sum(), seed=0, directions=2000)
    assert float(torch.cosine_similarity(grad(weights), gradient, dim=0)) > 0.99
    assert float(grad(weights).norm() / gradient.norm()) == pytest.approx(1, abs=0.1)


def test_estimated_gradients_minimise_a_loss() -> None:
    target = torch.randn(8, generator=torch.Generator().manual_seed(1))
    weights = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([weights], lr=0.02)
    losses: list[float] = []
    for step in range(300):
        losses.append(estimate_gradients([weights], lambda: ((weights - target) ** 2).sum(), seed=step))
        optimizer.step()
    assert losses[-1] < 0.01 * losses[0]


def test_the_seed_determines_the_directions() -> None:
    estimates: list[torch.Tensor] = []
    for seed in (3, 3, 4):
        weights = torch.nn.Parameter(torch.ones(4))
        estimate_gradients([weights], lambda weights=weights: (weights**2).sum(), seed=seed)
        estimates.append(grad(weights))
    assert torch.equal(estimates[0], estimates[1])
    assert not torch.equal(estimates[0], estimates[2])


def test_frozen_parameters_stay_and_errors_restore_all_parameters() -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    weights = torch.nn.Parameter(torch.ones(2))
    calls: list[torch.Tensor] = []

    def fails() -> float:
        calls.append(weights.detach().clone())
        if len(calls) == 2:
            raise RuntimeError("a peer was lost")
        return 1.0

    with pytest.raises(RuntimeError, match="lost"):
        estimate_gradients([frozen, weights], fails, seed=0)
    assert not torch.equal(calls[0], calls[1])
    assert torch.equal(weights, torch.ones(2)) and weights.grad is None
    estimate_gradients([frozen, weights], lambda: weights.sum(), seed=0)
    assert torch.equal(frozen, torch.ones(2)) and frozen.grad is None and grad(weights).abs().sum() > 0


def test_no_graph_is_recorded() -> None:
    weights = torch.nn.Parameter(torch.ones(2))

    def loss() -> torch.Tensor:
        computed = weights.sum()
        assert not computed.requires_grad
        return computed

    estimate_gradients([weights], loss, seed=0)
    with pytest.raises(ValueError, match="directions must be at least 1"):
        estimate_gradients([weights], loss, seed=0, directions=0)


class Prompted(torch.nn.Module):
    """Like PEFT's prompt tuning on a remote model. The logits at a position depend only on the prompt and on the token
    at this position."""

    active_peft_config = SimpleNamespace(peft_type="PROMPT_TUNING")
    loss_in_parts = True

    def __init__(self) -> None:
        super().__init__()
        self.prompt = torch.nn.Parameter(torch.linspace(-1, 1, 22).reshape(2, 11))
        sizes = SimpleNamespace(vocab_size=11, hidden_size=11)
        self.config = SimpleNamespace(get_text_config=lambda: sizes)
        self.calls: list[int] = []

    def get_prompt(self, batch_size: int) -> torch.Tensor:
        return self.prompt.repeat(batch_size, 1, 1)

    def forward(self, input_ids: torch.Tensor, *, logits_to_keep: Any, labels: Any = None, **_: Any) -> Any:
        self.calls.append(len(input_ids))
        mixed = self.get_prompt(batch_size=len(input_ids)).mean(1)
        logits = torch.cos(mixed[:, None] * (1 + input_ids[..., None])) * 3
        if labels is None:
            return SimpleNamespace(logits=logits[:, logits_to_keep])
        entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=entropy)


@pytest.mark.parametrize(("room", "calls"), [(2**26, [15]), (2 * 15 * 11, [6, 6, 3]), (1, [3] * 5)])
def test_prompts_in_one_batch_have_the_same_losses_as_alone(
    room: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitnet.tools.tune.run.PACKED", room)
    rows = [Encoded(list(range(end)), [IGNORED] * 2 + list(range(2, end))) for end in (4, 3, 5)]
    settings = TrainingSettings(steps=2, learning_rate=1e-2, batch_size=3, zeroth_order=True, directions=4)
    together, alone = Prompted(), Prompted()
    alone.active_peft_config = SimpleNamespace(peft_type="PREFIX_TUNING")
    told = [TuningRun(model, rows, settings, pad=0).take_step() for model in (together, alone)]
    assert told[0].loss == pytest.approx(told[1].loss, rel=1e-5)
    torch.testing.assert_close(grad(together.prompt), grad(alone.prompt), rtol=1e-2, atol=1e-3)
    assert (together.calls, alone.calls) == (calls, [3] * 5)
