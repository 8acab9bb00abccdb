"""Weights held in a narrower float type than blocks compute in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch.nn.functional import linear

from splitnet.quant.memory import in_large_pages
from splitnet.quant.native import has_fast_kernels, multiply_floats
from splitnet.quant.weight_form import WeightForm

FLOATS_FROM = 64
"""Rows from which this is faster than splitnet's kernel for the form; so for those below."""

PLAIN_LOOPS_FROM = 24
"""The kernels for any CPU."""

TORCH_INT8_FROM = 48
TORCH_INT4_FROM = 128
"""torch's kernels."""

EXPERTS_FROM = 32
"""Rows of one expert, whose products in float32 by a kernel are slower from then on."""

_INT8_FROM = 32
_INTEGERS_FROM = 48
_OTHERS_FROM = 24
"""The kernels for CPUs with VNNI, where these multiply bfloat16 faster than float32. Others gain nothing."""

_PART = 2**20
_WHOLE = 64
"""Weights of a part, and what its outputs are a multiple of: mkldnn computes so many at a time."""


@cache
def type_for_many() -> torch.dtype:
    """In which type this CPU multiplies many rows faster: bfloat16 if it has instructions for it, else float32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def int8_from() -> int:
    """Rows from which a weight with a scale for each output is made anew."""
    if not has_fast_kernels():
        return PLAIN_LOOPS_FROM
    return _INT8_FROM if type_for_many() == torch.bfloat16 else sys.maxsize


def type_of_codes(rows: torch.Tensor) -> torch.dtype:
    """In which type many rows are multiplied with codes in groups: none is rounded to less than it has."""
    return type_for_many() if rows.device.type == "cpu" and rows.dtype == torch.bfloat16 else rows.dtype


def codes_from(dtype: torch.dtype, *, integers: bool) -> int:
    """The same of codes in groups for which there is a fast kernel.

    Args:
        dtype: of the rows.
        integers: the kernel multiplies integers.
    """
    if dtype != torch.bfloat16 or type_for_many() != torch.bfloat16:
        return sys.maxsize
    return _INTEGERS_FROM if integers else _OTHERS_FROM


def outputs_at_a_time(inputs: int) -> int:
    """How many outputs of a weight a part shall have."""
    return max(1, _PART // (inputs * _WHOLE)) * _WHOLE


def multiply_by_parts(rows: torch.Tensor, outputs: int, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """`[rows, inputs]` -> `[rows, outputs]`, in the type of `rows`.

    Args:
        parts: of the weight, one below the other, each `[some outputs, inputs]`, in the type in which to multiply; one
            is used before the next is asked for.
    """
    products = rows.new_empty(len(rows), outputs)
    begin = 0
    for part in parts:
        rows = rows.to(part.dtype)
        products[:, begin : begin + len(part)] = linear(rows, part)
        begin += len(part)
    return products


_HALF_MAX = torch.finfo(torch.float16).max
_PACKED_ROWS, _PACKED_COLUMNS = 512, 16
"""fbgemm packs in tiles of so many inputs and outputs, and pads to whole tiles."""


class ConvertedFloat(WeightForm):
    """Stored in a float type and converted at every call: correct on every device, fast on none."""

    stored: ClassVar[torch.dtype]

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", weight)

    @classmethod
    def bytes_for(cls, outputs: int, inputs: int) -> int:
        return outputs * inputs * cls.stored.itemsize

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self | None:
        if not bool(weight.abs().max() <= torch.finfo(cls.stored).max):  # nor if it is not a number
            return None
        return cls(weight.to(cls.stored, copy=True))

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows, self.dequantised(rows.dtype))

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return _as(self.weight, dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        outputs = outputs_at_a_time(self.weight.shape[1]) if self.weight.device.type == "cpu" else len(self.weight)
        return (_as(part, dtype) for part in self.weight.split(outputs))


class ConvertedFloat16(ConvertedFloat):
    """float16, converted at every call."""

    stored = torch.float16


class ConvertedBfloat16(ConvertedFloat):
    """bfloat16, converted at every call."""

    stored = torch.bfloat16


class _Compiled(ConvertedFloat):
    """For splitnet's kernel, which multiplies and sums in float32."""

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self | None:
        held = super().of(weight)
        if held is not None:
            room = in_large_pages(len(weight), weight.shape[1] * cls.stored.itemsize).view(cls.stored)
            held.weight = room.copy_(held.weight)
        return held

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) < FLOATS_FROM:
            return multiply_floats(rows, self.weight)
        outputs, inputs = self.weight.shape
        parts = (_as(part, rows.dtype) for part in self.weight.split(outputs_at_a_time(inputs)))
        return multiply_by_parts(rows, outputs, parts)


def _as(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another type. From one half precision to the other, torch's loops for CPUs are eight times slower than two."""
    halves = weight.dtype != dtype and weight.element_size() == dtype.itemsize
    return weight.float().to(dtype) if halves else weight.to(dtype)


class CompiledFloat16(_Compiled, ConvertedFloat16):
    """float16 for splitnet's kernel."""


class CompiledBfloat16(_Compiled, ConvertedBfloat16):
    """bfloat16 for splitnet's kernel."""


class NarrowFloat(WeightForm):
    """For float32 weights: what it makes is `CompiledBfloat16` or `CompiledFloat16`, exact if one of them can be."""

    @classmethod
    def bytes_for(cls, outputs: int, inputs: int) -> int:
        return CompiledFloat16.bytes_for(outputs, inputs)

    @classmethod
    def of(cls, weight: torch.Tensor) -> WeightForm | None:
        for form in (CompiledBfloat16, CompiledFloat16):
            # Most weights are told by their first row.
            if all(torch.equal(part.to(form.stored).float(), part) for part in (weight[:1], weight)):
                held = form.of(weight)
                if held is not None:
                    held.exact = True
                return held
        return CompiledFloat16.of(weight)


class ConvertedFloat32(ConvertedFloat):
    """float32: for layers whose values are too large for the form that was wished."""

    stored = torch.float32
    exact = True


class PackedFloat16(WeightForm):
    """float16 in fbgemm's tiles: read as float16 and multiplied in float32. For x86 CPUs with AVX2."""

    def __init__(self, packed: Any, outputs: int, inputs: int) -> None:
        super().__init__()
        self._packed = packed
        self._bytes = self.bytes_for(outputs, inputs)

    @classmethod
    def fits(cls, outputs: int, inputs: int) -> bool:
        return cls.bytes_for(outputs, inputs) < outputs * inputs * torch.float32.itemsize

    @classmethod
    def bytes_for(cls, outputs: int, inputs: int) -> int:
        tiles = -(-inputs // _PACKED_ROWS) * -(-outputs // _PACKED_COLUMNS)
        return tiles * _PACKED_ROWS * _PACKED_COLUMNS * torch.float16.itemsize

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self | None:
        if not bool(weight.abs().max() <= _HALF_MAX):  # fbgemm would cut larger ones off
            return None
        return cls(torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None), *weight.shape)

    @property
    def untracked_bytes(self) -> int:
        return self._bytes

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(rows.float(), self._packed).to(rows.dtype)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self._packed)[0].to(dtype)
