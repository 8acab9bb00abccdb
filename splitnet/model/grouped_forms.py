"""Weights held in the codes in which a checkpoint stores them.

A weight lies in tiles of `TILE` outputs, and a tile in panels of some hundred inputs, so that all of it is read from
front to back. A panel has first what its codes are scaled by, for each group the numbers of the tile's outputs; then,
for every `CHUNK` inputs, its codes. Of a chunk they are eight vectors of 64 bytes, each with four inputs of every
output; where they have fewer than eight bits, some vectors share one in planes of 4, 2 and 1 bits (five bits: 4 and 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import lcm

import torch
from torch import nn

from splitnet.errors import UnsupportedModel
from splitnet.model.stored import STEPS_GROUP, Codes, Kind, Layout, StoredMatrix, StoredTensor
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
_PIECE = 2**20
"""Weights that are made floats at a time, so that they stay in a cache."""


@dataclass(frozen=True)
class _Order:
    """How the tiles of a weight lie.

    Attributes:
        scale_type, zero_type: of what is stored for each group.
        nibbles: the steps of scales and zeros share a byte, the scale's in its lower half.
    """

    layout: Layout
    inputs: int
    scale_type: torch.dtype
    zero_type: torch.dtype | None
    nibbles: bool

    @classmethod
    def of(cls, layout: Layout, inputs: int, codes: Codes | None = None) -> _Order:
        """
        Args:
            codes: of which steps are signed; None: where that does not matter.

        Raises:
            UnsupportedModel: there is no order for such a layout.
        """
        group = layout.group
        if layout.bits not in _PLANES or (group and group % 8):
            raise UnsupportedModel(
                f"weights of {layout.bits} bits in groups of {group} inputs cannot be held: use a checkpoint of 2, 3, "
                "4, 5, 6 or 8 bits in groups of 16, 32 or a multiple"
            )
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

    def __init__(self, order: _Order, outputs: int, tiles: torch.Tensor) -> None:
        super().__init__()
        self._order = order
        self.outputs = outputs
        self.tiles: torch.Tensor
        self.register_buffer("tiles", tiles)

    @property
    def layout(self) -> Layout:
        """Of its codes."""
        return self._order.layout

    @property
    def inputs(self) -> int:
        """How many there are."""
        return self._order.inputs

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        pieces = [torch.nn.functional.linear(rows, piece) for piece in self._pieces(rows.dtype)]
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat(self._pieces(dtype))

    def rows(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights of some outputs, `[len(indices), inputs]`: what an embedding looks up."""
        found = indices.new_empty(len(indices), self.inputs, dtype=dtype)
        most = max(1, _PIECE // (TILE * self.inputs))
        for to, some in zip(found.split(most), indices.split(most), strict=True) if len(indices) else ():
            codes = self._order.unpacked(self.tiles[some // TILE])
            lanes = torch.arange(len(some), device=some.device) * TILE + some % TILE
            to.copy_(codes.of_outputs(lanes).floats(self.layout))
        return found

    def _pieces(self, dtype: torch.dtype) -> list[torch.Tensor]:
        tiles = self.tiles.split(max(1, _PIECE // (TILE * self.inputs)))
        pieces = [self._order.unpacked(some).floats(self.layout).to(dtype) for some in tiles]
        pieces[-1] = pieces[-1][: self.outputs - sum(len(some) for some in tiles[:-1]) * TILE]
        return pieces


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
        product = rows.new_empty(len(rows), self.outputs)
        for expert in experts.unique().tolist():
            chosen = experts == expert
            forms = [self._one(part, expert) for part in self._each()]
            product[chosen] = torch.cat([form.multiply(rows[chosen]) for form in forms], dim=-1)
        return product

    def dequantised(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight of one, `[outputs, inputs]`: a new tensor."""
        return torch.cat([self._one(part, expert).dequantised(dtype) for part in self._each()])

    def _each(self) -> list[GroupedForm]:
        return [part for part in self.parts if isinstance(part, GroupedForm)]

    def _one(self, part: GroupedForm, expert: int) -> GroupedForm:
        tiles = len(part.tiles) // self.experts
        return GroupedForm(part._order, part.outputs, part.tiles[expert * tiles : (expert + 1) * tiles])


def held_bytes(layout: Layout, outputs: int, inputs: int) -> int:
    """Bytes that `hold_stored` takes for a weight.

    Raises:
        UnsupportedModel: such a layout cannot be held.
    """
    return -(-outputs // TILE) * _Order.of(layout, inputs).tile_bytes


def hold_stored(matrices: Sequence[StoredMatrix], device: torch.device) -> GroupedForm | JoinedForm:
    """Holds matrices that stand one below the other in the codes that they are stored in.

    Raises:
        UnsupportedModel: a layout cannot be held.
    """
    forms: list[GroupedForm] = []
    for _, alike in groupby(matrices, lambda matrix: matrix.layout):
        some = list(alike)
        order, tiles = _tiles_of(some)
        forms.append(GroupedForm(order, sum(matrix.shape[0] for matrix in some), tiles.to(device)))
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
    for _, alike in groupby(kinds[0], lambda kind: kind[0]):
        shapes = [shape for _, shape in alike]
        end = begin + len(shapes)
        found: tuple[_Order, torch.Tensor] | None = None
        for index, matrices in enumerate(stored.experts):
            order, tiles = _tiles_of(matrices[begin:end])
            if found is None:
                found = order, torch.empty(len(stored.experts) * len(tiles), order.tile_bytes, dtype=torch.uint8)
            elif order != found[0]:
                raise UnsupportedModel("experts whose scales are of different types cannot be held together")
            found[1][index * len(tiles) : (index + 1) * len(tiles)] = tiles
        assert found is not None
        parts.append(GroupedForm(found[0], sum(outputs for outputs, _ in shapes), found[1].to(device)))
        begin = end
    return ExpertForm(parts, len(stored.experts))


def _tiles_of(matrices: Sequence[StoredMatrix]) -> tuple[_Order, torch.Tensor]:
    """The tiles of matrices of one layout that stand one below the other."""
    layout, inputs = matrices[0].layout, matrices[0].shape[1]
    codes = _below(*[matrix.read() for matrix in matrices])
    order = _Order.of(layout, inputs, codes)
    if order.nibbles and any(int(steps.max()) > 15 for steps in (codes.scales, codes.zeros) if steps is not None):
        order = replace(order, nibbles=False)
    tiles = torch.empty(-(-len(codes.codes) // TILE), order.tile_bytes, dtype=torch.uint8)
    most = max(1, _PIECE // (TILE * inputs))
    for begin in range(0, len(tiles), most):
        some = codes.of_outputs(slice(begin * TILE, (begin + most) * TILE))
        tiles[begin : begin + most] = order.packed(some)
    return order, tiles


def _below(*codes: Codes) -> Codes:
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
