"""Weights held as floats of a narrower type, and from how many rows on weights of other forms become floats."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Self

import torch
from torch.nn.functional import linear

from splitnet.quant.memory import in_large_pages
from splitnet.quant.native import has_fast_kernels, has_float_kernels, has_kernel_for, multiply_floats
from splitnet.quant.weight_form import WeightForm

FLOATS_FROM = 64
"""Rows from which this is faster than splitnet's kernel for the form; so for those below."""

PLAIN_LOOPS_FROM = 24
"""The kernels for any CPU."""

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


class FloatForm(WeightForm):
    """Numbers of a float type, `[outputs, inputs]`.

    On CPUs for which there are kernels, few rows are multiplied with 16 bits as they are, and summed in float32. Else
    the weight is converted at every call: correct on every device, fast on none.

    Args:
        exact: whether no value was rounded.
    """

    def __init__(self, weight: torch.Tensor, *, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.weight: torch.Tensor
        self.register_buffer("weight", weight)

    @classmethod
    def of(cls, weight: torch.Tensor, dtype: torch.dtype, *, exact: bool = False) -> Self | None:
        """A copy of a weight as numbers of `dtype`; None: a value is out of its range, or no number."""
        if not bool(weight.abs().max() <= torch.finfo(dtype).max):
            return None
        if weight.device.type != "cpu" or not has_float_kernels():
            return cls(weight.to(dtype, copy=True), exact=exact)
        room = in_large_pages(len(weight), weight.shape[1] * dtype.itemsize).view(dtype)
        return cls(room.copy_(weight), exact=exact)

    @classmethod
    def narrowest(cls, weight: torch.Tensor) -> Self | None:
        """A float32 weight as bfloat16 or float16 if one of them is exact, else as float16; None as in `of`."""
        for dtype in (torch.bfloat16, torch.float16):
            # Most weights are told by their first row.
            if all(torch.equal(part.to(dtype).float(), part) for part in (weight[:1], weight)):
                return cls.of(weight, dtype, exact=True)
        return cls.of(weight, torch.float16)

    @property
    def alone_as_together(self) -> bool:
        return self.weight.dtype.itemsize == 2 and has_kernel_for(self.weight)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) < FLOATS_FROM and self.alone_as_together:
            return multiply_floats(rows, self.weight)
        if self.weight.dtype == rows.dtype or rows.device.type != "cpu":
            return linear(rows, self.dequantised(rows.dtype))
        return multiply_by_parts(rows, len(self.weight), self.pieces(rows.dtype))

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return _as(self.weight, dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        outputs = outputs_at_a_time(self.weight.shape[1]) if self.weight.device.type == "cpu" else len(self.weight)
        return (_as(part, dtype) for part in self.weight.split(outputs))


def _as(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another type. From one half precision to the other, torch's loops for CPUs are eight times slower than two."""
    halves = weight.dtype != dtype and weight.element_size() == dtype.itemsize
    return weight.float().to(dtype) if halves else weight.to(dtype)
