"""The memory layout of weights in codes, for kernels that read them from front to back.

A weight consists of tiles of `TILE` outputs, and a tile of panels of some hundred inputs. A panel first has the scales,
and zeros, of its codes: for each group, the numbers of all outputs of the tile. The codes of every `CHUNK` inputs
follow. The codes of a chunk are eight vectors of 64 bytes, each with four inputs of every output. Codes with fewer than
eight bits share bytes: as many vectors as fit share a stored vector, and for three, five and six bits the other vectors
are split over the free bits of the stored vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from math import lcm
from struct import pack

import torch
from torch import Tensor

from splitnet.errors import UnsupportedModel
from splitnet.quant.native import multiplies_bfloat16
from splitnet.quant.packed_tensor import STEPS_GROUP, TABLES, CodeLayout, Codes, ScaleFormat

TILE = 16  # outputs that are stored together
CHUNK = 32  # inputs whose codes are stored together
_VECTORS, _RUN = 8, 4  # vectors per chunk; inputs per output in one vector
# Minimum inputs of a panel. The number of inputs of a panel is the smallest suitable multiple of the layout's group.
_PANEL = 512
_LINE = 64
_PIECES = {
    2: (),
    3: (((0, 6, 2), (2, 6, 1)), ((1, 6, 2), (2, 7, 1))),
    4: (),
    5: (((0, 5, 3), (1, 5, 2)), ((2, 5, 3), (3, 5, 2)), ((4, 5, 3), (1, 7, 1), (3, 7, 1))),
    6: (((0, 6, 2), (1, 6, 2), (2, 6, 2)), ((3, 6, 2), (4, 6, 2), (5, 6, 2))),
    8: (),
}
"""Pieces of the last vectors of a chunk, lowest bits first: the stored vector, the first bit in it, the number of
bits."""

_TYPES = {ScaleFormat.FLOAT16: torch.float16, ScaleFormat.BFLOAT16: torch.bfloat16, ScaleFormat.FLOAT32: torch.float32}
_TYPES |= {ScaleFormat.E8M0: torch.uint8, ScaleFormat.CODES: torch.uint8}
_NUMBERS = {
    ScaleFormat.FLOAT16: 0,
    ScaleFormat.BFLOAT16: 1,
    ScaleFormat.FLOAT32: 2,
    ScaleFormat.E8M0: 3,
    ScaleFormat.CODES: 8,
    ScaleFormat.NONE: 9,
}
_STEPS, _UNSIGNED_STEPS, _LOWER_STEPS, _UPPER_STEPS, _ONES = 4, 5, 6, 7, 10
"""Values of `enum number` in `native/grouped.h`."""

_PLAIN, _TABLE, _FLOAT_TABLE, _E4M3, _E5M2, _ANY = range(6)  # values of `enum code` in `native/grouped.h`


@dataclass(frozen=True)
class TileLayout:
    """The layout of the tiles of a weight."""

    layout: CodeLayout
    inputs: int
    scale_type: torch.dtype  # type of the stored scale of each group
    zero_type: torch.dtype | None
    nibbles: bool  # whether the steps of scale and zero share a byte, with the scale's step in the lower half
    finite: bool = True  # whether no code is NaN; otherwise plain loops multiply e4m3

    @classmethod
    def of(cls, layout: CodeLayout, inputs: int, codes: Codes | None = None) -> TileLayout:
        """The tile layout for weights with `inputs` inputs; `codes` show which steps are signed, where that matters.

        Raises UnsupportedModel if such a layout cannot be held, and ValueError if the codes do not fit the layout.
        """
        group = layout.group
        steps = ScaleFormat.STEPS in (layout.scale, layout.zero)
        if (
            layout.bits not in _PIECES
            or (group not in (0, 8, 16) and group % CHUNK)
            or (steps and (not group or STEPS_GROUP % group))
            or layout.scale in (ScaleFormat.CODES, ScaleFormat.NONE)
            or layout.zero is ScaleFormat.E8M0
            or (layout.table and len(TABLES[layout.table]) != 1 << layout.bits)
        ):
            raise UnsupportedModel(f"weights cannot be held as {layout}: use a checkpoint in another format")
        types = [
            (torch.int8 if stored is None else stored.dtype) if kind is ScaleFormat.STEPS else _TYPES.get(kind)
            for kind, stored in ((layout.scale, codes and codes.scales), (layout.zero, codes and codes.zeros))
        ]
        assert types[0] is not None
        if codes is not None:
            found = [codes.scales, codes.zeros, codes.scale_units, codes.zero_units]
            units = [torch.float16 if kind is ScaleFormat.STEPS else None for kind in (layout.scale, layout.zero)]
            stored = [None if one is None else one.dtype for one in found]
            if codes.codes.dtype != torch.uint8 or stored != [*types, *units]:
                raise ValueError(f"codes of {layout} with scales and zeros of the types {stored}")
        nibbles = layout.bits == 2 and layout.scale is ScaleFormat.STEPS and layout.zero is ScaleFormat.STEPS
        return cls(layout, inputs, types[0], types[1], nibbles)

    @cached_property
    def panel(self) -> int:  # in inputs
        if not self.layout.group:
            return -(-self.inputs // CHUNK) * CHUNK
        unit = lcm(
            self.layout.group, CHUNK, STEPS_GROUP if ScaleFormat.STEPS in (self.layout.scale, self.layout.zero) else 1
        )
        return -(-_PANEL // unit) * unit

    def sections(self, inputs: int) -> list[int]:
        """Bytes of the sections of a panel: scales, zeros, units of scales, units of zeros, padding, codes."""
        groups = -(-inputs // self.layout.group) if self.layout.group else 1
        units = [
            2 * -(-inputs // STEPS_GROUP) * (kind is ScaleFormat.STEPS)
            for kind in (self.layout.scale, self.layout.zero)
        ]
        zeros = 0 if self.zero_type is None or self.nibbles else self.zero_type.itemsize
        sizes = [TILE * size for size in (groups * self.scale_type.itemsize, groups * zeros, *units)]
        return [*sizes, -sum(sizes) % _LINE, -(-inputs // CHUNK) * _LINE * self.layout.bits]

    @cached_property
    def pairs(self) -> bool:
        """Whether a vector has the first two of the four inputs of all outputs first, then the other two."""
        return self.layout.table == "e5m2" or (self.layout.table == "e4m3" and not multiplies_bfloat16())

    @property
    def has_fast_kernel(self) -> bool:
        """Whether there are fast kernels for this layout on some CPUs, besides plain loops."""
        return self._code != _ANY

    @property
    def for_integers(self) -> bool:
        """Whether the fast kernel multiplies integers."""
        return self._code <= _TABLE

    @property
    def _code(self) -> int:
        code = _table_code(self.layout.table)[0] if self.layout.table else _PLAIN
        floats_with_zeros = code > _TABLE and self.layout.zero is not ScaleFormat.NONE
        return _ANY if floats_with_zeros or self.layout.group == 8 or not self.finite else code

    def described(self, outputs: int, *, scaled: bool = True) -> Tensor:
        """The description of a weight of `outputs` outputs, int64, as `Grouped` in `native/grouped.h`; not `scaled`:
        with scales of 1."""
        layout = self.layout
        zero = _NUMBERS.get(layout.zero, _UNSIGNED_STEPS if self.zero_type is torch.uint8 else _STEPS)
        scale = _NUMBERS.get(layout.scale, _UNSIGNED_STEPS if self.scale_type is torch.uint8 else _STEPS)
        if self.nibbles:
            scale, zero = _LOWER_STEPS, _UPPER_STEPS
        if not scaled:
            scale = _ONES
        _, factor, at = _table_code(layout.table) if layout.table else (_PLAIN, 1.0, 0)
        sizes = [0 if each is None else TILE * each.itemsize for each in (self.scale_type, self.zero_type)]
        numbers = [self._code, layout.bits, layout.group, self.panel, self.inputs, outputs, layout.offset, scale, zero]
        numbers += [sizes[0], 0 if self.nibbles else sizes[1], self.tile_bytes, self.pairs]
        words, unit = _words(layout.table) if self._code == _FLOAT_TABLE else (None, 1.0)
        addresses = [at, _values(layout).data_ptr(), 0 if words is None else words.data_ptr()]
        packed = pack("13qd3qd", *numbers, factor, *addresses, unit)
        return torch.frombuffer(bytearray(packed), dtype=torch.int64)

    @cached_property
    def tile_bytes(self) -> int:
        return sum(count * sum(self.sections(inputs)) for _, count, inputs in self.ranges())

    def ranges(self) -> list[tuple[int, int, int]]:
        """Groups of equal panels: the first input, the number of panels and the inputs of each panel."""
        whole, rest = divmod(self.inputs, self.panel)
        found = [(0, whole, self.panel)] if whole else []
        return [*found, (whole * self.panel, 1, rest)] if rest else found

    def packed(self, codes: Codes) -> Tensor:
        """`[tiles, tile_bytes]`, uint8."""
        tiles = -(-len(codes.codes) // TILE)
        parts = [self._packed_panels(codes, tiles, *found) for found in self.ranges()]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _packed_panels(self, codes: Codes, tiles: int, start: int, count: int, inputs: int) -> Tensor:
        sizes = self.sections(inputs)

        def numbers(stored: Tensor | None, group: int) -> Tensor:
            """The numbers of each group of a panel: `[tiles, panels, bytes]`."""
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
        # Runs of inputs are transposed as 32-bit numbers.
        runs = some.contiguous().view(torch.int32).view(tiles, TILE, count, chunks, _VECTORS)
        vectors = runs.permute(0, 2, 3, 4, 1).contiguous().view(torch.uint8)
        if self.pairs:
            vectors = vectors.view(tiles, count, chunks, _VECTORS, TILE, 2, 2).transpose(4, 5).contiguous()
        vectors = vectors.view(tiles, count, chunks, _VECTORS, TILE * _RUN)
        bits = self.layout.bits
        whole = bits * (8 // bits)
        together = vectors[..., :whole, :].unflatten(-2, (bits, 8 // bits))
        stored = together[..., 0, :].clone()
        for index in range(1, 8 // bits):
            stored |= together[..., index, :] << index * bits
        for vector, pieces in enumerate(_PIECES[bits], whole):
            shift = 0
            for place, at, some_bits in pieces:
                stored[..., place, :] |= (vectors[..., vector, :] >> shift & (1 << some_bits) - 1) << at
                shift += some_bits
        return torch.cat([scales, zeros, *units, padding, stored.flatten(2)], dim=-1).flatten(1)

    def unpacked(self, tiles: Tensor) -> Codes:
        """The codes that `packed` was given, with the padding outputs of the last tile."""
        begin = 0
        parts: list[list[Tensor]] = []
        for _, count, inputs in self.ranges():
            width = count * sum(self.sections(inputs))
            parts.append(self._unpacked_panels(tiles[:, begin : begin + width], count, inputs))
            begin += width
        codes, scales, zeros, scale_units, zero_units = [
            torch.cat([part[index] for part in parts], dim=1) for index in range(len(parts[0]))
        ]
        some = [one if one.shape[1] else None for one in (zeros, scale_units, zero_units)]
        return Codes(codes[:, : self.inputs], scales, *some)

    def _unpacked_panels(self, panels: Tensor, count: int, inputs: int) -> list[Tensor]:
        tiles = len(panels)
        sizes = self.sections(inputs)
        scales, zeros, *units, _, stored = list(panels.view(tiles, count, -1).split(sizes, dim=-1))
        if self.nibbles:
            scales, zeros = scales & 15, scales >> 4

        def numbers(stored: Tensor, dtype: torch.dtype | None) -> Tensor:
            some = stored.contiguous().view(dtype or torch.uint8).view(tiles, count, -1, TILE)
            return some.permute(0, 3, 1, 2).reshape(tiles * TILE, -1)

        chunks = -(-inputs // CHUNK)
        bits = self.layout.bits
        stored = stored.view(tiles, count, chunks, bits, _LINE)
        vectors = stored
        if bits < 8:
            shifts = torch.arange(0, 9 - bits, bits, dtype=torch.uint8, device=panels.device)[:, None]
            vectors = (stored[..., None, :] >> shifts & (1 << bits) - 1).flatten(3, 4)
        if _PIECES[bits]:
            rest = torch.zeros_like(stored[..., : len(_PIECES[bits]), :])
            for vector, pieces in enumerate(_PIECES[bits]):
                shift = 0
                for place, at, some_bits in pieces:
                    rest[..., vector, :] |= (stored[..., place, :] >> at & (1 << some_bits) - 1) << shift
                    shift += some_bits
            vectors = torch.cat([vectors, rest], dim=-2)
        if self.pairs:
            vectors = vectors.view(tiles, count, chunks, _VECTORS, 2, TILE, 2).transpose(4, 5)
        runs = vectors.reshape(tiles, count, -1).view(torch.int32).view(tiles, count, chunks, _VECTORS, TILE)
        runs = runs.permute(0, 4, 1, 2, 3).contiguous().view(tiles * TILE, count * chunks * _VECTORS)
        codes = runs.view(torch.uint8).view(tiles * TILE, count, chunks * CHUNK)[..., :inputs].flatten(1)
        of_units = [numbers(one, torch.float16) for one in units]
        return [codes, numbers(scales, self.scale_type), numbers(zeros, self.zero_type), *of_units]


@cache
def _values(layout: CodeLayout) -> Tensor:
    return TABLES[layout.table] if layout.table else torch.arange(1 << layout.bits).float() - layout.offset


@cache
def _bytes(table: str) -> tuple[Tensor, float] | None:
    """Bytes such that `(byte - 128) * factor` is the value of each code of a table, and the factor; None: no such bytes
    exist."""
    values = TABLES[table]
    for factor in (1.0, 0.5):
        whole = values / factor + 128
        if len(values) == 16 and torch.equal(whole, whole.round()) and whole.min() >= 0 and whole.max() <= 255:
            return whole.to(torch.uint8), factor
    return None


@cache
def _words(table: str) -> tuple[Tensor, float]:
    """Words of at most 8191 that, times a unit, come closest to the values of the codes of a table, and the unit."""
    values = TABLES[table].double()
    largest = values.abs().max()
    scaled = values / largest * torch.arange(4096, 8192)[:, None]
    found = scaled[(scaled - scaled.round()).abs().amax(1).argmin()]
    return found.round().short(), float(largest / found.abs().max())


def _table_code(table: str) -> tuple[int, float, int]:
    """The `enum code` of a table, its factor, and the address of its bytes."""
    if table in (known := {"e4m3": (_E4M3, 256.0, 0), "e5m2": (_E5M2, 1.0, 0)}):
        return known[table]
    found = _bytes(table)
    return (_FLOAT_TABLE, 1.0, 0) if found is None else (_TABLE, found[1], found[0].data_ptr())


def _padded(tensor: Tensor, outputs: int, width: int) -> Tensor:
    if tensor.shape == (outputs, width):
        return tensor
    whole = tensor.new_zeros(outputs, width)
    whole[: tensor.shape[0], : tensor.shape[1]] = tensor
    return whole
