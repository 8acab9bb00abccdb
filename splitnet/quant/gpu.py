"""Weights in the layouts of torch's own kernels for GPUs, in place of weights that every call converts to floats.

Which kernels exist depends on the device, on torch and on sizes, and some could not be tested here. So each form is
tested on its device when it is made: its products must equal the plain products with the same weight, and be faster. If
not, the layer stays as it was, and the log gives the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from splitnet.errors import first_line
from splitnet.quant.device import milliseconds
from splitnet.quant.forms import INT8, ScaledForm, WeightForm
from splitnet.quant.grouped import BlockQuantWeight
from splitnet.quant.linear import QuantizedLinear
from splitnet.quant.packed_tensor import CodeLayout, Codes, ScaleFormat, number_of, unpack_nibbles

log = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Maximum error of products, relative to their norm: rows, scales and sums are rounded to bfloat16, each by at most
2^-9. A wrong order of weights causes an error of about 1."""

# Rows from which int4 is converted to floats: torch's kernel reads the weight again for every 16 rows.
INT4_MANY = 64
_PROOF_ROWS, _TIMED_CALLS = 33, 10
_GROUPS = (256, 128, 64, 32)  # inputs that may share a scale in torch's kernels for int4
_BLOCKS = ((8, 128), (8, 64), (8, 32), (16, 128), (16, 64), (16, 32), (1, 16), (64, 1), (32, 1), (16, 1))
"""Outputs and inputs of the blocks in which kernels may order int4: blocks of CUDA, ROCm, MPS and CPUs."""

_PROBED = 128, 256
_FP8_LARGEST = 448.0
_INT16 = 32512.0  # 127 * 256: the largest number in a row that is split into two int8 parts
_INT8_ROWS, _INT8_MULTIPLE = 32, 8  # `torch._int_mm` takes no fewer than 17 rows on CUDA


