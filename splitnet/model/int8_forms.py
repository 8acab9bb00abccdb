"""Weights held as int8 with one scale per output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch

from splitnet.model.grouped_forms import GroupedForm, held_bytes
from splitnet.model.many_rows import TORCH_INT8_FROM, int8_from, multiply_by_parts, outputs_at_a_time, type_for_many
from splitnet.model.stored import Codes, Kind, Layout
from splitnet.model.tiles import TILE
from splitnet.model.weight_form import ScaledOutputs

_LARGEST = 127
_SCALE = torch.bfloat16
INT8 = Layout(8, 0, Kind.BFLOAT16, offset=128)
_KERNEL_INPUTS, _KERNEL_OUTPUTS = 32, 16
"""The kernel reads in vectors and past the end of what is no multiple of them."""

_MOST_INPUTS = 2**16
"""So that sums of products of bytes stay within 32 bits."""


class DequantisedInt8(ScaledOutputs):
    """Codes are int8; the weight is made anew at every call, in the type of what it is multiplied with."""

    @classmethod
    def bytes_for(cls, outputs: int, inputs: int) -> int:
        return outputs * inputs + outputs * _SCALE.itemsize

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self | None:
        largest = weight.abs().amax(dim=1)
        if not bool(torch.isfinite(largest).all()):
            return None
        # The codes are those for the scale as it is stored, or its rounding would stretch the whole row.
        scales = (largest / _LARGEST).clamp_(min=torch.finfo(_SCALE).tiny).to(_SCALE)
        codes = (weight / scales.float()[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
        return cls(codes.to(torch.int8), scales)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows, self.dequantised(rows.dtype))

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        outputs = outputs_at_a_time(self.codes.shape[1]) if self.codes.device.type == "cpu" else len(self.codes)
        for codes, scales in zip(self.codes.split(outputs), self.scales.split(outputs), strict=True):
            yield codes.to(dtype).mul_(scales.to(dtype)[:, None])


def int8_codes(weight: torch.Tensor) -> Codes | None:
    """The codes of a weight `[outputs, inputs]`, float32, as `INT8` has them; None if not all values are finite."""
    held = DequantisedInt8.of(weight)
    if held is None:
        return None
    return Codes((held.codes.short() + INT8.offset).to(torch.uint8).cpu(), held.scales[:, None].cpu())


class Int8(GroupedForm):
    """Multiplied by splitnet's kernels; activations keep 16 bits."""

    @classmethod
    def fits(cls, outputs: int, inputs: int) -> bool:
        return inputs <= _MOST_INPUTS

    @classmethod
    def bytes_for(cls, outputs: int, inputs: int) -> int:
        return held_bytes(INT8, outputs, inputs)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self | None:
        codes = int8_codes(weight)
        return None if codes is None else cls.hold(INT8, [codes], weight.device)

    def many_from(self, dtype: torch.dtype) -> int:
        return int8_from()

    def multiply_many(self, rows: torch.Tensor, expert: int = 0) -> torch.Tensor:
        if not self._has_kernel:
            return super().multiply_many(rows, expert)
        # Codes are exact in bfloat16, numbers would not be.
        parts = self._pieces(type_for_many(), expert, self.order.described(self.outputs, scaled=False))
        scales = self.tiles[:, : TILE * _SCALE.itemsize].view(_SCALE).flatten()[: self.outputs]
        return multiply_by_parts(rows, self.outputs, parts).mul_(scales)


class KernelInt8(DequantisedInt8):
    """Multiplied by torch's kernel, which takes bfloat16 on the other side."""

    @classmethod
    def fits(cls, outputs: int, inputs: int) -> bool:
        return inputs % _KERNEL_INPUTS == 0 and outputs % _KERNEL_OUTPUTS == 0

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) >= TORCH_INT8_FROM:
            outputs, inputs = self.codes.shape
            codes = self.codes.split(outputs_at_a_time(inputs))
            parts = (part.to(type_for_many()) for part in codes)  # exactly
            return multiply_by_parts(rows, outputs, parts).mul_(self.scales)
        given = rows.to(torch.bfloat16).contiguous()
        return torch.ops.aten._weight_int8pack_mm(given, self.codes, self.scales).to(rows.dtype)
