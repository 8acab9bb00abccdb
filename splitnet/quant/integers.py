"""Weights brought into int8, with a scale for each output, and int4, with a scale and a zero for groups of inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch.nn.functional import linear

from splitnet.quant.floats import outputs_at_a_time
from splitnet.quant.stored import Codes, Kind, Layout
from splitnet.quant.weight_form import WeightForm

GROUP = 32
"""Inputs of int4 that share a scale and a zero. Larger groups would take a little less memory and lose more."""

_MIDDLE, _LARGEST_INT4, _LARGEST_INT8 = 8, 15, 127
_SCALE = torch.bfloat16

INT4 = Layout(4, GROUP, Kind.BFLOAT16, Kind.BFLOAT16, offset=_MIDDLE)
INT8 = Layout(8, 0, Kind.BFLOAT16, offset=128)


class ScaledForm(WeightForm):
    """Codes `[outputs, inputs]` of eight bits, and a scale for each output, `[outputs]`.

    The weight is made anew at every call, in the type of the rows; see `splitnet.quant.gpu` for kernels of GPUs.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.codes: torch.Tensor
        self.scales: torch.Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self | None:
        """A weight as int8 with scales in bfloat16; None if not all values are finite."""
        largest = weight.abs().amax(dim=1)
        if not bool(torch.isfinite(largest).all()):
            return None
        # The codes are those for the scale as it is stored, or its rounding would stretch the whole row.
        scales = (largest / _LARGEST_INT8).clamp_(min=torch.finfo(_SCALE).tiny).to(_SCALE)
        codes = (weight / scales.float()[:, None]).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
        return cls(codes.to(torch.int8), scales)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, self.dequantised(rows.dtype))

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return self.codes.to(dtype).mul_(self.scales.to(dtype)[:, None])

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        outputs = outputs_at_a_time(self.codes.shape[1]) if self.codes.device.type == "cpu" else len(self.codes)
        for codes, scales in zip(self.codes.split(outputs), self.scales.split(outputs), strict=True):
            yield codes.to(dtype).mul_(scales.to(dtype)[:, None])


def integer_codes(weight: torch.Tensor, layout: Layout) -> Codes | None:
    """The codes of a weight `[outputs, inputs]`, float32, in `INT4` or `INT8`; None if not all values are finite."""
    if layout == INT4:
        return _int4_codes(weight)
    held = ScaledForm.of(weight)
    if held is None:
        return None
    return Codes((held.codes.short() + INT8.offset).to(torch.uint8).cpu(), held.scales[:, None].cpu())


def _int4_codes(weight: torch.Tensor) -> Codes | None:
    outputs, inputs = weight.shape
    values = weight.view(outputs, inputs // GROUP, GROUP)
    low, high = values.amin(-1), values.amax(-1)
    if not bool(torch.isfinite(high - low).all()):
        return None
    # The codes are those for scale and zero as they are stored.
    scales = ((high - low) / _LARGEST_INT4).clamp_(min=torch.finfo(_SCALE).tiny).to(_SCALE)
    zeros = (low + _MIDDLE * scales.float()).to(_SCALE)
    codes = (values - zeros.float()[..., None]).div_(scales.float()[..., None]).add_(_MIDDLE)
    codes = codes.round_().clamp_(0, _LARGEST_INT4).to(torch.uint8).view(outputs, inputs)
    return Codes(codes.cpu(), scales.cpu(), zeros.cpu())
