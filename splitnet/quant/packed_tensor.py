"""Weights that a checkpoint stores in few bits: codes and their meaning.

For code that loads a model, a `PackedTensor` is a tensor with a shape and a type. The operations of transformers while
it loads (rename, stack experts, join gates with up projections, transpose) keep the codes. Other operations convert it
to floats, which is correct but larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor

from splitnet.errors import UnsupportedModel

# Inputs that share a float16 number, the unit of the steps of `ScaleFormat.STEPS`.
STEPS_GROUP = 256


class ScaleFormat(Enum):
    """How the scales (or zeros) of groups are stored."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    E8M0 = "e8m0"  # uint8: 2^(byte - 127), from the OCP Microscaling Formats specification 1.0, section 5.4.1
    STEPS = "steps"  # an integer of 8 bits, times a float16 number for every `STEPS_GROUP` inputs, as in GGML
    CODES = "codes"  # zeros only: the code of zero, uint8, as in GPTQ and AWQ
    NONE = "none"  # zeros only


@dataclass(frozen=True)
class CodeLayout:
    """The meaning of the codes of a weight `[outputs, inputs]`: `value(code) * scale(group) + zero(group)`.

    Attributes:
        bits: bits of a code: 2, 3, 4, 5, 6 or 8.
        group: inputs that share a scale and a zero: 16, 32, 64 and so on; 0: all inputs of an output.
        scale: kind of the scales.
        zero: kind of the zeros; with `ScaleFormat.CODES` the formula is `(value(code) - value(zero)) * scale`.
        table: name in `TABLES` of the values of codes; "": the value is `code - offset`.
        offset: the code of the value 0 without a table.
    """

    bits: int
    group: int
    scale: ScaleFormat
    zero: ScaleFormat = ScaleFormat.NONE
    table: str = ""
    offset: int = 0

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a weight in this layout without padding."""
        groups = -(-inputs // self.group) if self.group else 1
        sizes = {
            ScaleFormat.FLOAT16: 2,
            ScaleFormat.BFLOAT16: 2,
            ScaleFormat.FLOAT32: 4,
            ScaleFormat.E8M0: 1,
            ScaleFormat.STEPS: 1,
            ScaleFormat.CODES: 1,
        }
        each = sum(groups * sizes.get(kind, 0) for kind in (self.scale, self.zero))
        each += sum(2 * -(-inputs // STEPS_GROUP) for kind in (self.scale, self.zero) if kind is ScaleFormat.STEPS)
        return outputs * each + -(-outputs * inputs * self.bits // 8)


def _floats(values: Sequence[float]) -> Tensor:
    # The type is named because torch's default may differ during the import.
    return torch.tensor(values, dtype=torch.float32)


def _floats_of_bytes(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


TABLES: dict[str, Tensor] = {
    # E2M1 of the OCP Microscaling Formats specification 1.0, section 5.3.3.
    "e2m1": _floats([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
    "e4m3": _floats_of_bytes(torch.float8_e4m3fn),
    "e5m2": _floats_of_bytes(torch.float8_e5m2),
    # `kvalues_iq4nl` of GGML.
    "iq4_nl": _floats([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]),
    # Dettmers et al., "QLoRA", arXiv:2305.14314, appendix E.
    "nf4": _floats(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
            *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
            *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
            *(0.7229568362236023, 1.0),
        ]
    ),
}
"""The values of codes, by name of the table."""


@dataclass(frozen=True)
class Codes:
    """The tensors of one weight; all have the outputs as their first dimension.

    Attributes:
        codes: `[outputs, inputs]`, uint8.
        scales: `[outputs, groups]`, in the type of the layout's kind; steps are int8 or uint8.
        zeros: as `scales`; None if the layout has none. With steps, the summand is `steps * zero_units`.
        scale_units, zero_units: `[outputs, inputs / STEPS_GROUP]`, float16, where scales or zeros are steps.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    scale_units: Tensor | None = None
    zero_units: Tensor | None = None

    def of_outputs(self, outputs: Tensor | slice) -> Codes:
        """The codes of some outputs, in the given order."""
        some: dict[str, Any] = {name: one if one is None else one[outputs] for name, one in vars(self).items()}
        return Codes(**some)

    @staticmethod
    def joined(parts: Sequence[Codes]) -> Codes:
        """Joins weights of the same layout along the outputs."""
        given: Any = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
        whole: Any = {name: None if some[0] is None else torch.cat(some) for name, some in given.items()}
        return Codes(**whole)

    def to_floats(self, layout: CodeLayout) -> Tensor:
        """The weight as numbers: `[outputs, inputs]`, float32."""
        inputs = self.codes.shape[1]
        table = TABLES[layout.table].to(self.codes.device) if layout.table else None
        values = self.codes.float() - layout.offset if table is None else table[self.codes.long()]
        group = layout.group or inputs
        scales = spread(number_of(layout.scale, self.scales, self.scale_units, group), group, inputs)
        if self.zeros is None:
            return values.mul_(scales)
        if layout.zero is ScaleFormat.CODES:
            return values.sub_(spread(self.zeros.float() - layout.offset, group, inputs)).mul_(scales)
        zeros = number_of(layout.zero, self.zeros, self.zero_units, group)
        return values.mul_(scales).add_(spread(zeros, group, inputs))


