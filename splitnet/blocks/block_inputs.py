"""Block inputs as tensors: how a client encodes them for a step, and how a peer reads them; see
`splitnet.wire.block_inputs`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from splitnet.errors import CodecError, ProtocolError
from splitnet.wire.block_inputs import (
    ADDED,
    GROUPS,
    INTEGER_BYTES,
    MAX_ROTARY,
    PER_LAYER,
    POSITIONS,
    WINDOW_GROUPS,
    end_of_group,
    values_of,
)
from splitnet.wire.codecs import Codec, check_values, codec_by_code
from splitnet.wire.messages import EVERY_BLOCK, MAX_INPUTS, BlockInput, Chunk, Payload


@dataclass(frozen=True)
class PositionInputs:
    """Block inputs of `count` consecutive positions of one row.

    positions: rotary positions, `[count, axes]`, int64, or with one column if all axes are equal; None: the numbers of
    the positions. groups: `[count]`, int64, see `GROUPS`; None: no groups. added: by block, `[count, hidden]`.
    windowed: the groups are `WINDOW_GROUPS`. per_layer: by block, `[count, size]`, see `PER_LAYER`.
    """

    positions: Tensor | None = None
    groups: Tensor | None = None
    added: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    windowed: bool = False
    per_layer: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __bool__(self) -> bool:
        return self.positions is not None or self.groups is not None or bool(self.added or self.per_layer)

    def cut(self, begin: int, end: int) -> PositionInputs:
        """The inputs of some of these positions."""
        return self.at(slice(begin, end))

    def at(self, places: slice | Tensor) -> PositionInputs:
        """The inputs of some of these positions; a tensor, `[count]` bool, is true for them."""
        if not self:
            return self
        positions, groups = (None if each is None else each[places] for each in (self.positions, self.groups))
        added, per_layer = (
            {block: values[places] for block, values in each.items()} for each in (self.added, self.per_layer)
        )
        return PositionInputs(positions, groups, added, self.windowed, per_layer)

    def of_blocks(self, start: int, end: int) -> PositionInputs:
        """The inputs that blocks `[start, end)` read."""
        added, per_layer = (
            {block: values for block, values in each.items() if start <= block < end}
            for each in (self.added, self.per_layer)
        )
        return replace(self, added=added, per_layer=per_layer)

    def end_of_group(self, end: int) -> int:
        """The first position from `end` on at which these positions can be cut without cutting a group."""
        groups = self.groups
        return end if groups is None else end_of_group(lambda position: int(groups[position]), end, len(groups))

    def encode(self, chunk: Chunk, codec: Codec) -> list[tuple[BlockInput, bytes]]:
        """The wire form of these inputs, for the positions of `chunk`. Raises CodecError: values cannot be encoded."""
        found: list[tuple[BlockInput, bytes]] = []
        numbers = range(chunk.start, chunk.start + chunk.length)
        if self.positions is not None and self.positions.tolist() != [[n] * self.positions.shape[1] for n in numbers]:
            found.append(_integers(POSITIONS, chunk, 0, _narrow(self.positions)))
        if self.groups is not None:
            name = WINDOW_GROUPS if self.windowed else GROUPS
            found += [_integers(name, chunk, each.start, self.groups[each, None]) for each in _runs(self.groups)]
        for name, by_block in ((ADDED, self.added), (PER_LAYER, self.per_layer)):
            for block, values in by_block.items():
                for each in _runs(values.any(dim=1)) if name == ADDED else [slice(0, chunk.length)]:
                    data = codec.encode(values[each])
                    start, length = chunk.start + each.start, each.stop - each.start
                    given = BlockInput(name, block, chunk.row, start, length, len(data) // length, codec.code)
                    found.append((given, data))
        return found


def _narrow(positions: Tensor) -> Tensor:
    """`[count, 1]` if all axes are equal."""
    return positions[:, :1] if bool((positions == positions[:, :1]).all()) else positions


def _integers(name: str, chunk: Chunk, offset: int, values: Tensor) -> tuple[BlockInput, bytes]:
    data = values.to("cpu", torch.int64).contiguous().numpy().tobytes()
    length, width = values.shape
    given = BlockInput(name, EVERY_BLOCK, chunk.row, chunk.start + offset, length, width * INTEGER_BYTES, 0)
    return given, data


def _runs(wanted: Tensor) -> list[slice]:
    """The ranges of consecutive true values."""
    found: list[slice] = []
    begin = 0
    for value, group in groupby(wanted.bool().tolist()):
        end = begin + sum(1 for _ in group)
        if value:
            found.append(slice(begin, end))
        begin = end
    return found


def encode_step(
    hidden: Tensor, chunks: Sequence[Chunk], inputs: Sequence[PositionInputs], codec: Codec
) -> tuple[bytes, tuple[BlockInput, ...]]:
    """The payload of a step or pass, and its block inputs. hidden: `[positions, hidden]` of all chunks. inputs: of each
    chunk; empty: none. Raises CodecError: values cannot be encoded, or there are too many ranges of block inputs."""
    payload = codec.encode(hidden)
    encoded = [pair for chunk, own in zip(chunks, inputs, strict=False) for pair in own.encode(chunk, codec)]
    if len(encoded) > MAX_INPUTS:
        raise CodecError(f"{len(encoded)} ranges of block inputs are more than {MAX_INPUTS}: give fewer images at once")
    if not encoded:
        return payload, ()
    return b"".join((payload, *(data for _, data in encoded))), tuple(given for given, _ in encoded)


def decode_inputs(
    inputs: Sequence[BlockInput],
    data: Payload,
    chunks: Iterable[Chunk],
    hidden_size: int,
    blocks: range,
    per_layer: int = 0,
) -> list[PositionInputs]:
    """The block inputs that `blocks` read, for each chunk. Raises ProtocolError, CodecError: values are not usable.

    per_layer: values per position of `PER_LAYER`.
    """
    found: list[PositionInputs] = []
    by_row: defaultdict[int, list[tuple[BlockInput, memoryview]]] = defaultdict(list)
    for pair in values_of(inputs, data):
        by_row[pair[0].row].append(pair)
    sizes = {ADDED: hidden_size, PER_LAYER: per_layer}
    for chunk in chunks:
        own: dict[str, Any] = {}
        of_blocks: dict[str, dict[int, Tensor]] = {ADDED: {}, PER_LAYER: {}}
        for each, encoded in by_row[chunk.row]:
            first, last = max(chunk.start, each.start), min(chunk.start + chunk.length, each.start + each.length)
            if first >= last or (each.name in sizes and each.block not in blocks):
                continue
            cut = encoded[(first - each.start) * each.size : (last - each.start) * each.size]
            within = slice(first - chunk.start, last - chunk.start)
            if (size := sizes.get(each.name)) is not None:
                check_values(each.codec, cut, last - first, size)
                states = codec_by_code(each.codec).decode(cut, last - first, size)
                by_block = of_blocks[each.name]
                if last - first == chunk.length:
                    by_block[each.block] = states
                    continue
                if each.block not in by_block:
                    by_block[each.block] = torch.zeros(chunk.length, size, dtype=states.dtype)
                by_block[each.block][within] = states
                continue
            integers = torch.frombuffer(bytearray(cut), dtype=torch.int64).view(last - first, -1)
            if each.name == POSITIONS:
                if int(integers.min()) < 0 or int(integers.max()) > MAX_ROTARY:
                    raise ProtocolError("rotary positions are negative or too large")
                numbers = torch.arange(chunk.start, chunk.start + chunk.length)[:, None]
                before = own.get("positions", numbers)
                axes = max(before.shape[1], integers.shape[1])
                own["positions"] = before.expand(-1, axes).clone()
                own["positions"][within] = integers
            else:
                windowed = each.name == WINDOW_GROUPS
                if own.setdefault("windowed", windowed) != windowed:
                    raise ProtocolError("a step has two kinds of groups for a row")
                own.setdefault("groups", torch.zeros(chunk.length, dtype=torch.int64))[within] = integers[:, 0]
        found.append(PositionInputs(added=of_blocks[ADDED], per_layer=of_blocks[PER_LAYER], **own))
    return found
