"""Tests of `splitnet.compress.rounding`."""

from __future__ import annotations

import pytest
import torch

from splitnet.compress.rounding import Feedback, SecondMoments, round_to_nearest
from splitnet.errors import NotFinite


def _weight_and_moments(inputs: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[96, inputs]`, and second moments of correlated inputs."""
    torch.manual_seed(0)
    rows = torch.randn(2048, 24) @ torch.randn(24, inputs) + 0.3 * torch.randn(2048, inputs)
    moments = SecondMoments(inputs)
    for some in rows.split(500):
        moments.add(some)
    torch.testing.assert_close(moments.sum, rows.T @ rows, rtol=1e-4, atol=1e-2)
    return torch.randn(96, inputs), moments.sum


@pytest.mark.parametrize(("bits", "most"), [(8, 0.5), (4, 0.5), (3, 0.5), (2, 0.6)])
def test_feedback_halves_the_error_of_outputs(bits: int, most: float) -> None:
    weight, moments = _weight_and_moments()

    def error(rounded: torch.Tensor) -> float:
        off = rounded - weight
        return float(((off @ moments) * off).sum())

    nearest = round_to_nearest(weight, bits, 32).to_floats()
    fed_back = Feedback(moments).round_weight(weight, bits, 32).to_floats()
    assert error(fed_back) < most * error(nearest)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_that_are_not_at_an_end_differ_by_at_most_half_a_step(bits: int) -> None:
    weight, _ = _weight_and_moments()
    rounded = round_to_nearest(weight, bits, 32)
    codes = rounded.codes
    assert int(codes.codes.max()) < 1 << bits
    steps = codes.scales.float().abs().repeat_interleave(32, dim=1)
    off = (rounded.to_floats() - weight).abs() / steps
    inside = (codes.codes > 0) & (codes.codes < (1 << bits) - 1)
    assert inside.any() and float(off[inside].max()) <= 0.5001
    # There is one code less above zero than below: the value opposite to the largest may be cut by half a step more.
    assert float(off.max()) <= 1.02


def test_inputs_that_never_occur_leave_no_trace() -> None:
    weight, moments = _weight_and_moments()
    moments[5] = moments[:, 5] = 0
    assert bool(torch.isfinite(Feedback(moments).round_weight(weight, 4, 32).to_floats()).all())
    unseen = Feedback(torch.zeros_like(moments)).round_weight(weight, 4, 32)
    assert torch.isfinite(unseen.to_floats()).all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e25])
def test_weights_without_finite_errors_are_refused(value: float) -> None:
    weight, moments = _weight_and_moments()
    weight[3, 40] = value
    for rounds in (round_to_nearest, Feedback(moments).round_weight):
        with pytest.raises(NotFinite, match="check the files"):
            rounds(weight, 4, 32)


def test_a_weight_of_zeros_stays_zero() -> None:
    _, moments = _weight_and_moments()
    assert not Feedback(moments).round_weight(torch.zeros(8, 128), 3, 32).to_floats().any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(NotFinite, match="another text"):
        SecondMoments(4).add(torch.tensor([[1.0, value, 0, 0]]))