def number_of(kind: ScaleFormat, stored: Tensor, units: Tensor | None, group: int) -> Tensor:
    """Scales or zeros, `stored` and `units` as in `Codes`, as float32, `[outputs, groups]`; `group`: inputs per
    group."""
    if kind is ScaleFormat.E8M0:
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - 127)
    if kind is ScaleFormat.STEPS:
        assert units is not None
        return stored.float() * spread(units.float(), STEPS_GROUP // group, stored.shape[1])
    return stored.float()


def spread(values: Tensor, length: int, count: int, dim: int = 1) -> Tensor:
    """Repeats each value `length` times along a dimension, to `count` numbers; the last value may be repeated fewer
    times. `count` also bounds `length`, which comes from a file. Raises UnsupportedModel if the number of values does
    not fit."""
    length = max(1, min(length, count))
    if values.shape[dim] != -(-count // length):
        raise UnsupportedModel(
            f"{values.shape[dim]} scales do not fit {count} numbers, {length} per scale: download the model again"
        )
    return values.repeat_interleave(length, dim).narrow(dim, 0, count)


def _order_of_runs(index: Tensor, length: int) -> Tensor | None:
    """The order of runs of `length` numbers in an order of single numbers; None if a run is split."""
    if len(index) % length:
        return None
    runs = index.view(-1, length)
    first = runs[:, :1]
    whole = (first % length == 0).all() and torch.equal(runs, first + torch.arange(length))
    return first.flatten() // length if whole else None


class StoredMatrix:
    """One weight `[outputs, inputs]` of a checkpoint, or some of its outputs; `shape` is the two numbers.

    `read` reads the matrix's codes, in `layout`. Each use calls `read` again, because codes are not kept.
    """

    def __init__(self, layout: CodeLayout, shape: tuple[int, int], read: Callable[[], Codes]) -> None:
        self.layout, self.shape, self.read = layout, shape, read

    def of_outputs(self, outputs: Tensor | slice) -> StoredMatrix:
        """The matrix with some of its outputs, in the given order."""
        count = len(range(self.shape[0])[outputs]) if isinstance(outputs, slice) else len(outputs)
        return StoredMatrix(self.layout, (count, self.shape[1]), lambda: self.read().of_outputs(outputs))

    def of_inputs(self, inputs: Tensor) -> StoredMatrix | None:
        """The matrix with its inputs in another order; None if this order would separate inputs that share a scale.

        Steps whose `STEPS_GROUP` inputs are separated become float32 numbers of the same value.
        """
        group = self.layout.group or self.shape[1]
        order = _order_of_runs(inputs, group)
        if order is None:
            return None
        layout, units = self.layout, None
        if ScaleFormat.STEPS in (layout.scale, layout.zero):
            units = _order_of_runs(inputs, STEPS_GROUP)
            if units is None:
                zero = ScaleFormat.FLOAT32 if layout.zero is ScaleFormat.STEPS else layout.zero
                layout = replace(layout, scale=ScaleFormat.FLOAT32, zero=zero)

        def read() -> Codes:
            found = self.read()
            scales, zeros, *both_units = found.scales, found.zeros, found.scale_units, found.zero_units
            if layout != self.layout:
                scales = number_of(self.layout.scale, scales, found.scale_units, group)
                zeros = None if zeros is None else number_of(self.layout.zero, zeros, found.zero_units, group)
                both_units = [None, None]
            ordered = [None if some is None else some[:, units] for some in both_units]
            return Codes(found.codes[:, inputs], scales[:, order], None if zeros is None else zeros[:, order], *ordered)

        return StoredMatrix(layout, (self.shape[0], len(inputs)), read)

    def to_floats(self) -> Tensor:
        """`[outputs, inputs]`, float32."""
        return self.read().to_floats(self.layout)


class Experts(Sequence[tuple[StoredMatrix, ...]]):
    """The matrices of each expert. They are made on request, because a file may claim any number of experts."""

    def __init__(self, count: int, make: Callable[[int], Iterable[StoredMatrix]]) -> None:
        self._range, self._make = range(count), make

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[tuple[StoredMatrix, ...]]:
        return (tuple(self._make(expert)) for expert in self._range)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            some = self._range[index]
            return Experts(len(some), lambda expert: self._make(some[expert]))
        return tuple(self._make(self._range[index]))

    def each(self, change: Callable[[tuple[StoredMatrix, ...]], Iterable[StoredMatrix]]) -> Experts:
        """For each expert, the result of `change` for its matrices."""
        return Experts(len(self), lambda expert: change(self[expert]))


class PackedTensor(Tensor):
    """A weight in few bits that other code uses as a tensor of floats: `[outputs, inputs]`, or one per expert.

    Attributes:
        experts: for each expert (one if there are no experts), the matrices of its weight, in the order of their
            outputs.
        stacked: whether the first dimension of the tensor is experts.
        transposed: whether the tensor is `[..., inputs, outputs]`.
    """

    experts: Experts
    stacked: bool
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        experts: Sequence[Sequence[StoredMatrix]],
        *,
        stacked: bool = False,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> PackedTensor:
        first = experts[0]
        inputs = first[0].shape[1]
        outputs = sum(matrix.shape[0] for matrix in first)
        matrix_shape = (inputs, outputs) if transposed else (outputs, inputs)
        shape = (len(experts), *matrix_shape) if stacked else matrix_shape
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.experts = experts if isinstance(experts, Experts) else Experts(len(experts), experts.__getitem__)
        made.stacked, made.transposed = stacked, transposed
        return made

    @classmethod
    def of(cls, matrix: StoredMatrix, dtype: torch.dtype = torch.float32) -> PackedTensor:
        """One matrix as a tensor with the type `dtype`."""
        return cls.__new__(cls, [[matrix]], dtype=dtype)

    def to_floats(self) -> Tensor:
        """The weight as an ordinary tensor of its type."""
        made = torch.empty(self.shape, dtype=self.dtype)
        rows = made.transpose(-1, -2) if self.transposed else made
        # Matrices are converted one by one, so that only one is in float32.
        for expert, matrices in zip(rows if self.stacked else [rows], self.experts, strict=True):
            for part, matrix in zip(expert.split([matrix.shape[0] for matrix in matrices]), matrices, strict=True):
                part.copy_(matrix.to_floats())
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PackedTensor({list(self.shape)}, {self.dtype}, {self.experts[0][0].layout})"

    def _like(self, experts: Sequence[Sequence[StoredMatrix]], **changes: Any) -> PackedTensor:
        known = {"stacked": self.stacked, "transposed": self.transposed, "dtype": self.dtype}
        return PackedTensor.__new__(PackedTensor, experts, **(known | changes))

    def _outputs_dim(self) -> int:
        return self.ndim - (1 if self.transposed else 2)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kept = _KEEP.get(func.overloadpacket)
        result = kept(*args, **kwargs) if kept is not None else None
        if result is not None:
            return result

        def floats(value: Any) -> Any:
            if isinstance(value, PackedTensor):
                return value.to_floats()
            if isinstance(value, (list, tuple)):
                return type(value)(floats(one) for one in value)
            return value

        return func(*floats(tuple(args)), **{name: floats(value) for name, value in kwargs.items()})


def _same(tensor: PackedTensor, **options: Any) -> PackedTensor | None:
    return tensor._like(tensor.experts)


def _converted(tensor: PackedTensor, *, dtype: torch.dtype | None = None, **options: Any) -> PackedTensor | None:
    device = options.get("device")
    elsewhere = device is not None and torch.device(device).type != "cpu"
    if elsewhere or (dtype is not None and not dtype.is_floating_point):
        return None
    return tensor._like(tensor.experts, dtype=dtype or tensor.dtype)


def _transposed(tensor: PackedTensor, first: int = 0, second: int = 1) -> PackedTensor | None:
    if {first % tensor.ndim, second % tensor.ndim} != {tensor.ndim - 2, tensor.ndim - 1}:
        return None
    return tensor._like(tensor.experts, transposed=not tensor.transposed)


def _permuted(tensor: PackedTensor, order: Sequence[int]) -> PackedTensor | None:
    last = tensor.ndim - 1
    swapped = [*range(last - 1), last, last - 1]
    return _transposed(tensor, last, last - 1) if [dim % tensor.ndim for dim in order] == swapped else None


def _stacked(tensors: Sequence[Any], dim: int = 0) -> PackedTensor | None:
    stored = _alike(tensors)
    if stored is None or dim != 0 or stored[0].stacked:
        return None
    return stored[0]._like([one.experts[0] for one in stored], stacked=True)


def _joined(tensors: Sequence[Any], dim: int = 0) -> PackedTensor | None:
    stored = _alike(tensors)
    if stored is None:
        return None
    first = stored[0]
    dim %= first.ndim
    if dim == first._outputs_dim() and len({len(one.experts) for one in stored}) == 1:
        return first._like(
            Experts(len(first.experts), lambda expert: chain.from_iterable(one.experts[expert] for one in stored))
        )
    if first.stacked and dim == 0:
        return first._like([matrices for one in stored for matrices in one.experts])
    return None


def _alike(tensors: Sequence[Any]) -> list[PackedTensor] | None:
    """All tensors, if all are packed and have the same orientation."""
    stored = [tensor for tensor in tensors if isinstance(tensor, PackedTensor)]
    ways = {(one.stacked, one.transposed, one.experts[0][0].shape[1]) for one in stored}
    return stored if len(stored) == len(tensors) and len(ways) == 1 else None


def _sliced(
    tensor: PackedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> PackedTensor | None:
    dim %= tensor.ndim
    if tensor.stacked and dim == 0:
        return tensor._like(tensor.experts[slice(start, end, step)])
    if dim != tensor._outputs_dim():
        return None
    wanted = range(tensor.shape[dim])[slice(start, end, step)]
    if not wanted:
        return None
    return tensor._like(tensor.experts.each(lambda matrices: _outputs_of(matrices, wanted)))


def _outputs_of(matrices: Sequence[StoredMatrix], wanted: range) -> list[StoredMatrix]:
    """The matrices of some outputs of consecutive matrices."""
    found: list[StoredMatrix] = []
    begin = 0
    for matrix in matrices:
        end = begin + matrix.shape[0]
        first, last = (max(0, -((wanted.start - at) // wanted.step)) for at in (begin, end))
        here = wanted[first:last]
        if len(here) == matrix.shape[0]:
            found.append(matrix)
        elif here:
            found.append(matrix.of_outputs(slice(here.start - begin, here.stop - begin, here.step)))
        begin = end
    return found


def _chosen(tensor: PackedTensor, dim: int, index: Tensor) -> PackedTensor | None:
    dim %= tensor.ndim
    if dim == tensor._outputs_dim():
        return tensor._like(tensor.experts.each(lambda matrices: _chosen_outputs(matrices, index)))
    if tensor.stacked and dim == 0:
        return tensor._like([tensor.experts[expert] for expert in index.tolist()])
    others = [[matrix.of_inputs(index) for matrix in matrices] for matrices in tensor.experts]
    kept = [[matrix for matrix in matrices if matrix is not None] for matrices in others]
    return tensor._like(kept) if kept == others else None


def _chosen_outputs(matrices: Sequence[StoredMatrix], index: Tensor) -> list[StoredMatrix]:
    """Some outputs of consecutive matrices, in the given order, in as few matrices as possible."""
    if len(matrices) == 1:
        return [matrices[0].of_outputs(index)]
    layouts = {matrix.layout for matrix in matrices}
    if len(layouts) == 1:
        parts = tuple(matrices)
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        whole = StoredMatrix(parts[0].layout, shape, lambda: Codes.joined([part.read() for part in parts]))
        return [whole.of_outputs(index)]
    ends = torch.tensor([matrix.shape[0] for matrix in matrices]).cumsum(0)
    owners = torch.bucketize(index, ends, right=True)
    found: list[StoredMatrix] = []
    for run in torch.tensor_split(torch.arange(len(index)), (owners.diff().nonzero().flatten() + 1).tolist()):
        matrix = matrices[int(owners[run[0]])]
        found.append(matrix.of_outputs(index[run] - (ends[owners[run[0]]] - matrix.shape[0])))
    return found


def _selected(tensor: PackedTensor, dim: int, index: int) -> PackedTensor | None:
    if not tensor.stacked or dim % tensor.ndim != 0:
        return None
    return tensor._like([tensor.experts[index]], stacked=False)


def _split(tensor: PackedTensor, size: int | Sequence[int], dim: int = 0) -> list[PackedTensor] | None:
    whole = tensor.shape[dim]
    sizes = [min(size, whole - at) for at in range(0, whole, size)] if isinstance(size, int) else list(size)
    parts: list[PackedTensor] = []
    begin = 0
    for count in sizes:
        part = _sliced(tensor, dim, begin, begin + count)
        if part is None:
            return None
        parts.append(part)
        begin += count
    return parts


_aten: Any = torch.ops.aten
_KEEP: dict[Any, Callable[..., Any]] = {
    _aten.detach: _same,
    _aten.alias: _same,
    _aten.clone: _same,
    _aten._to_copy: _converted,
    _aten.t: _transposed,
    _aten.transpose: _transposed,
    _aten.permute: _permuted,
    _aten.stack: _stacked,
    _aten.cat: _joined,
    _aten.slice: _sliced,
    _aten.select: _selected,
    _aten.index_select: _chosen,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
}
"""Operations that keep the codes; if a function returns None, the operation uses floats."""


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks consecutive codes in each row of int32 words, lowest bits first; a code may span two words: `[rows,
    words]`, int32 -> `[rows, count]`, uint8. Bits after the `count` codes of 1 to 8 bits are padding.

    compressed-tensors (`compressors/pack_quantized/helpers.py`) and GPTQ pack codes in this order.
    """
    stored = words.contiguous().view(torch.uint8)  # little endian: the first byte has the lowest bits
    if bits == 8:
        return stored[:, :count].clone()
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (stored.unsqueeze(2) >> shifts).bitwise_and_(mask).flatten(1)[:, :count].contiguous()
    padded = torch.nn.functional.pad(stored, (0, 1)).to(torch.int16)
    begin = torch.arange(count) * bits
    first = begin // 8
    pairs = padded[:, first] | (padded[:, first + 1] << 8)
    return (pairs.int() >> (begin % 8).int()).bitwise_and_(mask).to(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_words`: `[rows, count]`, uint8 -> `[rows, words]`, int32, padded with zeros."""
    each_bit = (codes[:, :, None] >> torch.arange(bits, dtype=torch.uint8)).bitwise_and_(1).flatten(1)
    padded = torch.nn.functional.pad(each_bit, (0, -each_bit.shape[1] % 32)).unflatten(1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).view(torch.int32)


def unpack_nibbles(stored: Tensor, *, high_first: bool = False) -> Tensor:
    """`[..., bytes]`, uint8 -> `[..., 2 * bytes]`, uint8: two codes of 4 bits per byte."""
    halves = (stored & 15, stored >> 4)
    return torch.stack(halves[::-1] if high_first else halves, dim=-1).flatten(-2)


def signed_codes(values: Tensor, bits: int) -> Tensor:
    """Signed integers of some bits -> codes, uint8; the code `2^(bits - 1)` is zero."""
    return (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def in_order(index: Tensor, inputs: int, group: int) -> bool:
    """Whether an index of groups assigns consecutive inputs to each group."""
    return index.shape == (inputs,) and torch.equal(index.long(), torch.arange(inputs) // group)


def layout_bits(bits: int) -> int:
    """Bits of the `CodeLayout` that holds codes of `bits` bits."""
    return next(held for held in (2, 3, 4, 5, 6, 8) if held >= bits)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from its name; None stays None. Raises ValueError if no floating-point type has that name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{dtype!r} is not a type of weights: use float32, bfloat16 or float16")
    return found


def is_number_type(dtype: Any) -> TypeGuard[torch.dtype]:
    """Whether weights that are numbers, not codes, may have this type: floating-point numbers of 16 bits or more."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
