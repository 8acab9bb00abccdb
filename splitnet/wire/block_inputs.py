"""Values that blocks read besides hidden states, such as rotary positions with several axes, or features of an image.

A step or pass carries them after its activations. They travel from hop to hop unchanged, up to the last block that
reads them, and logs keep them for replays.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from splitnet.errors import ProtocolError
from splitnet.wire.codecs import codec_by_code
from splitnet.wire.fields import packb, row, several, text, uint, unpack_array
from splitnet.wire.messages import (
    EVERY_BLOCK,
    MAX_INPUT_BYTES,
    MAX_INPUTS,
    MAX_POSITIONS,
    BlockInput,
    Chunk,
    Forward,
    Payload,
    Step,
)

POSITIONS = "position_ids"
"""Rotary positions, `[positions, axes]`, where they are not the numbers of the positions in the row."""

GROUPS = "attention_groups"
"""Numbers of groups, `[positions, 1]`. Neighbours with the same number other than 0 attend to each other in both
directions. The number is a digest of the group, so that page labels depend on the whole group."""

WINDOW_GROUPS = "window_attention_groups"
"""As `GROUPS`, but only in blocks with a sliding window, and only within the window."""

ADDED = "added_states"
"""`[positions, hidden]`, added to the hidden states before a block."""

PER_LAYER = "per_layer_input"
"""`[positions, size]`, a second input of a block for every position; `size` is the same in all blocks."""

_OF_GROUPS = (GROUPS, WINDOW_GROUPS)
INTEGER_BYTES = 8
MAX_ROTARY = (1 << 31) - 1  # largest rotary position
MAX_GROUP = 2048  # positions of a group, which must run in one pass

_PAGE_FIELDS = several(
    row(BlockInput, text(32), *map(uint, (EVERY_BLOCK, 0, MAX_POSITIONS, MAX_POSITIONS, MAX_INPUT_BYTES, 255))),
    most=MAX_INPUTS,
)


def values_of(inputs: Sequence[BlockInput], data: Payload) -> Iterator[tuple[BlockInput, memoryview]]:
    """Each block input with its values. data: the values of all, concatenated."""
    view, offset = memoryview(data), 0
    for each in inputs:
        end = offset + each.length * each.size
        yield each, view[offset:end]
        offset = end


def check_groups(step: Step | Forward) -> None:
    """Raises ProtocolError: a group of positions is too long for one pass."""
    groups = groups_of(step)
    if any(len(list(same)) > MAX_GROUP for group, same in groupby(groups) if group):
        raise ProtocolError(f"a group of positions that attend to each other has more than {MAX_GROUP} positions")


def check_inputs(inputs: Iterable[BlockInput], parts: Sequence[Chunk]) -> None:
    """Raises ProtocolError: a block input is outside the parts of its step, or overlaps another one."""
    ranges = {part.row: range(part.start, part.start + part.length + 1) for part in parts}
    ends: dict[tuple[str, int, int], int] = {}
    for each in inputs:
        key, end = (each.name, each.block, each.row), each.start + each.length
        within = ranges.get(each.row, range(0))
        if not each.length or not each.size or each.start not in within or end not in within:
            raise ProtocolError(f"the block input {each.name} has positions that its step does not have")
        if each.start < ends.get(key, 0):
            raise ProtocolError(f"the block input {each.name} has a position twice, or is not in order")
        ends[key] = end


def check_block_inputs(
    inputs: Iterable[BlockInput],
    hidden_size: int,
    blocks: range,
    *,
    axes: int,
    joins: bool,
    per_layer: int = 0,
    parts: Sequence[Chunk] = (),
) -> None:
    """Raises ProtocolError, CodecError: these blocks do not read a block input, its values have another size, or a
    block lacks an input.

    axes: most axes of a rotary position. joins: whether positions can attend to later ones, and states be added.
    per_layer: values per position of `PER_LAYER`, which each position of `parts` needs in each block; 0: blocks have no
    such input. Blocks must read all inputs of a step, because steps of other sessions share its pass.
    """
    given: Counter[tuple[int, int]] = Counter()
    for each in inputs:
        if each.name == PER_LAYER and per_layer:
            if each.block < blocks.start or each.size != codec_by_code(each.codec).bytes_per_position(per_layer):
                raise ProtocolError(f"the block input {each.name} has another block or size than blocks read")
            given[each.row, each.block] += each.length
        elif each.name != POSITIONS and not joins:
            raise ProtocolError(f"blocks of this family do not read {each.name!r}: use a text without images")
        elif each.name == POSITIONS or each.name in _OF_GROUPS:
            integers = (1, axes) if each.name == POSITIONS else (1,)
            if each.block != EVERY_BLOCK or each.size not in (width * INTEGER_BYTES for width in integers):
                raise ProtocolError(f"the block input {each.name} has another block or size than blocks read")
        elif each.name != ADDED:
            raise ProtocolError(f"blocks do not read {each.name!r}: upgrade this peer, or use a model without it")
        elif each.block < blocks.start or each.size != codec_by_code(each.codec).bytes_per_position(hidden_size):
            raise ProtocolError(f"the block input {each.name} has another block or size than blocks read")
    for block in blocks if per_layer else ():
        if any(given[part.row, block] < part.length for part in parts):
            raise ProtocolError(f"block {block} needs {PER_LAYER!r} for each position: upgrade the sender")


def passed_on(step: Step | Forward, output: Payload, block: int) -> tuple[Payload, tuple[BlockInput, ...]]:
    """The payload and the block inputs for the next hop, after blocks that end at `block`: the encoded output, and the
    inputs of later blocks."""
    if not step.inputs:
        return output, ()
    kept = [(each, data) for each, data in values_of(step.inputs, step.input_bytes) if each.block >= block]
    return b"".join((output, *(data for _, data in kept))), tuple(each for each, _ in kept)


def end_of_group(group_at: Callable[[int], object], end: int, length: int) -> int:
    """The first position from `end` on at which a text of `length` positions can be cut without cutting a group.
    group_at: returns the group of a position; a false value: none."""
    while 0 < end < length and group_at(end - 1) and group_at(end - 1) == group_at(end):
        end += 1
    return end


def groups_of(step: Step | Forward) -> list[bytes]:
    """The group of each position of a step, in the order of its parts; empty: none. No list: there are no groups."""
    found: dict[tuple[int, int], bytes] = {}
    for each, data in values_of(step.inputs, step.input_bytes):
        if each.name in _OF_GROUPS:
            for index in range(each.length):
                found[each.row, each.start + index] = bytes(data[index * each.size : (index + 1) * each.size])
    if not found:
        return []
    return [found.get((part.row, part.start + at), b"") for part in step.parts for at in range(part.length)]


class _Kind(NamedTuple):
    """Block inputs that differ only in their positions."""

    name: str
    block: int
    size: int
    codec: int


@dataclass(slots=True)
class _Run:
    """Values of consecutive positions from `start` on."""

    start: int
    data: bytearray


@dataclass(slots=True)
class RowInputs:
    """The block inputs of a row in a log. Their division into steps does not matter."""

    _runs: dict[_Kind, list[_Run]] = field(default_factory=dict[_Kind, list[_Run]])

    def copy(self) -> RowInputs:
        return RowInputs(
            {kind: [_Run(run.start, bytearray(run.data)) for run in runs] for kind, runs in self._runs.items()}
        )

    @property
    def nbytes(self) -> int:
        return sum(len(run.data) for runs in self._runs.values() for run in runs)

    @property
    def position_bytes(self) -> int:
        """Upper limit of the bytes of one position."""
        return sum(kind.size for kind in self._runs)

    def add(self, given: BlockInput, data: Payload) -> None:
        """Appends the values of positions after all earlier positions of this kind."""
        runs = self._runs.setdefault(_Kind(given.name, given.block, given.size, given.codec), [])
        if not runs or runs[-1].start + len(runs[-1].data) // given.size != given.start:
            runs.append(_Run(given.start, bytearray()))
        runs[-1].data += data

    def crop(self, length: int) -> None:
        """Forgets positions from `length` on."""
        for kind, runs in list(self._runs.items()):
            left = [run for run in runs if run.start < length]
            for run in left:
                del run.data[(length - run.start) * kind.size :]
            self._runs[kind] = left
            if not left:
                del self._runs[kind]

    def cut(self, begin: int, end: int, row: int = 0) -> tuple[tuple[BlockInput, ...], bytes]:
        """The block inputs of positions `[begin, end)` with the number `row`, and their values."""
        found: list[tuple[BlockInput, bytes]] = []
        for kind, runs in self._runs.items():
            for run in runs:
                first, last = max(begin, run.start), min(end, run.start + len(run.data) // kind.size)
                if first < last:
                    within = slice((first - run.start) * kind.size, (last - run.start) * kind.size)
                    given = BlockInput(kind.name, kind.block, row, first, last - first, kind.size, kind.codec)
                    found.append((given, bytes(run.data[within])))
        found.sort()
        return tuple(given for given, _ in found), b"".join(data for _, data in found)

    def group_at(self, position: int) -> bytes:
        """The group of a position; empty: none."""
        for kind, runs in self._runs.items():
            for run in runs if kind.name in _OF_GROUPS else ():
                at = (position - run.start) * kind.size
                if 0 <= at < len(run.data):
                    return bytes(run.data[at : at + kind.size])
        return b""


def pack_inputs(inputs: Sequence[BlockInput], data: bytes, begin: int) -> bytes:
    """Block inputs of a stored page from position `begin` on, as bytes; empty if there are none."""
    if not inputs:
        return b""
    header = packb([list(each._replace(start=each.start - begin)) for each in inputs])
    return struct.pack("<I", len(header)) + header + data


def unpack_inputs(packed: bytes, positions: int) -> list[tuple[BlockInput, memoryview]]:
    """The block inputs that `pack_inputs` has packed, with positions counted from the begin of the page. Raises
    ProtocolError: they are malformed. positions: of the page."""
    if not packed:
        return []
    (size,) = struct.unpack("<I", packed[:4].ljust(4, b"\0"))
    header, data = packed[4 : 4 + size], packed[4 + size :]
    inputs = _PAGE_FIELDS(unpack_array(header, most_items=MAX_INPUTS, most_text=128, most_bytes=0))
    check_inputs(inputs, [Chunk(0, 0, positions, 0)])
    if len(data) != sum(each.length * each.size for each in inputs):
        raise ProtocolError("the block inputs of a page have another size than they say")
    return list(values_of(inputs, data))
