"""Weights held in four bits, with a scale and a zero for every group of inputs of an output.

Larger groups than the 32 inputs here would take a little less memory and lose more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, Self

import torch

from splitnet.quant.floats import (
    TORCH_INT4_FROM,
    TORCH_INT8_FROM,
    int8_from,
    multiply_by_parts,
    outputs_at_a_time,
    type_for_many,
)
from splitnet.quant.grouped import GroupedForm, held_bytes
from splitnet.quant.stored import Codes, Kind, Layout
from splitnet.quant.tiles import TILE
from splitnet.quant.weight_form import ScaledOutputs, WeightForm

GROUP = 32
"""Inputs that share a scale and a zero."""

_LARGEST_INT4 = 15
_MIDDLE = 8
_SCALE = torch.bfloat16
INT4 = Layout(4, GROUP, Kind.BFLOAT16, Kind.BFLOAT16, offset=_MIDDLE)
_PROBED_INPUTS = 32


class Groups(NamedTuple):
    """A weight in four bits: it stands for `(codes - 8) * scales + zeros`.

    codes: `[outputs, inputs]`, uint8 of 0..15. scales_and_zeros: `[groups, outputs, 2]`, as torch's kernel takes them.
    """

    codes: torch.Tensor
    scales_and_zeros: torch.Tensor


class Int4(GroupedForm):
    """Multiplied by splitnet's kernels where they were compiled, else made floats at every call."""

    @classmethod
    def fits(cls, outputs: int, inputs: int) -> bool:
        return inputs % GROUP == 0

    @classmethod
    def bytes_for(cls, outputs: int, inputs: int) -> int:
        return held_bytes(INT4, outputs, inputs)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self | None:
        codes = int4_codes(weight)
        return None if codes is None else cls.hold(INT4, [codes], weight.device)


class KernelInt4(WeightForm):
    """Multiplied by torch's kernel for CPUs, which takes bfloat16 on the other side and an order of its own."""

    def __init__(self, packed: torch.Tensor, scales_and_zeros: torch.Tensor) -> None:
        super().__init__()
        self.packed: torch.Tensor
        self.scales_and_zeros: torch.Tensor
        self.register_buffer("packed", packed)  # two codes in a byte: [outputs, inputs / 2]
        self.register_buffer("scales_and_zeros", scales_and_zeros)

    @classmethod
    def fits(cls, outputs: int, inputs: int) -> bool:
        order = kernel_order()
        return inputs % GROUP == 0 and order is not None and outputs % len(order) == 0

    @classmethod
    def bytes_for(cls, outputs: int, inputs: int) -> int:
        return outputs * inputs // 2 + outputs * (inputs // GROUP) * 2 * _SCALE.itemsize

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self | None:
        groups = _grouped(weight)
        return None if groups is None else cls(_pack_for_kernel(groups.codes), groups.scales_and_zeros)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) >= TORCH_INT4_FROM:
            return multiply_by_parts(rows, len(self.packed), [self.dequantised(type_for_many())])
        given = rows.to(torch.bfloat16).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(given, self.packed, GROUP, self.scales_and_zeros)
        return product.to(rows.dtype)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        steps = self._unpack(dtype)
        outputs, inputs = steps.shape
        scales, zeros = self.scales_and_zeros.permute(2, 1, 0).to(dtype)[..., None]  # [outputs, groups, 1] each
        return steps.view(outputs, inputs // GROUP, GROUP).mul_(scales).add_(zeros).view(outputs, inputs)

    def _unpack(self, dtype: torch.dtype) -> torch.Tensor:
        order = kernel_order()
        assert order is not None
        outputs, half = self.packed.shape
        height, inputs = len(order), 2 * half
        # Bytes are turned, not the numbers that they become.
        tiles = self.packed.view(-1, inputs, height // 2).transpose(1, 2).contiguous()
        steps = torch.empty(len(tiles), height, inputs, dtype=dtype)
        for part, slots in zip(_steps(tiles), order.split(height // 2), strict=True):
            first, step = int(slots[0]), int(slots[1] - slots[0])
            if torch.equal(slots, first + step * torch.arange(len(slots))):
                steps[:, first : first + step * len(slots) : step] = part  # much faster than by a list
            else:
                steps[:, slots] = part.to(dtype)
        return steps.view(outputs, inputs)


@cache
def kernel_order() -> torch.Tensor | None:
    """How torch's kernel orders weights on this CPU: which output of a tile each slot holds; None if it is not known.

    A tile has all inputs of some outputs, and for each input a byte for every two outputs; a slot is half a byte, first
    all lower ones. Which outputs share a byte, and how many make a tile, depends on the instructions that the CPU has,
    so it is found by packing numbers.
    """
    for height in (64, 32, 16):
        outputs = torch.arange(2 * height)[:, None].expand(-1, _PROBED_INPUTS)
        inputs = torch.arange(_PROBED_INPUTS).expand(2 * height, -1)
        found = [_slots(_pack_for_kernel(part.to(torch.uint8)), height, _PROBED_INPUTS) for part in _digits(outputs)]
        tiles = sum(digit.long() << 4 * place for place, digit in enumerate(found))
        assert isinstance(tiles, torch.Tensor)
        order = tiles[0, 0]
        expected = torch.stack((order, order + height))[:, None].expand(-1, _PROBED_INPUTS, -1)
        found = [_slots(_pack_for_kernel(part.to(torch.uint8)), height, _PROBED_INPUTS) for part in _digits(inputs)]
        at = sum(digit.long() << 4 * place for place, digit in enumerate(found))
        in_order = torch.arange(_PROBED_INPUTS)[None, :, None].expand(2, -1, height)
        if torch.equal(tiles, expected) and torch.equal(torch.as_tensor(at), in_order):
            return order
    return None


def _steps(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes in the lower and upper halves of bytes, less 8."""
    return (packed & _LARGEST_INT4).view(torch.int8) - _MIDDLE, (packed >> 4).view(torch.int8) - _MIDDLE


def _digits(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers & 15, numbers >> 4


def _pack_for_kernel(codes: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


def _slots(packed: torch.Tensor, height: int, inputs: int) -> torch.Tensor:
    """`[tiles, inputs, height]`: the lower halves of the bytes of each input of a tile, then the upper ones."""
    tiles = packed.view(-1, inputs, height // 2)
    return torch.cat((tiles & _LARGEST_INT4, tiles >> 4), dim=-1)


def int4_codes(weight: torch.Tensor) -> Codes | None:
    """The codes of a weight `[outputs, inputs]`, float32, as `INT4` has them; None if not all values are finite."""
    groups = _grouped(weight)
    if groups is None:
        return None
    scales, zeros = groups.scales_and_zeros.permute(2, 1, 0).contiguous().cpu()
    return Codes(groups.codes.cpu(), scales, zeros)


def _grouped(weight: torch.Tensor) -> Groups | None:
    """Brings a weight into groups; None if not all of its values are finite."""
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
    return Groups(codes, torch.stack((scales, zeros), dim=-1).transpose(0, 1).contiguous())


_LARGEST_INT8 = 127
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
        scales = (largest / _LARGEST_INT8).clamp_(min=torch.finfo(_SCALE).tiny).to(_SCALE)
        codes = (weight / scales.float()[:, None]).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
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
