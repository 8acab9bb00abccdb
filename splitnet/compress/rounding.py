"""Rounds a weight to few bits such that the outputs of its layer change little for the inputs that were seen.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, sections 3.2 and 3.3. Each input is rounded in turn, and the inputs that are not rounded yet take over
its error. Scales and zeros are chosen beforehand, so that groups are of consecutive inputs in any order of rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from splitnet.errors import NotFinite
from splitnet.quant.packed_tensor import CodeLayout, Codes, ScaleFormat, layout_bits, spread

DAMPING = 0.01  # added to the diagonal of the second moments, as a share of its mean (GPTQ, section 3.3)
_MOST_DAMPING = 1.0
_SCALE = torch.bfloat16
_COLUMNS = 128  # inputs that are rounded before all later inputs take over their errors
_FACTORS = tuple(1.15 - step / 20 for step in range(13))  # scales that are tried, as shares of the largest value


LEAST_LENGTH = 16  # positions of a sequence of the text
MOST_POSITIONS = 1 << 20  # positions of the text
GROUPS = (16, 32, 64, 128)  # sizes of groups that other programs read, too
BITS = (2, 3, 4, 5, 6, 8)  # of weights, if not all have the same bits; layers hold these without padding


def sequence_lengths(positions: int, length: int) -> tuple[int, ...]:
    """The lengths of sequences of `length` positions; the last one has the rest."""
    return tuple(min(length, positions - begin) for begin in range(0, positions, length))


def moments_bytes(inputs: int) -> int:
    """Bytes of memory for the second moments of a layer with this number of inputs, and their factors."""
    return 5 * 4 * inputs**2


@dataclass(frozen=True)
class Compression:
    """How weights are compressed. bits: the mean of each block's weights. group: inputs that share a scale. lengths: of
    the sequences of the text."""

    bits: float
    group: int
    lengths: tuple[int, ...]

    @property
    def positions(self) -> int:
        return sum(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all weights have the same bits."""
        return self.bits == int(self.bits)

    def divides(self, inputs: int) -> bool:
        """Whether a weight with this number of inputs is compressed. If bits differ, one with fewer than 32 inputs is
        not, because the number of its words of 32 bits does not tell its bits."""
        return inputs % self.group == 0 and (self.uniform or inputs >= 32)


class Rounded(NamedTuple):
    """A weight in few bits. codes: in the layout of `bits` and `group`."""

    codes: Codes
    bits: int
    group: int

    def to_floats(self) -> Tensor:
        """`[outputs, inputs]`, float32."""
        offset = 1 << (self.bits - 1)
        return self.codes.to_floats(CodeLayout(layout_bits(self.bits), self.group, ScaleFormat.BFLOAT16, offset=offset))


class SecondMoments:
    """The sum of the outer products of a layer's inputs, `[inputs, inputs]`, float32."""

    def __init__(self, inputs: int) -> None:
        self.sum = torch.zeros(inputs, inputs)
        self.rows = 0

    def add(self, rows: Tensor) -> None:
        """rows: `[rows, inputs]`. Raises NotFinite: a value is inf or NaN."""
        rows = rows.float()
        if not bool(torch.isfinite(rows).all()):
            raise NotFinite(
                "the text makes inf or NaN in this model: compress it with another text, or check the files"
            )
        self.sum.addmm_(rows.T, rows)
        self.rows += len(rows)


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Rounded:
    """The nearest codes of a weight `[outputs, inputs]`."""
    scales = _scales(weight.float(), None, bits, group)
    codes = _nearest(weight.float(), spread(scales.float(), group, weight.shape[1]), bits)
    return Rounded(Codes((codes + (1 << (bits - 1))).to(torch.uint8), scales), bits, group)


class Feedback:
    """How the inputs of a layer take over each other's rounding errors.

    moments: sum or mean of the outer products of the layer's inputs, `[inputs, inputs]`. Raises NotFinite: no damping
    makes them usable.
    """

    def __init__(self, moments: Tensor) -> None:
        self._diagonal = moments.diagonal().clone()
        # The inputs with the largest second moments come first, as long as many others can take over their errors.
        self._order = self._diagonal.argsort(descending=True, stable=True)
        self._factor = _inverse_factor(moments[self._order][:, self._order])

    def round_weight(self, weight: Tensor, bits: int, group: int) -> Rounded:
        """The codes of a weight `[outputs, inputs]`."""
        # The scales of inputs that never occur are chosen, too.
        weights_of_errors = self._diagonal.clamp(min=float(self._diagonal.mean()) * 1e-6 or 1.0)
        scales = _scales(weight.float(), weights_of_errors, bits, group)
        left = weight.float().T[self._order]  # [inputs, outputs]
        codes = torch.empty_like(left, dtype=torch.uint8)
        groups = self._order // group
        for begin in range(0, len(left), _COLUMNS):
            some, own = left[begin : begin + _COLUMNS], self._factor[begin : begin + _COLUMNS]
            end = begin + len(some)
            errors = torch.empty_like(some)
            for index, at in enumerate(range(begin, end)):
                scale = scales[:, groups[at]].float()
                code = _nearest(some[index], scale, bits)
                codes[at] = (code + (1 << (bits - 1))).to(torch.uint8)
                errors[index] = (some[index] - code * scale) / own[index, at]
                some[index + 1 :].addr_(own[index, at + 1 : end], errors[index], alpha=-1)
            left[end:].addmm_(own[:, end:].T, errors, alpha=-1)
        return Rounded(Codes(codes[self._order.argsort()].T.contiguous(), scales), bits, group)


def _nearest(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    most = 1 << (bits - 1)
    return (values / scales).round_().clamp_(-most, most - 1)


def _scales(weight: Tensor, diagonal: Tensor | None, bits: int, group: int) -> Tensor:
    """Scales, `[outputs, groups]`, bfloat16. The sign of a scale is such that the value with the largest magnitude has
    the lowest code, because there is one more code below zero than above. With `diagonal`, `[inputs]`, the magnitude of
    a scale is the one whose rounding errors, weighted by these second moments, are smallest. Raises NotFinite: a weight
    is NaN, or so large that its rounding errors are inf."""
    values = weight.unflatten(1, (-1, group))
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))[..., 0] / -(1 << (bits - 1))
    largest = torch.where(largest == 0, torch.finfo(_SCALE).tiny, largest)
    best = torch.full_like(largest, torch.inf)
    scales = torch.empty_like(largest, dtype=_SCALE)
    for factor in _FACTORS if diagonal is not None else (1.0,):
        scale = (largest * factor).to(_SCALE)
        errors = _nearest(values, scale.float()[..., None], bits).mul_(scale.float()[..., None]).sub_(values).square_()
        if diagonal is not None:
            errors.mul_(diagonal.view(-1, group))
        found = errors.sum(-1)
        scales = torch.where(found < best, scale, scales)
        best = torch.minimum(best, found)
    if not bool(torch.isfinite(best).all()):
        raise NotFinite("a weight of this model is inf, NaN or too large: check the files")
    return scales


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped second moments."""
    mean = float(moments.diagonal().mean()) or 1.0
    damping = DAMPING
    while True:
        moments.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        if damping > _MOST_DAMPING:
            raise NotFinite("the inputs of a layer have no usable second moments: compress with another text")
        damping *= 10
