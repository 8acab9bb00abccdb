"""Norms and activations of families, found by trying what a module gives: what they are called tells nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from itertools import product
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

_TRIALS = 8
_SCALES = (1.0, 1e-2)
"""Of what norms are tried on: the second one shows what is added to the variance."""


class UnknownPart(Exception):
    """A part of a block that compiled steps do not have; the message names it."""


class NormKind(IntEnum):
    """As `enum norm` in `native/step.h`."""

    RMS = 1
    LAYER = 2


@dataclass(frozen=True, eq=False)
class Norm:
    """What a norm multiplies and adds to normalised numbers.

    Attributes:
        weight: `[width]`, or `[heads, size]` of heads that have one each.
        bias: likewise, or None.
        epsilon: is added to the variance.
    """

    kind: NormKind
    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """For a family's own module.

        Raises:
            UnknownPart: it does something else.
        """
        own: Any = deepcopy(module).float()
        named = [(name.rpartition(".")[2], each.detach()) for name, each in own.named_parameters()]
        weight, bias = (_stacked([each for name, each in named if name == wanted]) for wanted in ("weight", "bias"))
        if weight is None:
            weight = torch.ones(own.normalized_shape, dtype=torch.float32)
        epsilon = float(getattr(own, "variance_epsilon", getattr(own, "eps", 1e-5)))
        noise = torch.Generator().manual_seed(0)
        # Heads stand before positions or behind them: here there is one position.
        shape = (_TRIALS, *weight.shape) if weight.ndim == 1 else (_TRIALS, len(weight), 1, weight.shape[1])
        if weight.ndim == 2 and not hasattr(own, "norms"):
            shape = (_TRIALS, 1, *weight.shape)
        given = [scale * (torch.randn(shape, generator=noise, dtype=torch.float32) + 0.5) for scale in _SCALES]
        found = [own(each) for each in given]
        for kind, offset in product(NormKind, (0.0, 1.0)):
            likely = cls(kind, weight + offset, bias, epsilon)
            rows = [each.view(_TRIALS, *weight.shape) for each in given]
            if all(_same(likely._normed(row), each.view_as(row)) for row, each in zip(rows, found, strict=True)):
                return likely
        raise UnknownPart(type(module).__name__)

    def _normed(self, rows: torch.Tensor) -> torch.Tensor:
        if self.kind == NormKind.LAYER:
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight
        return rows if self.bias is None else rows + self.bias


class ActivationKind(IntEnum):
    """As `enum activation` in `native/step.h`."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    GELU_QUICK = 3
    RELU = 4
    RELU_SQUARED = 5
    XIELU = 6


@dataclass(frozen=True)
class Activation:
    """One of those that compiled steps have; `shape`: four numbers of xIELU."""

    kind: ActivationKind
    shape: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, module: Any) -> Self:
        """For a family's own module.

        Raises:
            UnknownPart: it does something else.
        """
        own: Any = deepcopy(module).float()
        given = torch.linspace(-8, 8, 1001, dtype=torch.float32)
        with torch.no_grad():
            found = own(given)
            for kind, shape, function in _activations(own):
                if _same(function(given), found):
                    return cls(kind, shape)
        raise UnknownPart(type(module).__name__)


def _activations(own: Any) -> Iterator[tuple[ActivationKind, Any, Callable[[torch.Tensor], torch.Tensor]]]:
    plain: dict[ActivationKind, Callable[[torch.Tensor], torch.Tensor]] = {
        ActivationKind.SILU: functional.silu,
        ActivationKind.GELU: functional.gelu,
        ActivationKind.GELU_TANH: partial(functional.gelu, approximate="tanh"),
        ActivationKind.GELU_QUICK: lambda x: x * torch.sigmoid(1.702 * x),
        ActivationKind.RELU: functional.relu,
        ActivationKind.RELU_SQUARED: lambda x: functional.relu(x).square(),
    }
    for kind, function in plain.items():
        yield kind, (0.0, 0.0, 0.0, 0.0), function
    if hasattr(own, "alpha_p"):
        beta, most = float(own.beta), float(own.eps)
        positive, rest = float(functional.softplus(own.alpha_p)), float(functional.softplus(own.alpha_n)) + beta
        yield (
            ActivationKind.XIELU,
            (positive, rest, beta, most),
            lambda x: torch.where(x > 0, positive * x.square(), (torch.expm1(x.clamp(max=most)) - x) * rest) + beta * x,
        )


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return None if not tensors else tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)
