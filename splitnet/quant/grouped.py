"""Layers, embeddings and experts whose weights keep the codes of the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn

from splitnet.errors import UnsupportedModel
from splitnet.quant.device import in_large_pages
from splitnet.quant.forms import PLAIN_LOOPS_FROM, WeightForm, multiply_by_parts, outputs_at_a_time, type_for_many
from splitnet.quant.native import (
    Kernels,
    convert_grouped,
    dequantise_grouped,
    has_fast_kernels,
    kernels_here,
    multiplies_bfloat16,
    multiply_grouped,
)
from splitnet.quant.packed_tensor import CodeLayout, Codes, PackedTensor, StoredMatrix
from splitnet.quant.tiles import CHUNK, TILE, TileLayout

EXPERTS_FROM = 32
"""Number of rows of one expert from which the expert's weight is converted to floats, because a kernel in float32 is
slower."""

_INT8_FROM, _INTEGERS_FROM, _OTHERS_FROM = 32, 48, 24
"""The same limits for three kinds of weights: with one scale per output, of integers in groups, and of floats in
groups. They are for CPUs with VNNI that multiply bfloat16 faster than float32; other CPUs gain nothing."""

_PIECE = 2**20  # weights that are packed into tiles at a time
# Maximum rows of experts for which devices other than CPUs convert a weight for each row.
GATHERED_ROWS = 8
_LARGE_PIECE = 2**24  # weights that are converted to floats at a time on devices other than CPUs, to limit memory


class BlockQuantWeight(WeightForm):
    """Codes in tiles.

    Args:
        outputs: number of outputs; the last tile is padded.
        tiles: `[tiles, order.tile_bytes]`, uint8.
        rounds_rows: many rows of any type are rounded to bfloat16 where the CPU multiplies it faster. This is for
            integers with one scale per output, whose codes bfloat16 holds exactly.
    """

    def __init__(self, order: TileLayout, outputs: int, tiles: Tensor, *, rounds_rows: bool = False) -> None:
        super().__init__()
        self.order, self.layout, self.inputs, self.outputs = order, order.layout, order.inputs, outputs
        self._rounds_rows = rounds_rows
        self.description = order.described(outputs)  # for the kernels; it stays on the CPU
        self.tiles: Tensor
        self.register_buffer("tiles", tiles)

    @classmethod
    def from_codes(
        cls, layout: CodeLayout, codes: Sequence[Codes], device: torch.device, *, rounds_rows: bool = False
    ) -> Self:
        """Holds codes of consecutive outputs. Raises UnsupportedModel if such a layout cannot be held."""
        order, tiles = _tiles_of(layout, codes)
        return cls(order, sum(len(some.codes) for some in codes), tiles.to(device), rounds_rows=rounds_rows)

    @property
    def has_fast_kernel(self) -> bool:
        """Whether this CPU has a fast kernel for its products."""
        return self.order.has_fast_kernel and self.tiles.device.type == "cpu" and kernels_here() is Kernels.FAST

    @property
    def rows_are_independent(self) -> bool:  # for fewer rows than `PLAIN_LOOPS_FROM`
        return self._has_kernel

    @property
    def _has_kernel(self) -> bool:
        return kernels_here() is not Kernels.NONE and self.tiles.device.type == "cpu"

    def many_from(self, dtype: torch.dtype) -> int:
        """The number of rows of a type from which `multiply_many` is faster than a kernel."""
        if not (has_fast_kernels() if self._rounds_rows else self.has_fast_kernel):
            return PLAIN_LOOPS_FROM
        if torch.bfloat16 != type_for_many() or (dtype != torch.bfloat16 and not self._rounds_rows):
            return sys.maxsize
        return _INT8_FROM if self._rounds_rows else _INTEGERS_FROM if self.order.for_integers else _OTHERS_FROM

    def multiply(self, rows: Tensor) -> Tensor:
        products = rows.new_empty(len(rows), self.outputs)
        self.multiply_into(products, rows)
        return products

    def multiply_into(self, products: Tensor, rows: Tensor, experts: Tensor | None = None, held: int = 0) -> None:
        """Sets `products`, `[rows, outputs]`, which may be columns of a wider tensor, in the type of the rows.

        `experts`: the expert of each row, int64, where `tiles` has the weights of `held` experts. Raises IndexError for
        an unknown expert.
        """
        # The caller that sorts rows by expert has already chosen between the kernel and `multiply_many`.
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
                raise IndexError(f"there are {held} experts, and a row is for an unknown one")
            products[of] = self.multiply_many(rows[of], index)

    def _multiply_gathered(self, products: Tensor, rows: Tensor, experts: Tensor) -> None:
        """Converts the weight of each row's expert to floats, so that the host need not wait for the experts'
        numbers."""
        tiles = -(-self.outputs // TILE)
        by_expert = self.tiles.view(-1, tiles, self.order.tile_bytes)
        begin = 0
        for some in by_expert.split(max(1, self._piece_tiles() // len(rows)), dim=1):
            weights = self.order.unpacked(some[experts].flatten(0, 1)).to_floats(self.layout).to(rows.dtype)
            found = torch.bmm(weights.view(len(rows), -1, self.inputs), rows[:, :, None])[:, :, 0]
            count = min(found.shape[1], self.outputs - begin)
            products[:, begin : begin + count] = found[:, :count]
            begin += count

    def multiply_many(self, rows: Tensor, expert: int = 0) -> Tensor:
        """As `multiply`, but converts the weight to floats; `expert`: whose weight, where the tiles are those of
        several experts."""
        if self._rounds_rows and self._has_kernel:
            # bfloat16 holds the codes exactly, but not the scaled numbers.
            parts = self.pieces(type_for_many(), expert, self.order.described(self.outputs, scaled=False))
            scales = self.tiles[:, : TILE * torch.bfloat16.itemsize].view(torch.bfloat16).flatten()[: self.outputs]
            return multiply_by_parts(rows, self.outputs, parts).mul_(scales)
        halves = len(rows) >= PLAIN_LOOPS_FROM and rows.device.type == "cpu" and rows.dtype == torch.bfloat16
        dtype = type_for_many() if halves else rows.dtype
        return multiply_by_parts(rows, self.outputs, self.pieces(dtype, expert))

    def dequantised(self, dtype: torch.dtype, expert: int = 0) -> Tensor:
        """The weight as numbers, `[outputs, inputs]`; `expert`: whose weight, where the tiles are those of several
        experts."""
        found = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.tiles.device)
        for piece, place in zip(self.pieces(dtype, expert), found.split(self._piece_tiles() * TILE), strict=True):
            place.copy_(piece)
        return found

    def rows(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights of some outputs, `[len(indices), inputs]`, as an embedding needs them."""
        found = torch.empty(len(indices), self.inputs, dtype=torch.float32, device=self.tiles.device)
        if self._has_kernel:
            dequantise_grouped(self.description, self.tiles, found, indices)
            return found.to(dtype)
        most = self._piece_tiles()
        for to, some in zip(found.split(most), indices.split(most), strict=True) if len(indices) else ():
            codes = self.order.unpacked(self.tiles[some // TILE])
            lanes = torch.arange(len(some), device=some.device) * TILE + some % TILE
            to.copy_(codes.of_outputs(lanes).to_floats(self.layout))
        return found.to(dtype)

    def _piece_tiles(self) -> int:
        """The number of tiles that are converted to floats at a time."""
        if self.tiles.device.type == "cpu":
            return outputs_at_a_time(self.inputs) // TILE
        return max(1, _LARGE_PIECE // (TILE * self.inputs))

    def pieces(self, dtype: torch.dtype, expert: int = 0, description: Tensor | None = None) -> Iterator[Tensor]:
        """The weight in floats, some outputs at a time. A piece is valid until the next piece is requested.

        `description`: replaces the weight's own description for kernels.
        """
        tiles = -(-self.outputs // TILE)
        halves = dtype == torch.bfloat16 and self.has_fast_kernel and multiplies_bfloat16()
        room: Tensor | None = None
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
                piece = self.order.unpacked(some).to_floats(self.layout)[:count]
            yield piece.to(dtype)


class JoinedWeight(WeightForm):
    """One weight, or the weights of many experts, each `[outputs, inputs]`, in parts of different layouts. Each part
    has the tiles of its outputs for all experts."""

    def __init__(self, parts: Sequence[BlockQuantWeight], experts: int = 1) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleList(parts)
        self.experts = experts
        self.outputs, self.inputs = sum(part.outputs for part in parts), parts[0].inputs

    @property
    def rows_are_independent(self) -> bool:
        return all(part.rows_are_independent for part in self.parts)

    def many_from(self, dtype: torch.dtype) -> int:
        """The number of rows of an expert from which `multiply_many` is faster than a kernel."""
        return min(EXPERTS_FROM, max(part.many_from(dtype) for part in self.parts))

    def multiply(self, rows: Tensor, experts: Tensor | None = None) -> Tensor:
        """`[n, inputs]` -> `[n, outputs]`, in the type of `rows`: each row times the weight of its expert.

        Consecutive rows of an expert read its weight once. `experts`: `[n]`, int64; None: there is one weight. Raises
        IndexError for an unknown expert.
        """
        products = rows.new_empty(len(rows), self.outputs)
        for part, columns in self._places():
            part.multiply_into(products[:, columns], rows, experts, self.experts)
        return products

    def multiply_many(self, rows: Tensor, expert: int) -> Tensor:
        """Multiplies many rows of one expert, by converting its weight to floats."""
        return torch.cat([part.multiply_many(rows, expert) for part in self.parts], dim=-1)

    def dequantised(self, dtype: torch.dtype, expert: int = 0) -> Tensor:
        """The weight of one expert as numbers, `[outputs, inputs]`: a new tensor. Raises IndexError for an unknown
        expert."""
        if not 0 <= expert < self.experts:
            raise IndexError(f"there are {self.experts} experts, and {expert} is asked for")
        return torch.cat([part.dequantised(dtype, expert) for part in self.parts])

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part.pieces(dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `BlockQuantWeight.rows`."""
        found = torch.empty(len(indices), self.inputs, dtype=dtype, device=indices.device)
        for part, outputs in self._places():
            within = (indices >= outputs.start) & (indices < outputs.stop)
            found[within] = part.rows(indices[within] - outputs.start, dtype)
        return found

    def _places(self) -> Iterator[tuple[BlockQuantWeight, slice]]:
        """Each part with its slice of the outputs."""
        begin = 0
        for part in self.parts:
            yield part, slice(begin, begin + part.outputs)
            begin += part.outputs


def runs(experts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each run of consecutive rows with the same expert: the expert and its rows."""
    begin = 0
    for expert, count in torch.stack(experts.unique_consecutive(return_counts=True)).T.tolist():
        yield expert, slice(begin, begin + count)
        begin += count


def held_bytes(layout: CodeLayout, outputs: int, inputs: int) -> int:
    """Bytes of a weight that `hold_stored` holds. Raises UnsupportedModel if such a layout cannot be held."""
    return -(-outputs // TILE) * TileLayout.of(layout, inputs).tile_bytes


def hold_stored(matrices: Sequence[StoredMatrix], device: torch.device) -> BlockQuantWeight | JoinedWeight:
    """Holds matrices of consecutive outputs in the codes in which they are stored.

    Raises UnsupportedModel if a layout cannot be held.
    """
    forms: list[BlockQuantWeight] = []
    for _, alike in groupby(matrices, lambda matrix: matrix.layout):
        some = list(alike)
        forms.append(BlockQuantWeight.from_codes(some[0].layout, [matrix.read() for matrix in some], device))
    return forms[0] if len(forms) == 1 else JoinedWeight(forms)


def hold_experts(stored: PackedTensor, device: torch.device) -> JoinedWeight:
    """Holds the weights of experts, which are read one at a time. `stored` may be transposed or not.

    Raises UnsupportedModel if a layout cannot be held, or the layouts of experts differ.
    """
    kinds = [[(matrix.layout, matrix.shape) for matrix in matrices] for matrices in stored.experts]
    if any(kind != kinds[0] for kind in kinds):
        raise UnsupportedModel("experts that are stored in different ways cannot be held together")
    passing = partial(torch.empty, dtype=torch.uint8)  # these tiles are copied and freed at once
    parts: list[BlockQuantWeight] = []
    begin = 0
    for layout, alike in groupby(kinds[0], lambda kind: kind[0]):
        shapes = [shape for _, shape in alike]
        end = begin + len(shapes)
        found: tuple[TileLayout, Tensor] | None = None
        for index, matrices in enumerate(stored.experts):
            order, tiles = _tiles_of(layout, [matrix.read() for matrix in matrices[begin:end]], passing)
            if found is None:
                found = order, in_large_pages(len(stored.experts) * len(tiles), order.tile_bytes)
            elif order != found[0]:
                raise UnsupportedModel("experts whose scales are of different types cannot be held together")
            found[1][index * len(tiles) : (index + 1) * len(tiles)] = tiles
        assert found is not None
        parts.append(BlockQuantWeight(found[0], sum(outputs for outputs, _ in shapes), found[1].to(device)))
        begin = end
    return JoinedWeight(parts, len(stored.experts))


def _tiles_of(
    layout: CodeLayout, below: Sequence[Codes], room: Callable[[int, int], Tensor] = in_large_pages
) -> tuple[TileLayout, Tensor]:
    """The tiles of codes of consecutive outputs."""
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
