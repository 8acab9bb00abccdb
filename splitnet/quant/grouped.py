"""Weights held in the codes in which a checkpoint stores them: layers, embeddings and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Self

import torch
from torch import nn

from splitnet.errors import UnsupportedModel
from splitnet.quant.floats import (
    EXPERTS_FROM,
    PLAIN_LOOPS_FROM,
    codes_from,
    int8_from,
    multiply_by_parts,
    outputs_at_a_time,
    type_for_many,
    type_of_codes,
)
from splitnet.quant.memory import in_large_pages
from splitnet.quant.native import (
    Kernels,
    convert_grouped,
    dequantise_grouped,
    kernels_here,
    multiplies_bfloat16,
    multiply_grouped,
)
from splitnet.quant.stored import Codes, Layout, PackedTensor, StoredMatrix
from splitnet.quant.tiles import CHUNK, TILE, TileLayout
from splitnet.quant.weight_form import WeightForm

_PIECE = 2**20
"""Weights that are brought into tiles at a time."""

GATHERED_ROWS = 8
"""Rows of experts, as a position of most families has them, for each of which a device that is no CPU makes a weight
anew, whether or not they have experts in common."""

_LARGE_PIECE = 2**24
"""Weights that are made floats at a time on devices that are no CPUs."""


class BlockQuantWeight(WeightForm):
    """Codes in tiles.

    Args:
        order: how they lie.
        outputs: how many there are; the last tile is filled up.
        tiles: `[tiles, order.tile_bytes]`, uint8.
        rounds_rows: many rows are rounded to bfloat16 where the CPU multiplies that faster, whatever type they have:
            of integers with a scale for each output, whose codes are exact in it.
    """

    def __init__(self, order: TileLayout, outputs: int, tiles: torch.Tensor, *, rounds_rows: bool = False) -> None:
        super().__init__()
        self.order = order
        self.outputs = outputs
        self._rounds_rows = rounds_rows
        self.description = order.described(outputs)
        """For the kernels; it stays on the CPU."""

        self.tiles: torch.Tensor
        self.register_buffer("tiles", tiles)

    @classmethod
    def hold(cls, layout: Layout, codes: Sequence[Codes], device: torch.device, *, rounds_rows: bool = False) -> Self:
        """Holds codes that stand one below the other.

        Raises:
            UnsupportedModel: such a layout cannot be held.
        """
        outputs = sum(len(some.codes) for some in codes)
        order, tiles = _tiles_of(layout, codes)
        return cls(order, outputs, tiles.to(device), rounds_rows=rounds_rows)

    @property
    def layout(self) -> Layout:
        """Of its codes."""
        return self.order.layout

    @property
    def inputs(self) -> int:
        """How many there are."""
        return self.order.inputs

    @property
    def has_fast_kernel(self) -> bool:
        """Whether there is a kernel for its products that is made for this CPU."""
        return self.order.has_fast_kernel and self.tiles.device.type == "cpu" and kernels_here() is Kernels.FAST

    @property
    def alone_as_together(self) -> bool:
        return self._has_kernel  # of fewer rows than `PLAIN_LOOPS_FROM`

    def many_from(self, dtype: torch.dtype) -> int:
        """From so many rows of a type on `multiply_many` is faster than a kernel."""
        if self._rounds_rows:
            return int8_from()
        return codes_from(dtype, integers=self.order.for_integers) if self.has_fast_kernel else PLAIN_LOOPS_FROM

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

        Raises:
            IndexError: there is no such expert.
        """
        # Rows of experts are counted by who has sorted them.
        by_kernel = len(rows) < self.many_from(rows.dtype) or (experts is not None and self.has_fast_kernel)
        if self._has_kernel and by_kernel:
            given = rows.float()
            if self.inputs % CHUNK:
                given = torch.nn.functional.pad(given, (0, -self.inputs % CHUNK))
            exact = products.dtype == torch.float32
            into = products if exact else torch.empty(products.shape, dtype=torch.float32)
            multiply_grouped(given, self.description, self.tiles, into, experts, held)
            if not exact:
                products.copy_(into)
            return
        if experts is not None and len(rows) <= GATHERED_ROWS and self.tiles.device.type != "cpu":
            self._multiply_gathered(products, rows, experts)
            return
        for index, of in [(0, slice(None))] if experts is None else runs(experts):
            if experts is not None and not 0 <= index < held:
                raise IndexError(f"there are {held} experts, and a row is for another")
            products[of] = self.multiply_many(rows[of], index)

    def _multiply_gathered(self, products: torch.Tensor, rows: torch.Tensor, experts: torch.Tensor) -> None:
        """Makes the weight of its expert anew for each row, so that the host need not wait to know which these are."""
        tiles = -(-self.outputs // TILE)
        by_expert = self.tiles.view(-1, tiles, self.order.tile_bytes)
        begin = 0
        for some in by_expert.split(max(1, self._piece_tiles() // len(rows)), dim=1):
            weights = self.order.unpacked(some[experts].flatten(0, 1)).floats(self.layout).to(rows.dtype)
            found = torch.bmm(weights.view(len(rows), -1, self.inputs), rows[:, :, None])[:, :, 0]
            count = min(found.shape[1], self.outputs - begin)
            products[:, begin : begin + count] = found[:, :count]
            begin += count

    def multiply_many(self, rows: torch.Tensor, expert: int = 0) -> torch.Tensor:
        """`multiply` by making the weight anew; see `type_of_codes` for what is rounded.

        Args:
            expert: whose weight it is, where the tiles are those of several.
        """
        if self._rounds_rows and self._has_kernel:
            # Codes are exact in bfloat16, numbers would not be.
            parts = self._pieces(type_for_many(), expert, self.order.described(self.outputs, scaled=False))
            scales = self.tiles[:, : TILE * torch.bfloat16.itemsize].view(torch.bfloat16).flatten()[: self.outputs]
            return multiply_by_parts(rows, self.outputs, parts).mul_(scales)
        dtype = type_of_codes(rows) if len(rows) >= PLAIN_LOOPS_FROM else rows.dtype
        return multiply_by_parts(rows, self.outputs, self._pieces(dtype, expert))

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return self.of_expert(0, dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        return self._pieces(dtype, 0)

    def of_expert(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight of one, `[outputs, inputs]`, where the tiles are those of several experts."""
        found = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.tiles.device)
        for piece, place in zip(self._pieces(dtype, expert), found.split(self._piece_tiles() * TILE), strict=True):
            place.copy_(piece)
        return found

    def rows(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights of some outputs, `[len(indices), inputs]`: what an embedding looks up."""
        found = torch.empty(len(indices), self.inputs, dtype=torch.float32, device=self.tiles.device)
        if self._has_kernel:
            dequantise_grouped(self.description, self.tiles, found, indices)
            return found.to(dtype)
        most = self._piece_tiles()
        for to, some in zip(found.split(most), indices.split(most), strict=True) if len(indices) else ():
            codes = self.order.unpacked(self.tiles[some // TILE])
            lanes = torch.arange(len(some), device=some.device) * TILE + some % TILE
            to.copy_(codes.of_outputs(lanes).floats(self.layout))
        return found.to(dtype)

    def _piece_tiles(self) -> int:
        """How many tiles are made floats at a time."""
        if self.tiles.device.type == "cpu":
            return outputs_at_a_time(self.inputs) // TILE
        return max(1, _LARGE_PIECE // (TILE * self.inputs))

    def _pieces(
        self, dtype: torch.dtype, expert: int, description: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """The weight in floats, some outputs at a time. A piece is there until the next one is asked for.

        Args:
            description: what kernels take in the place of its own.
        """
        tiles = -(-self.outputs // TILE)
        halves = dtype == torch.bfloat16 and self.has_fast_kernel and multiplies_bfloat16()
        room: torch.Tensor | None = None
        begin = 0
        for some in self.tiles[expert * tiles : (expert + 1) * tiles].split(self._piece_tiles()):
            count = min(TILE * len(some), self.outputs - begin)
            begin += count
            if self._has_kernel:
                if room is None:
                    room = torch.empty(count, self.inputs, dtype=dtype if halves else torch.float32)
                piece = room[:count]
                convert_grouped(self.description if description is None else description, some, piece)
            else:
                piece = self.order.unpacked(some).floats(self.layout)[:count]
            yield piece.to(dtype)


class JoinedForm(WeightForm):
    """Weights of several layouts, one below the other."""

    def __init__(self, forms: Sequence[BlockQuantWeight]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(forms)

    @property
    def alone_as_together(self) -> bool:
        return all(form.alone_as_together for form in self._each())

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([form.multiply(rows) for form in self._each()], dim=-1)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([form.dequantised(dtype) for form in self._each()])

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for form in self._each():
            yield from form.pieces(dtype)

    def rows(self, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """As `BlockQuantWeight.rows`."""
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

    def _each(self) -> list[BlockQuantWeight]:
        return [form for form in self.forms if isinstance(form, BlockQuantWeight)]


class ExpertForm(nn.Module):
    """The weights of many experts, each `[outputs, inputs]`.

    Args:
        parts: for each part of the outputs, one below the other, the weights of all experts: with `experts` times as
            many tiles as one has.
        experts: how many there are.
    """

    def __init__(self, parts: Sequence[BlockQuantWeight], experts: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.experts = experts
        self.outputs = sum(part.outputs for part in parts)
        self.inputs = parts[0].inputs

    def many_from(self, dtype: torch.dtype) -> int:
        """From so many rows of an expert on `multiply_many` is faster than a kernel."""
        return min(EXPERTS_FROM, max(part.many_from(dtype) for part in self._each()))

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

        Raises:
            IndexError: there is no such expert.
        """
        products = rows.new_empty(len(rows), self.outputs)
        begin = 0
        for part in self._each():
            part.multiply_into(products[:, begin : begin + part.outputs], rows, experts, self.experts)
            begin += part.outputs
        return products

    def multiply_many(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """Many rows of one expert, by making its weight anew."""
        return torch.cat([part.multiply_many(rows, expert) for part in self._each()], dim=-1)

    def dequantised(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight of one, `[outputs, inputs]`: a new tensor.

        Raises:
            IndexError: there is no such expert.
        """
        if not 0 <= expert < self.experts:
            raise IndexError(f"there are {self.experts} experts, and {expert} is asked for")
        return torch.cat([part.of_expert(expert, dtype) for part in self._each()])

    def _each(self) -> list[BlockQuantWeight]:
        return [part for part in self.parts if isinstance(part, BlockQuantWeight)]


def runs(experts: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert with the rows that are its own and follow each other."""
    begin = 0
    for expert, count in torch.stack(experts.unique_consecutive(return_counts=True)).T.tolist():
        yield expert, slice(begin, begin + count)
        begin += count


def held_bytes(layout: Layout, outputs: int, inputs: int) -> int:
    """Bytes that `hold_stored` takes for a weight.

    Raises:
        UnsupportedModel: such a layout cannot be held.
    """
    return -(-outputs // TILE) * TileLayout.of(layout, inputs).tile_bytes


def hold_stored(matrices: Sequence[StoredMatrix], device: torch.device) -> BlockQuantWeight | JoinedForm:
    """Holds matrices that stand one below the other in the codes that they are stored in.

    Raises:
        UnsupportedModel: a layout cannot be held.
    """
    forms: list[BlockQuantWeight] = []
    for _, alike in groupby(matrices, lambda matrix: matrix.layout):
        some = list(alike)
        forms.append(BlockQuantWeight.hold(some[0].layout, [matrix.read() for matrix in some], device))
    return forms[0] if len(forms) == 1 else JoinedForm(forms)


def hold_experts(stored: PackedTensor, device: torch.device) -> ExpertForm:
    """Holds the weights of experts; they are read one at a time.

    Args:
        stored: with a dimension of experts. Whether it is transposed does not matter: its matrices count.

    Raises:
        UnsupportedModel: a layout cannot be held, or experts differ in theirs.
    """
    kinds = [[(matrix.layout, matrix.shape) for matrix in matrices] for matrices in stored.experts]
    if any(kind != kinds[0] for kind in kinds):
        raise UnsupportedModel("experts that are stored in different ways cannot be held together")
    parts: list[BlockQuantWeight] = []
    begin = 0
    for layout, alike in groupby(kinds[0], lambda kind: kind[0]):
        shapes = [shape for _, shape in alike]
        end = begin + len(shapes)
        found: tuple[TileLayout, torch.Tensor] | None = None
        for index, matrices in enumerate(stored.experts):
            order, tiles = _tiles_of(layout, [matrix.read() for matrix in matrices[begin:end]], _passing_room)
            if found is None:
                found = order, in_large_pages(len(stored.experts) * len(tiles), order.tile_bytes)
            elif order != found[0]:
                raise UnsupportedModel("experts whose scales are of different types cannot be held together")
            found[1][index * len(tiles) : (index + 1) * len(tiles)] = tiles
        assert found is not None
        parts.append(BlockQuantWeight(found[0], sum(outputs for outputs, _ in shapes), found[1].to(device)))
        begin = end
    return ExpertForm(parts, len(stored.experts))


def _passing_room(rows: int, row_bytes: int) -> torch.Tensor:
    """Memory for tiles that are copied and freed at once."""
    return torch.empty(rows, row_bytes, dtype=torch.uint8)


def _tiles_of(
    layout: Layout, below: Sequence[Codes], room: Callable[[int, int], torch.Tensor] = in_large_pages
) -> tuple[TileLayout, torch.Tensor]:
    """The tiles of codes that stand one below the other."""
    codes = below[0] if len(below) == 1 else Codes.joined(below)
    inputs = codes.codes.shape[1]
    order = TileLayout.of(layout, inputs, codes)
    if order.nibbles and any(int(steps.max()) > 15 for steps in (codes.scales, codes.zeros) if steps is not None):
        order = replace(order, nibbles=False)
    if layout.table == "e4m3" and bool((codes.codes & 127 == 127).any()):
        order = replace(order, finite=False)
    tiles = room(-(-len(codes.codes) // TILE), order.tile_bytes)
    most = max(1, _PIECE // (TILE * inputs))
    for begin in range(0, len(tiles), most):
        some = codes.of_outputs(slice(begin * TILE, (begin + most) * TILE))
        tiles[begin : begin + most] = order.packed(some)
    return order, tiles
