"""Formats in which the weight of a linear layer may be held: floats of a narrower type, int8 and int4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from splitnet.quant.device import in_large_pages
from splitnet.quant.native import has_float_kernels, has_kernel_for, multiply_floats
from splitnet.quant.packed_tensor import CodeLayout, Codes, ScaleFormat

# Rows from which torch's product with floats is faster than splitnet's kernel for 16-bit floats.
FLOATS_FROM = 64
PLAIN_LOOPS_FROM = 24  # the same for the plain loops, which run on any CPU
# Weights of a part; its outputs are a multiple of the second number, the outputs that mkldnn computes at a time.
_PART, _WHOLE = 2**20, 64


@cache
def type_for_many() -> torch.dtype:
    """The type in which this CPU multiplies many rows faster: bfloat16 if it has instructions for it, else float32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def outputs_at_a_time(inputs: int) -> int:
    """The number of outputs in one part of a weight with `inputs` inputs."""
    return max(1, _PART // (inputs * _WHOLE)) * _WHOLE


def multiply_by_parts(rows: Tensor, outputs: int, parts: Iterable[Tensor]) -> Tensor:
    """`[rows, inputs]` -> `[rows, outputs]`, in the type of `rows`. `parts` gives the weight as tensors `[some outputs,
    inputs]`, in order, each in the type in which it is multiplied."""
    products = rows.new_empty(len(rows), outputs)
    begin = 0
    for part in parts:
        rows = rows.to(part.dtype)
        products[:, begin : begin + len(part)] = linear(rows, part)
        begin += len(part)
    return products


class WeightForm(nn.Module):
    """A frozen weight `[outputs, inputs]`. Its tensors are buffers, so that they follow the model to its device; the
    buffers are persistent, because transformers initialises other buffers anew after loading."""

    exact: bool = False  # whether the held weight equals the values from which it was made

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row in a product of few rows has the same result whichever other rows are in the product."""
        return False

    def multiply(self, rows: Tensor) -> Tensor:
        """`[rows, inputs]` -> `[rows, outputs]`, in the type of `rows`; records nothing for gradients."""
        raise NotImplementedError

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers, `[outputs, inputs]`: a new tensor at every call."""
        raise NotImplementedError

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The same in pieces `[some outputs, inputs]`, in order. A piece is valid until the next piece is requested.

        The pieces are small where the format can be converted to floats in parts.
        """
        yield self.dequantised(dtype)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """Gradient of `multiply` with respect to the rows: `[rows, outputs]` -> `[rows, inputs]`, in the type of
        `gradient`."""
        found: Tensor | None = None
        begin = 0
        for piece in self.pieces(gradient.dtype):
            product = gradient[:, begin : begin + len(piece)] @ piece
            found = product if found is None else found.float().add_(product)
            begin += len(piece)
        assert found is not None
        return found.to(gradient.dtype)


class FloatForm(WeightForm):
    """Numbers of a float type, `[outputs, inputs]`; `exact`: no value was rounded.

    Kernels for CPUs multiply few rows with the 16-bit numbers directly, and sum in float32. In other cases the weight
    is converted at every call, which is correct on every device and fast on none.
    """

    def __init__(self, weight: Tensor, *, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.weight: Tensor
        self.register_buffer("weight", weight)

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype, *, exact: bool = False) -> Self | None:
        """A copy of a weight as numbers of `dtype`; None: a value is out of the type's range, or NaN."""
        if not bool(weight.abs().max() <= torch.finfo(dtype).max):
            return None
        if weight.device.type != "cpu" or not has_float_kernels():
            return cls(weight.to(dtype, copy=True), exact=exact)
        room = in_large_pages(len(weight), weight.shape[1] * dtype.itemsize).view(dtype)
        return cls(room.copy_(weight), exact=exact)

    @classmethod
    def narrowest(cls, weight: Tensor) -> Self | None:
        """A float32 weight as bfloat16 or float16 if one of them is exact, else as float16; None as in `of`."""
        for dtype in (torch.bfloat16, torch.float16):
            # For most weights, the first row shows whether the type is exact.
            if all(torch.equal(part.to(dtype).float(), part) for part in (weight[:1], weight)):
                return cls.of(weight, dtype, exact=True)
        return cls.of(weight, torch.float16)

    @property
    def rows_are_independent(self) -> bool:
        return self.weight.dtype.itemsize == 2 and has_kernel_for(self.weight)

    def multiply(self, rows: Tensor) -> Tensor:
        if len(rows) < FLOATS_FROM and self.rows_are_independent:
            return multiply_floats(rows, self.weight)
        if self.weight.dtype == rows.dtype or rows.device.type != "cpu":
            return linear(rows, self.dequantised(rows.dtype))
        return multiply_by_parts(rows, len(self.weight), self.pieces(rows.dtype))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return _as(self.weight, dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        return (_as(part, dtype) for part in _split(self.weight))


def _split(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(outputs_at_a_time(weight.shape[1]) if weight.device.type == "cpu" else len(weight))


def _as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts to another type. From float16 to bfloat16 or back, two conversions through float32 are eight times
    faster than one on CPUs."""
    halves = weight.dtype != dtype and weight.element_size() == dtype.itemsize
    return weight.float().to(dtype) if halves else weight.to(dtype)


# Inputs of int4 that share a scale and a zero; larger groups would save little memory and lose more precision.
GROUP = 32
_MIDDLE, _LARGEST_INT4, _LARGEST_INT8 = 8, 15, 127
_SCALE = torch.bfloat16

INT4 = CodeLayout(4, GROUP, ScaleFormat.BFLOAT16, ScaleFormat.BFLOAT16, offset=_MIDDLE)
INT8 = CodeLayout(8, 0, ScaleFormat.BFLOAT16, offset=128)


class ScaledForm(WeightForm):
    """Codes `[outputs, inputs]` of eight bits, and a scale for each output, `[outputs]`.

    Every call converts the weight to the type of the rows; see `splitnet.quant.gpu` for kernels of GPUs.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """A weight as int8 with scales in bfloat16; None if not all values are finite."""
        largest = weight.abs().amax(dim=1)
        if not bool(torch.isfinite(largest).all()):
            return None
        # The codes are computed with the stored, rounded scale: otherwise its rounding would stretch the whole row.
        scales = (largest / _LARGEST_INT8).clamp_(min=torch.finfo(_SCALE).tiny).to(_SCALE)
        codes = (weight / scales.float()[:, None]).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
        return cls(codes.to(torch.int8), scales)

    def multiply(self, rows: Tensor) -> Tensor:
        return linear(rows, self.dequantised(rows.dtype))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype).mul_(self.scales.to(dtype)[:, None])

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        begin = 0
        for codes in _split(self.codes):
            yield codes.to(dtype).mul_(self.scales[begin : begin + len(codes)].to(dtype)[:, None])
            begin += len(codes)


def integer_codes(weight: Tensor, layout: CodeLayout) -> Codes | None:
    """The codes of a weight `[outputs, inputs]`, float32, in `INT4` or `INT8`; None if not all values are finite."""
    if layout == INT4:
        return _int4_codes(weight)
    held = ScaledForm.of(weight)
    if held is None:
        return None
    return Codes((held.codes.short() + INT8.offset).to(torch.uint8).cpu(), held.scales[:, None].cpu())


def _int4_codes(weight: Tensor) -> Codes | None:
    outputs, inputs = weight.shape
    values = weight.view(outputs, inputs // GROUP, GROUP)
    low, high = values.amin(-1), values.amax(-1)
    if not bool(torch.isfinite(high - low).all()):
        return None
    # The codes are computed with scale and zero as they are stored, after rounding.
    scales = ((high - low) / _LARGEST_INT4).clamp_(min=torch.finfo(_SCALE).tiny).to(_SCALE)
    zeros = (low + _MIDDLE * scales.float()).to(_SCALE)
    codes = (values - zeros.float()[..., None]).div_(scales.float()[..., None]).add_(_MIDDLE)
    codes = codes.round_().clamp_(0, _LARGEST_INT4).to(torch.uint8).view(outputs, inputs)
    return Codes(codes.cpu(), scales.cpu(), zeros.cpu())
