"""Weights held in the codes in which a checkpoint stores them.

A weight lies in tiles of `TILE` outputs, and a tile in panels of some hundred inputs, so that all of it is read from
front to back. A panel has first what its codes are scaled by, for each group the numbers of the tile's outputs; then,
for every `CHUNK` inputs, its codes. Of a chunk they are eight vectors of 64 bytes, each with four inputs of every
output; where they have fewer than eight bits, some vectors share one in planes of 4, 2 and 1 bits (five bits: 4 and 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import groupby
from math import lcm
from struct import pack
from typing import Self

import torch
from torch import nn
from torch.nn.functional import linear

from splitnet.errors import UnsupportedModel
from splitnet.model.kernels import Kernels, dequantise_grouped, kernels_here, multiply_grouped
from splitnet.model.stored import STEPS_GROUP, TABLES, Codes, Kind, Layout, StoredMatrix, StoredTensor
from splitnet.model.weight_form import WeightForm

TILE = 16
"""Outputs that are stored together."""

CHUNK = 32
"""Inputs whose codes are stored together."""

_VECTORS = 8
"""Of a chunk, with `_RUN` inputs of each output of a tile."""

_RUN = 4
_PANEL = 512
"""Inputs of a panel, at least; the least multiple of the layout's groups."""

_LINE = 64
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of the planes of a code, the lowest bits first."""

_TYPES = {
    Kind.FLOAT16: torch.float16,
    Kind.BFLOAT16: torch.bfloat16,
    Kind.FLOAT32: torch.float32,
    Kind.E8M0: torch.uint8,
    Kind.CODES: torch.uint8,
}
_FLOAT8 = ("e4m3", "e5m2")
_NUMBERS = {Kind.FLOAT16: 0, Kind.BFLOAT16: 1, Kind.FLOAT32: 2, Kind.E8M0: 3, Kind.CODES: 8, Kind.NONE: 9}
_STEPS, _UNSIGNED_STEPS, _LOWER_STEPS, _UPPER_STEPS = 4, 5, 6, 7
"""`enum number` in `native/grouped.h`."""

_OUTPUTS = 5
"""Where they are in a description."""

_PLAIN, _TABLE, _FLOAT_TABLE, _E4M3, _E5M2, _ANY = range(6)
"""`enum code`."""

_MANY_ROWS = 128
"""From so many rows on it is faster to make floats of the weight than to use the kernels, which are made for few."""

_PIECE = 2**20
"""Weights that are made floats at a time, so that they stay in a cache."""


@dataclass(frozen=True)
class Order:
    """How the tiles of a weight lie.

    Attributes:
        scale_type, zero_type: of what is stored for each group.
        nibbles: the steps of scales and zeros share a byte, the scale's in its lower half.
        finite: whether all codes stand for numbers, without which e4m3 is multiplied by plain loops.
    """

    layout: Layout
    inputs: int
    scale_type: torch.dtype
    zero_type: torch.dtype | None
    nibbles: bool
    finite: bool = True

    @classmethod
    def of(cls, layout: Layout, inputs: int, codes: Codes | None = None) -> Order:
        """
        Args:
            codes: of which steps are signed; None: where that does not matter.

        Raises:
            UnsupportedModel: there is no order for such a layout.
        """
        group = layout.group
        steps = Kind.STEPS in (layout.scale, layout.zero)
        if (
            layout.bits not in _PLANES
            or (group not in (0, 8, 16) and group % CHUNK)
            or (steps and (not group or STEPS_GROUP % group))
            or layout.scale in (Kind.CODES, Kind.NONE)
            or layout.zero is Kind.E8M0
            or (layout.table and len(TABLES[layout.table]) != 1 << layout.bits)
        ):
            raise UnsupportedModel(f"weights cannot be held as {layout}: use a checkpoint in another format")
        types = [
            (torch.int8 if stored is None else stored.dtype) if kind is Kind.STEPS else _TYPES.get(kind)
            for kind, stored in (
                (layout.scale, codes and codes.scales),
                (layout.zero, codes and codes.zeros),
            )
        ]
        assert types[0] is not None
        nibbles = layout.bits == 2 and layout.scale is Kind.STEPS and layout.zero is Kind.STEPS
        return cls(layout, inputs, types[0], types[1], nibbles)

    @cached_property
    def panel(self) -> int:
        """Inputs of a panel."""
        if not self.layout.group:
            return -(-self.inputs // CHUNK) * CHUNK
        unit = lcm(self.layout.group, CHUNK, STEPS_GROUP if Kind.STEPS in (self.layout.scale, self.layout.zero) else 1)
        return -(-_PANEL // unit) * unit

    def sections(self, inputs: int) -> list[int]:
        """Bytes of a panel: of scales, zeros, units of scales, units of zeros, padding, codes."""
        groups = -(-inputs // self.layout.group) if self.layout.group else 1
        units = [2 * -(-inputs // STEPS_GROUP) * (kind is Kind.STEPS) for kind in (self.layout.scale, self.layout.zero)]
        zeros = 0 if self.zero_type is None or self.nibbles else self.zero_type.itemsize
        sizes = [TILE * size for size in (groups * self.scale_type.itemsize, groups * zeros, *units)]
        return [*sizes, -sum(sizes) % _LINE, -(-inputs // CHUNK) * _LINE * self.layout.bits]

    @cached_property
    def description(self) -> torch.Tensor:
        """As `Grouped` in `native/grouped.h`; of all that is there but the outputs, which are set to 0."""
        layout = self.layout
        zero = _NUMBERS.get(layout.zero, _UNSIGNED_STEPS if self.zero_type is torch.uint8 else _STEPS)
        scale = _NUMBERS.get(layout.scale, _UNSIGNED_STEPS if self.scale_type is torch.uint8 else _STEPS)
        if self.nibbles:
            scale, zero = _LOWER_STEPS, _UPPER_STEPS
        code, factor, offset = _PLAIN, 1.0, layout.offset
        values = _values(layout)
        at = 0
        if layout.table:
            code, factor, at = _table_code(layout.table)
        if (code > _TABLE and layout.zero is not Kind.NONE) or layout.group == 8 or not self.finite:
            code = _ANY
        sizes = [0 if each is None else TILE * each.itemsize for each in (self.scale_type, self.zero_type)]
        numbers = [code, layout.bits, layout.group, self.panel, self.inputs, 0, offset, scale, zero]
        numbers += [sizes[0], 0 if self.nibbles else sizes[1], self.tile_bytes, layout.table in _FLOAT8]
        packed = pack("13qd2q", *numbers, factor, at, values.data_ptr())
        return torch.frombuffer(bytearray(packed), dtype=torch.int64)

    @cached_property
    def tile_bytes(self) -> int:
        return sum(count * sum(self.sections(inputs)) for _, count, inputs in self.ranges())

    def ranges(self) -> list[tuple[int, int, int]]:
        """Panels that are alike: the first input, how many they are and the inputs of each."""
        whole, rest = divmod(self.inputs, self.panel)
        found = [(0, whole, self.panel)] if whole else []
        return [*found, (whole * self.panel, 1, rest)] if rest else found

    def packed(self, codes: Codes) -> torch.Tensor:
        """`[tiles, tile_bytes]`, uint8."""
        tiles = -(-len(codes.codes) // TILE)
        parts = [self._packed_panels(codes, tiles, *found) for found in self.ranges()]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _packed_panels(self, codes: Codes, tiles: int, start: int, count: int, inputs: int) -> torch.Tensor:
        sizes = self.sections(inputs)

        def numbers(stored: torch.Tensor | None, group: int) -> torch.Tensor:
            """Those of each group of a panel: `[tiles, panels, bytes]`."""
            if stored is None:
                return torch.empty(tiles, count, 0, dtype=torch.uint8)
            each = -(-inputs // group) if group else 1
            first = start // group if group else 0
            some = _padded(stored[:, first : first + count * each], tiles * TILE, count * each)
            some = some.reshape(tiles, TILE, count, each).permute(0, 2, 3, 1).contiguous()
            return some.view(tiles, count, -1).view(torch.uint8)

        group = self.layout.group
        scales, zeros = numbers(codes.scales, group), numbers(codes.zeros, group)
        if self.nibbles:
            scales, zeros = scales | zeros << 4, zeros[..., :0]
        units = [numbers(codes.scale_units, STEPS_GROUP), numbers(codes.zero_units, STEPS_GROUP)]
        padding = torch.zeros(tiles, count, sizes[4], dtype=torch.uint8)
        chunks = -(-inputs // CHUNK)
        some = _padded(codes.codes[:, start : start + count * inputs], tiles * TILE, count * chunks * CHUNK)
        # Runs of inputs are turned, as numbers of 32 bits.
        runs = some.contiguous().view(torch.int32).view(tiles, TILE, count, chunks, _VECTORS)
        vectors = runs.permute(0, 2, 3, 4, 1).contiguous().view(torch.uint8)
        if self.layout.table in _FLOAT8:
            vectors = vectors.view(tiles, count, chunks, _VECTORS, TILE, 2, 2).transpose(4, 5).contiguous()
        vectors = vectors.view(tiles, count, chunks, _VECTORS, TILE * _RUN)
        planes: list[torch.Tensor] = []
        shift = 0
        for bits in _PLANES[self.layout.bits]:
            together = vectors.view(tiles, count, chunks, bits, 8 // bits, TILE * _RUN)
            plane = torch.zeros(tiles, count, chunks, bits, TILE * _RUN, dtype=torch.uint8)
            for index in range(8 // bits):
                plane |= (together[..., index, :] >> shift & (1 << bits) - 1) << index * bits
            planes.append(plane.flatten(3))
            shift += bits
        joined = torch.cat(planes, dim=-1) if len(planes) > 1 else planes[0]
        return torch.cat([scales, zeros, *units, padding, joined.flatten(2)], dim=-1).flatten(1)

    def unpacked(self, tiles: torch.Tensor) -> Codes:
        """What `packed` was given, with the outputs that fill the last tile."""
        begin = 0
        parts: list[list[torch.Tensor]] = []
        for _, count, inputs in self.ranges():
            width = count * sum(self.sections(inputs))
            parts.append(self._unpacked_panels(tiles[:, begin : begin + width], count, inputs))
            begin += width
        codes, scales, zeros, scale_units, zero_units = [
            torch.cat([part[index] for part in parts], dim=1) for index in range(len(parts[0]))
        ]
        some = [one if one.shape[1] else None for one in (zeros, scale_units, zero_units)]
        return Codes(codes[:, : self.inputs], scales, *some)

    def _unpacked_panels(self, panels: torch.Tensor, count: int, inputs: int) -> list[torch.Tensor]:
        tiles = len(panels)
        sizes = self.sections(inputs)
        scales, zeros, *units, _, planes = list(panels.view(tiles, count, -1).split(sizes, dim=-1))
        if self.nibbles:
            scales, zeros = scales & 15, scales >> 4

        def numbers(stored: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
            some = stored.contiguous().view(dtype or torch.uint8).view(tiles, count, -1, TILE)
            return some.permute(0, 3, 1, 2).reshape(tiles * TILE, -1)

        chunks = -(-inputs // CHUNK)
        of_planes = planes.view(tiles, count, chunks, -1).split(
            [bits * _LINE for bits in _PLANES[self.layout.bits]], -1
        )
        vectors: torch.Tensor | None = None
        shift = 0
        for plane, bits in zip(of_planes, _PLANES[self.layout.bits], strict=True):
            apart = plane.view(tiles, count, chunks, bits, 1, _LINE)
            if bits < 8:
                shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=panels.device)[:, None]
                apart = apart.expand(-1, -1, -1, -1, 8 // bits, -1).bitwise_right_shift(shifts) & (1 << bits) - 1
            found = apart.flatten(3, 4)
            vectors = found if vectors is None else vectors | found << shift
            shift += bits
        assert vectors is not None
        if self.layout.table in _FLOAT8:
            vectors = vectors.view(tiles, count, chunks, _VECTORS, 2, TILE, 2).transpose(4, 5)
        runs = vectors.reshape(tiles, count, -1).view(torch.int32).view(tiles, count, chunks, _VECTORS, TILE)
        runs = runs.permute(0, 4, 1, 2, 3).contiguous().view(tiles * TILE, count * chunks * _VECTORS)
        codes = runs.view(torch.uint8).view(tiles * TILE, count, chunks * CHUNK)[..., :inputs].flatten(1)
        of_units = [numbers(one, torch.float16) for one in units]
        return [codes, numbers(scales, self.scale_type), numbers(zeros, self.zero_type), *of_units]


@cache
def _values(layout: Layout) -> torch.Tensor:
    """What each code stands for."""
    return TABLES[layout.table] if layout.table else torch.arange(1 << layout.bits).float() - layout.offset


@cache
def _bytes(table: str) -> tuple[torch.Tensor, float] | None:
    """Bytes that, less 128 and times a factor, are what the codes of a table stand for; None: there are none."""
    values = TABLES[table]
    for factor in (1.0, 0.5):
        whole = values / factor + 128
        if len(values) == 16 and torch.equal(whole, whole.round()) and whole.min() >= 0 and whole.max() <= 255:
            return whole.to(torch.uint8), factor
    return None


def _table_code(table: str) -> tuple[int, float, int]:
    """The `enum code` of a table, the factor that goes with it and the address of its bytes."""
    if table in _FLOAT8:
        return (_E4M3, 256.0, 0) if table == "e4m3" else (_E5M2, 1.0, 0)
    found = _bytes(table)
    return (_FLOAT_TABLE, 1.0, 0) if found is None else (_TABLE, found[1], found[0].data_ptr())


def _padded(tensor: torch.Tensor, outputs: int, width: int) -> torch.Tensor:
    if tensor.shape == (outputs, width):
        return tensor
    whole = tensor.new_zeros(outputs, width)
    whole[: tensor.shape[0], : tensor.shape[1]] = tensor
    return whole


class GroupedForm(WeightForm):
    """Codes in tiles.

    Args:
        order: how they lie.
        outputs: how many there are; the last tile is filled up.
        tiles: `[tiles, order.tile_bytes]`, uint8.
    """

    def __init__(self, order: Order, outputs: int, tiles: torch.Tensor) -> None:
        super().__init__()
        self.order = order
        self.outputs = outputs
        self._description = order.description.clone()
        self._description[_OUTPUTS] = outputs
        self.tiles: torch.Tensor
        self.register_buffer("tiles", tiles)

    @classmethod
    def hold(cls, layout: Layout, codes: Sequence[Codes], device: torch.device) -> Self:
        """Holds codes that stand one below the other.

        Raises:
            UnsupportedModel: such a layout cannot be held.
        """
        outputs = sum(len(some.codes) for some in codes)
        order, tiles = _tiles_of(layout, codes)
        return cls(order, outputs, tiles.to(device))

    @property
    def layout(self) -> Layout:
        """Of its codes."""
        return self.order.layout

    @property
    def inputs(self) -> int:
        """How many there are."""
        return self.order.inputs

    @property
    def description(self) -> torch.Tensor:
        """For the kernels."""
        return self._description

    @property
    def has_fast_kernel(self) -> bool:
        """Whether the products of some rows, in whole chunks of inputs, have a kernel that is made for this CPU."""
        return kernels_here() is Kernels.FAST and self._has_kernel and int(self._description[0]) != _ANY

    @property
    def _has_kernel(self) -> bool:
        return kernels_here() is not Kernels.NONE and self.tiles.device.type == "cpu"

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        products = rows.new_empty(len(rows), self.outputs)
        self.multiply_into(products, rows)
        return products

    def multiply_into(
        self, products: torch.Tensor, rows: torch.Tensor, experts: torch.Tensor | None = None, held: int = 0
    ) -> None:
        """Sets `products`, `[rows, outputs]`, which may be columns of a wider tensor, in the type of the rows.

        Args:
            experts: of each row, int64, where the tiles are those of `held` experts.
        """
        if self._has_kernel and len(rows) < _MANY_ROWS:
            given = rows.float()
            if self.inputs % CHUNK:
                given = torch.nn.functional.pad(given, (0, -self.inputs % CHUNK))
            exact = products.dtype == torch.float32
            into = products if exact else torch.empty(products.shape)
            multiply_grouped(given, self._description, self.tiles, into, experts, held)
            if not exact:
                products.copy_(into)
            return
        for index in [0] if experts is None else experts.unique().tolist():
            chosen = slice(None) if experts is None else experts == index
            some = rows[chosen]
            products[chosen] = torch.cat([linear(some, piece) for piece in self.pieces(rows.dtype, index)], dim=-1)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat(list(self.pieces(dtype)))

    def rows(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights of some outputs, `[len(indices), inputs]`: what an embedding looks up."""
        found = torch.empty(len(indices), self.inputs, dtype=torch.float32, device=self.tiles.device)
        if self._has_kernel:
            dequantise_grouped(self._description, self.tiles, found, indices)
            return found.to(dtype)
        most = max(1, _PIECE // (TILE * self.inputs))
        for to, some in zip(found.split(most), indices.split(most), strict=True) if len(indices) else ():
            codes = self.order.unpacked(self.tiles[some // TILE])
            lanes = torch.arange(len(some), device=some.device) * TILE + some % TILE
            to.copy_(codes.of_outputs(lanes).floats(self.layout))
        return found.to(dtype)

    def pieces(self, dtype: torch.dtype, expert: int = 0) -> Iterator[torch.Tensor]:
        """The weight in floats, some outputs at a time."""
        tiles = -(-self.outputs // TILE)
        begin = 0
        for some in self.tiles[expert * tiles : (expert + 1) * tiles].split(max(1, _PIECE // (TILE * self.inputs))):
            count = min(TILE * len(some), self.outputs - begin)
            begin += count
            if self._has_kernel:
                piece = torch.empty(count, self.inputs)
                dequantise_grouped(self._description, some, piece)
            else:
                piece = self.order.unpacked(some).floats(self.layout)[:count]
            yield piece.to(dtype)


class JoinedForm(WeightForm):
    """Weights of several layouts, one below the other."""

    def __init__(self, forms: Sequence[GroupedForm]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(forms)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([form.multiply(rows) for form in self._each()], dim=-1)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([form.dequantised(dtype) for form in self._each()])

    def rows(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """As `GroupedForm.rows`."""
        found: torch.Tensor | None = None
        begin = 0
        for form in self._each():
            within = (indices >= begin) & (indices < begin + form.outputs)
            if found is None:
                found = indices.new_empty(len(indices), form.inputs, dtype=dtype)
            found[within] = form.rows(indices[within] - begin, dtype)
            begin += form.outputs
        assert found is not None
        return found

    def _each(self) -> list[GroupedForm]:
        return [form for form in self.forms if isinstance(form, GroupedForm)]


class ExpertForm(nn.Module):
    """The weights of many experts, each `[outputs, inputs]`.

    Args:
        parts: for each part of the outputs, one below the other, the weights of all experts: with `experts` times as
            many tiles as one has.
        experts: how many there are.
    """

    def __init__(self, parts: Sequence[GroupedForm], experts: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.experts = experts
        self.outputs = sum(part.outputs for part in parts)
        self.inputs = parts[0].inputs

    @property
    def nbytes(self) -> int:
        """Bytes that all of them take."""
        return sum(part.tiles.nbytes for part in self._each())

    def multiply(self, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Each row times the weight of its own expert. Rows of an expert that follow each other read it once.

        Args:
            rows: `[n, inputs]`.
            experts: `[n]`, int64.

        Returns:
            `[n, outputs]`, in the type of `rows`.
        """
        products = rows.new_empty(len(rows), self.outputs)
        begin = 0
        for part in self._each():
            part.multiply_into(products[:, begin : begin + part.outputs], rows, experts, self.experts)
            begin += part.outputs
        return products

    def dequantised(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight of one, `[outputs, inputs]`: a new tensor."""
        return torch.cat([piece for part in self._each() for piece in part.pieces(dtype, expert)])

    def _each(self) -> list[GroupedForm]:
        return [part for part in self.parts if isinstance(part, GroupedForm)]


def held_bytes(layout: Layout, outputs: int, inputs: int) -> int:
    """Bytes that `hold_stored` takes for a weight.

    Raises:
        UnsupportedModel: such a layout cannot be held.
    """
    return -(-outputs // TILE) * Order.of(layout, inputs).tile_bytes


def hold_stored(matrices: Sequence[StoredMatrix], device: torch.device) -> GroupedForm | JoinedForm:
    """Holds matrices that stand one below the other in the codes that they are stored in.

    Raises:
        UnsupportedModel: a layout cannot be held.
    """
    forms: list[GroupedForm] = []
    for _, alike in groupby(matrices, lambda matrix: matrix.layout):
        some = list(alike)
        forms.append(GroupedForm.hold(some[0].layout, [matrix.read() for matrix in some], device))
    return forms[0] if len(forms) == 1 else JoinedForm(forms)


def hold_experts(stored: StoredTensor, device: torch.device) -> ExpertForm:
    """Holds the weights of experts; they are read one at a time.

    Args:
        stored: with a dimension of experts, whichever way its matrices lie.

    Raises:
        UnsupportedModel: a layout cannot be held, or experts differ in theirs.
    """
    kinds = [[(matrix.layout, matrix.shape) for matrix in matrices] for matrices in stored.experts]
    if any(kind != kinds[0] for kind in kinds):
        raise UnsupportedModel("experts that are stored in different ways cannot be held together")
    parts: list[GroupedForm] = []
    begin = 0
    for layout, alike in groupby(kinds[0], lambda kind: kind[0]):
        shapes = [shape for _, shape in alike]
        end = begin + len(shapes)
        found: tuple[Order, torch.Tensor] | None = None
        for index, matrices in enumerate(stored.experts):
            order, tiles = _tiles_of(layout, [matrix.read() for matrix in matrices[begin:end]])
            if found is None:
                found = order, torch.empty(len(stored.experts) * len(tiles), order.tile_bytes, dtype=torch.uint8)
            elif order != found[0]:
                raise UnsupportedModel("experts whose scales are of different types cannot be held together")
            found[1][index * len(tiles) : (index + 1) * len(tiles)] = tiles
        assert found is not None
        parts.append(GroupedForm(found[0], sum(outputs for outputs, _ in shapes), found[1].to(device)))
        begin = end
    return ExpertForm(parts, len(stored.experts))


def _tiles_of(layout: Layout, below: Sequence[Codes]) -> tuple[Order, torch.Tensor]:
    """The tiles of codes that stand one below the other."""
    codes = _below(below)
    inputs = codes.codes.shape[1]
    order = Order.of(layout, inputs, codes)
    if order.nibbles and any(int(steps.max()) > 15 for steps in (codes.scales, codes.zeros) if steps is not None):
        order = replace(order, nibbles=False)
    if layout.table == "e4m3" and bool((codes.codes & 127 == 127).any()):
        order = replace(order, finite=False)
    tiles = torch.empty(-(-len(codes.codes) // TILE), order.tile_bytes, dtype=torch.uint8)
    most = max(1, _PIECE // (TILE * inputs))
    for begin in range(0, len(tiles), most):
        some = codes.of_outputs(slice(begin * TILE, (begin + most) * TILE))
        tiles[begin : begin + most] = order.packed(some)
    return order, tiles


def _below(codes: Sequence[Codes]) -> Codes:
    if len(codes) == 1:
        return codes[0]

    def joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        some = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(some) if some else None

    return Codes(
        torch.cat([one.codes for one in codes]),
        torch.cat([one.scales for one in codes]),
        joined([one.zeros for one in codes]),
        joined([one.scale_units for one in codes]),
        joined([one.zero_units for one in codes]),
    )