class DeviceInt4(WeightForm):
    """Four bits, multiplied in bfloat16 (on MPS in the type that blocks compute in), with scales and zeros rounded to
    that type."""

    def __init__(self, packed: Tensor, scales_and_zeros: Tensor, blocks: _Blocks) -> None:
        super().__init__()
        self.packed: Tensor
        self.scales_and_zeros: Tensor
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", scales_and_zeros)  # [groups, outputs, 2]
        self._blocks = blocks
        self.outputs = scales_and_zeros.shape[1]
        self.inputs = packed.nbytes * 2 // self.outputs
        self._group = self.inputs // len(scales_and_zeros)

    @classmethod
    def candidates(cls, layout: CodeLayout, codes: Codes, dtype: torch.dtype) -> Iterator[Self]:
        """Ways to hold a weight for blocks that compute in `dtype`, the likeliest first; none if the format is for
        other weights. Raises RuntimeError if torch has no such kernel for this device, these sizes or this type."""
        device = codes.codes.device
        outputs, inputs = codes.codes.shape
        group = layout.group or next((size for size in _GROUPS if inputs % size == 0), 0)
        if layout.bits != 4 or layout.table or group not in _GROUPS or inputs % group or outputs % 16:
            return
        if device.type != "mps":
            if dtype == torch.float32:
                return  # float32 blocks keep more precision of the rows than the kernel does
            dtype = torch.bfloat16
        scales = number_of(layout.scale, codes.scales, codes.scale_units, layout.group or inputs)
        if layout.zero is ScaleFormat.CODES:
            assert codes.zeros is not None
            zeros = (8 - codes.zeros.float()) * scales
        else:
            zeros = (8 - layout.offset) * scales
            if codes.zeros is not None:
                zeros = zeros + number_of(layout.zero, codes.zeros, codes.zero_units, layout.group or inputs)
        both = torch.stack((scales, zeros), dim=-1).to(dtype)
        both = both.expand(-1, inputs // group, -1).transpose(0, 1).contiguous()
        width = next(size for size in (8, 4, 2) if inputs % (16 * size) == 0)
        for even_first in (True, False):
            blocks = _Blocks.of(device, width, even_first)
            if blocks is None:
                raise RuntimeError("its kernel orders weights in an unknown way")
            if outputs % blocks.outputs == 0 and inputs % blocks.inputs == 0:
                yield cls(_pack_int4(codes.codes, width, even_first), both, blocks)

    def multiply(self, rows: Tensor) -> Tensor:
        dtype = self.scales_and_zeros.dtype
        if len(rows) >= INT4_MANY:
            return linear(rows, self.dequantised(rows.dtype))
        aten: Any = torch.ops.aten
        kernel = aten._weight_int4pack_mm_for_cpu if rows.device.type == "cpu" else aten._weight_int4pack_mm
        return kernel(rows.to(dtype).contiguous(), self.packed, self._group, self.scales_and_zeros).to(rows.dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        steps = self._blocks.unpacked(self.packed, self.outputs, self.inputs).to(dtype).sub_(8)
        scales, zeros = self.scales_and_zeros.permute(2, 1, 0).to(dtype)[..., None]
        return steps.view(self.outputs, -1, self._group).mul_(scales).add_(zeros).view(self.outputs, self.inputs)


class _Blocks:
    """The order in which a kernel stores weights of four bits. It is the same in all blocks of `outputs` by `inputs`
    weights; `places` gives the half byte of each weight."""

    def __init__(self, outputs: int, inputs: int, places: Tensor) -> None:
        self.outputs, self.inputs = outputs, inputs
        self._places = places

    @classmethod
    @cache
    def of(cls, device: torch.device, width: int, even_first: bool) -> _Blocks | None:
        """Finds the order by packing known numbers; None: the order is unknown."""
        outputs, inputs = _PROBED
        for high, wide in _BLOCKS:
            within = torch.arange(high * wide, device=device).view(high, wide)
            local = within.repeat(outputs // high, inputs // wide)
            number = torch.arange(outputs * inputs // (high * wide), device=device).view(outputs // high, -1)
            block = number.repeat_interleave(high, 0).repeat_interleave(wide, 1)
            found, blocks = (
                sum(
                    _codes_in(_pack_int4((numbers >> 4 * digit & 15).to(torch.uint8), width, even_first)).long()
                    << 4 * digit
                    for digit in range(3)
                ).view(-1, high * wide)  # pyright: ignore[reportAttributeAccessIssue]
                for numbers in (local, block)
            )
            in_order = torch.equal(blocks, number.view(-1, 1).expand_as(blocks))
            if in_order and torch.equal(found, found[:1].expand_as(found)):
                places = found[0].argsort()
                if torch.equal(found[0][places], within.flatten()):
                    return cls(high, wide, places)
        return None

    def unpacked(self, packed: Tensor, outputs: int, inputs: int) -> Tensor:
        """`[outputs, inputs]`, uint8."""
        blocks = _codes_in(packed).view(-1, self.outputs * self.inputs)[:, self._places]
        blocks = blocks.view(outputs // self.outputs, inputs // self.inputs, self.outputs, self.inputs)
        return blocks.transpose(1, 2).reshape(outputs, inputs)


def _codes_in(packed: Tensor) -> Tensor:
    return unpack_nibbles(packed.flatten().view(torch.uint8))


def _pack_int4(codes: Tensor, width: int, even_first: bool) -> Tensor:
    aten: Any = torch.ops.aten
    if codes.device.type == "cpu":
        return aten._convert_weight_to_int4pack_for_cpu(codes.int(), width)
    upper, lower = (codes[:, ::2], codes[:, 1::2]) if even_first else (codes[:, 1::2], codes[:, ::2])
    return aten._convert_weight_to_int4pack((upper << 4 | lower).contiguous(), width)


class DeviceInt8(ScaledForm):
    """int8 codes, multiplied as integers; rows have 16 bits in two parts. On MPS rows are not converted."""

    @classmethod
    def candidates(cls, layout: CodeLayout, codes: Codes, dtype: torch.dtype) -> Iterator[Self]:
        """As `DeviceInt4.candidates`."""
        if layout != INT8 or codes.codes.shape[0] % 8 or codes.codes.shape[1] % 8:
            return
        yield cls((codes.codes.short() - INT8.offset).to(torch.int8), codes.scales[:, 0].contiguous())

    def multiply(self, rows: Tensor) -> Tensor:
        if rows.device.type == "mps":
            return torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.codes, self.scales.to(rows.dtype))
        count = len(rows)
        given = rows.float()
        steps = given.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).div_(_INT16)
        whole = (given / steps).round_().int()
        upper = whole + 128 >> 8
        parts = torch.cat((upper, whole - (upper << 8))).to(torch.int8)
        short = max(_INT8_ROWS - len(parts), -len(parts) % _INT8_MULTIPLE)
        aten: Any = torch.ops.aten
        sums = aten._int_mm(pad(parts, (0, 0, 0, short)), self.codes.t())
        products = torch.add(sums[count : 2 * count].float(), sums[:count].float(), alpha=256)
        return products.mul_(steps).mul_(self.scales).to(rows.dtype)


class DeviceFp8(ScaledForm):
    """E4M3 codes, multiplied as E4M3. Each number of a row becomes the sum of two E4M3 numbers, which have eight bits
    together."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes, scales)
        self.register_buffer("one", torch.ones((), dtype=torch.float32, device=codes.device))
        self.one: Tensor

    @classmethod
    def candidates(cls, layout: CodeLayout, codes: Codes, dtype: torch.dtype) -> Iterator[Self]:
        """As `DeviceInt4.candidates`."""
        outputs, inputs = codes.codes.shape
        if layout.table != "e4m3" or layout.group or codes.zeros is not None or outputs % 16 or inputs % 16:
            return
        scales = number_of(layout.scale, codes.scales, codes.scale_units, inputs)[:, 0].contiguous()
        yield cls(codes.codes.contiguous().view(torch.float8_e4m3fn), scales)

    def multiply(self, rows: Tensor) -> Tensor:
        count = len(rows)
        given = rows.float()
        steps = given.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).div_(_FP8_LARGEST)
        given = given / steps
        upper = given.to(torch.float8_e4m3fn)
        # The remainder is at most a sixteenth, where E4M3 has fewer bits, so it is multiplied by 16.
        lower = given.sub_(upper.float()).mul_(16).to(torch.float8_e4m3fn)
        both = torch.cat((upper.view(torch.uint8), lower.view(torch.uint8))).view(torch.float8_e4m3fn)
        aten: Any = torch.ops.aten
        sums = aten._scaled_mm(both, self.codes.t(), self.one, self.one, out_dtype=torch.float32)
        products = torch.add(sums[:count], sums[count:], alpha=1 / 16)
        return products.mul_(steps).mul_(self.scales).to(rows.dtype)


FORMS: tuple[type[DeviceInt4 | DeviceInt8 | DeviceFp8], ...] = (DeviceInt4, DeviceInt8, DeviceFp8)


def use_device_kernels(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes linear layers of a model on a GPU use its kernels where these are correct and faster. `dtype`: the type
    that the model computes in."""
    holders = [module.held for module in model.modules() if isinstance(getattr(module, "held", None), WeightForm)]
    counts = {id(held): sum(other is held for other in holders) for held in holders}
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear) and counts[id(held := layer.held)] == 1 and _on_gpu(layer):
            made = device_form(held, dtype)
            if made is not None and _is_faster(made, held, layer.in_features, layer.parameter_like.device, dtype):
                layer.held = made


def _on_gpu(layer: QuantizedLinear) -> bool:
    return layer.parameter_like.device.type != "cpu"


def device_form(held: WeightForm, dtype: torch.dtype) -> WeightForm | None:
    """A form of these codes that a kernel of their device multiplies correctly; None: there is none."""
    found = _codes_of(held)
    if found is None:
        return None
    layout, codes = found
    for form in FORMS:
        fault = None
        try:
            for made in form.candidates(layout, codes, dtype):
                if (fault := fault_of(made, codes.to_floats(layout), dtype)) is None:
                    return made
        except (RuntimeError, AttributeError) as error:  # there is no kernel, or too little memory to try it
            fault = first_line(error)
        if fault is not None:
            _warn(form.__name__.removeprefix("Device").lower(), codes.codes.device, fault)
    return None


def fault_of(made: WeightForm, weight: Tensor, dtype: torch.dtype) -> str | None:
    """The first error in products of a form of `weight`, `[outputs, inputs]` float32; None: there is none."""
    noise = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROOF_ROWS, weight.shape[1], generator=noise).to(weight.device, dtype)
    expected = linear(rows.float(), weight)
    trials = {
        "one row": (made.multiply(rows[:1]), expected[:1]),
        "some rows": (made.multiply(rows), expected),
        "many rows": (made.multiply(rows.repeat(4, 1))[-_PROOF_ROWS:], expected),
        "the weight itself": (made.dequantised(dtype), weight),
    }
    for name, (got, exact) in trials.items():
        away, size = float((got.float() - exact).norm()), float(exact.norm())
        if not away <= TOLERANCE * size:  # also true if the error is NaN
            return f"{name}: the product is off by {away:.3g} of {size:.3g}"
    return None


def _codes_of(held: WeightForm) -> tuple[CodeLayout, Codes] | None:
    if isinstance(held, BlockQuantWeight):
        return held.layout, held.order.unpacked(held.tiles).of_outputs(slice(held.outputs))
    if type(held) is ScaledForm:
        return INT8, Codes((held.codes.short() + INT8.offset).to(torch.uint8), held.scales[:, None])
    return None


def _is_faster(made: WeightForm, held: WeightForm, inputs: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of one row is faster with `made`; measured once for each shape."""
    shape = (type(made).__name__, sum(tensor.nbytes for tensor in made.buffers()), inputs, device, dtype)
    if shape not in _faster:
        row = torch.ones(1, inputs, device=device, dtype=dtype)
        after, before = _ms(made, row), _ms(held, row)
        _faster[shape] = after < before
        text = "%s on %s, a row of %d inputs: %.3f ms, %.3f ms if converted at every call"
        log.info(text, type(made).__name__, device, inputs, after, before)
    return _faster[shape]


_faster: dict[tuple[object, ...], bool] = {}


def _ms(form: WeightForm, row: Tensor) -> float:
    return milliseconds(row.device, lambda: [form.multiply(row) for _ in range(_TIMED_CALLS)], 3) / _TIMED_CALLS


@cache
def _warn(kind: str, device: torch.device, fault: str) -> None:
    log.warning("%s on %s is converted at every call, as torch's kernel cannot be used: %s", kind, device, fault)
