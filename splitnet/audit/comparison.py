"""Placeholder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    honest: bool
    distance: float
    limit: float


def judge(given: Tensor, sent: Tensor, expected: Tensor, exact: Tensor) -> Verdict:
    change = (expected - given).norm(dim=1)
    own = ((sent - expected).norm(dim=1) / change).median().item()
    limit = 8 * ((exact - expected).norm(dim=1) / change).median().item() + 0.02
    return Verdict(own <= limit, own, limit)
