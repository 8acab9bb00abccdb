"""Rounds a weight to few bits such that the outputs of its layer change little for the inputs that were seen.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, sections 3.2 and 3.3. Each input is rounded in turn, and the inputs that are not rounded yet take over
its error. Scales and zeros are chosen beforehand, so that groups are of consecutive inputs in any order of rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitnet.errors import NotFinite
from splitnet.quant.packed_tensor import CodeLayout, Codes, ScaleFormat, layout_bits, spread

GROUP = 32  # inputs that share a scale and a zero
DAMPING = 0.01  # added to the diagonal of the second moments, as a share of its mean (GPTQ, section 3.3)
_MOST_DAMPING = 1.0
_SCALE = torch.bfloat16
_COLUMNS = 128  # inputs that are rounded before all later inputs take over their errors
_SHRINKS = tuple(1 - step / 20 for step in range(9))  # scales that are tried, in the range of a group


def layout_of(bits: int, group: int = GROUP) -> CodeLayout:
    """Codes of 2 to 8 bits with a scale and a zero for each group of inputs."""
    return CodeLayout(layout_bits(bits), group, ScaleFormat.BFLOAT16, ScaleFormat.CODES, offset=1 << (bits - 1))


class SecondMoments:
    """The sum of the outer products of a layer's inputs, `[inputs, inputs]`, float32."""

    def __init__(self, inputs: int) -> None:
        self.sum = torch.zeros(inputs, inputs)
        self.rows = 0

    def add(self, rows: Tensor) -> None:
        """rows: `[rows, inputs]`. Raises NotFinite: a value is inf or NaN."""
        rows = rows.float()
        if not bool(torch.isfinite(rows).all()):
            raise NotFinite("the text makes inf or NaN in this model: compress it with another text, or check the files")
        self.sum.addmm_(rows.T, rows)
        self.rows += len(rows)


def round_to_nearest(weight: Tensor, bits: int, group: int = GROUP) -> Codes:
    """The nearest codes of a weight `[outputs, inputs]`; the range of each group is that of its values."""
    scales, zeros = _grids(weight.float(), None, bits, group)
    inputs = weight.shape[1]
    codes = _nearest(weight.float(), spread(scales.float(), group, inputs), spread(zeros, group, inputs), bits)
    return Codes(codes.to(torch.uint8), scales, zeros.to(torch.uint8))


def round_with_feedback(weight: Tensor, moments: Tensor, bits: int, group: int = GROUP) -> Codes:
    """The codes of a weight `[outputs, inputs]` in `layout_of(bits, group)`.

    moments: sum or mean of the outer products of the layer's inputs, `[inputs, inputs]`; it is overwritten.
    """
    diagonal = moments.diagonal().clone()
    scales, zeros = _grids(weight.float(), diagonal, bits, group)
    # The inputs with the largest second moments come first, as long as many others can take over their errors.
    order = diagonal.argsort(descending=True, stable=True)
    factor = _inverse_factor(moments[order][:, order])
    left = weight.float().T[order]  # [inputs, outputs]
    codes = torch.empty_like(left, dtype=torch.uint8)
    groups = order // group
    for begin in range(0, len(left), _COLUMNS):
        some, own = left[begin : begin + _COLUMNS], factor[begin : begin + _COLUMNS]
        errors = torch.empty_like(some)
        for index in range(len(some)):
            at = begin + index
            scale, zero = scales[:, groups[at]].float(), zeros[:, groups[at]]
            code = _nearest(some[index], scale, zero, bits)
            codes[at] = code.to(torch.uint8)
            errors[index] = (some[index] - (code - zero) * scale) / own[index, at]
            some[index + 1 :].addr_(own[index, at + 1 : begin + len(some)], errors[index], alpha=-1)
        left[begin + len(some) :].addmm_(own[:, begin + len(some) :].T, errors, alpha=-1)
    return Codes(codes[order.argsort()].T.contiguous(), scales, zeros.to(torch.uint8))


def _nearest(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return (values / scales).add_(zeros).round_().clamp_(0, 2**bits - 1)


def _grids(weight: Tensor, diagonal: Tensor | None, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Scales, bfloat16, and zeros as codes in float32, `[outputs, groups]`. With `diagonal`, `[inputs]`, the range of a
    group is the one whose rounding errors, weighted by these second moments, are smallest."""
    values = weight.unflatten(1, (-1, group))
    low, high = values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.empty_like(low, dtype=_SCALE), torch.empty_like(low)
    for shrink in _SHRINKS if diagonal is not None else _SHRINKS[:1]:
        scale = ((high - low) * (shrink / (2**bits - 1))).clamp_(min=torch.finfo(_SCALE).tiny).to(_SCALE)
        zero = (low * -shrink / scale.float()).round_().clamp_(0, 2**bits - 1)
        codes = _nearest(values, scale.float()[..., None], zero[..., None], bits)
        errors = codes.sub_(zero[..., None]).mul_(scale.float()[..., None]).sub_(values).square_()
        if diagonal is not None:
            errors.mul_(diagonal.view(-1, group))
        found = errors.sum(-1)
        better = found < best
        best = torch.where(better, found, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


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
