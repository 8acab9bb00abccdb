"""The log of a sender: the encoded boundary activations of a session that it sent, ready to be sent again.

About `hidden` bytes per position with an int8 codec, far less than the KV cache. The same bytes give the next hop the
same KV cache, so a replacement continues the text token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

from scheduler.batching import PASS_POSITIONS
from splitnet.errors import ProtocolError
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, Chunk, Fork, Payload

Row = TypeVar("Row")


def fork_rows(rows: Mapping[int, Row], forks: Sequence[Fork], copy: Callable[[Row], Row]) -> dict[int, Row]:
    """The rows after `forks`; rows that no fork names are dropped, and go on as their last fork instead of a copy.

    Row ids are never used twice by a client, so a row that exists already was forked by an earlier copy of the same
    step: applying the forks again changes nothing. Raises ProtocolError: a source does not exist.
    """
    forked: dict[int, Row] = {}
    named = {fork.row for fork in forks}
    last = {fork.source: fork.row for fork in forks if fork.row not in rows and fork.source not in named}
    for fork in forks:
        if fork.row in rows:
            forked[fork.row] = rows[fork.row]
        elif fork.source in rows:
            source = rows[fork.source]
            forked[fork.row] = source if last.get(fork.source) == fork.row else copy(source)
        else:
            raise ProtocolError(f"row {fork.row} cannot continue from row {fork.source}, which does not exist")
    return forked


REPLAY_POSITIONS = PASS_POSITIONS  # per step of a replay


@dataclass(slots=True)
class _Row:
    data: bytearray = field(default_factory=bytearray)
    reaches: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Positions from which on steps had another `reach`; before the first one they had none."""

    def copy(self) -> _Row:
        return _Row(bytearray(self.data), list(self.reaches))


class SentLog:
    """Encoded positions by row. Every codec writes one self-contained record per position, so bytes can be cut."""

    def __init__(self, codec: int, bytes_per_position: int) -> None:
        self.codec = codec
        self.bytes_per_position = bytes_per_position
        self._rows: dict[int, _Row] = {}

    @property
    def nbytes(self) -> int:
        return sum(len(row.data) for row in self._rows.values())

    @property
    def positions(self) -> int:
        """Logged over all rows."""
        return self.nbytes // self.bytes_per_position

    def length(self, row: int) -> int:
        """Positions logged for `row`."""
        return len(self._rows[row].data) // self.bytes_per_position if row in self._rows else 0

    def prepare(self, parts: Sequence[Chunk], forks: Sequence[Fork] | None) -> None:
        """Forgets what a step replaces, and makes its forks: positions at or after a part's start are no more. Raises
        ProtocolError: a fork of a row that is not logged, or a gap before a part. Nothing is changed then."""
        rows = self._rows if forks is None else fork_rows(self._rows, forks, _Row.copy)
        size = self.bytes_per_position
        for part in parts:
            if part.start * size > (len(rows[part.row].data) if part.row in rows else 0):
                raise ProtocolError(f"row {part.row} has a gap before position {part.start}")
        self._rows = rows
        for part in parts:
            if part.row in rows:
                row = rows[part.row]
                del row.data[part.start * size :]
                while row.reaches and row.reaches[-1][0] >= part.start:
                    row.reaches.pop()

    def record(self, parts: Sequence[Chunk], forks: Sequence[Fork] | None, payload: Payload, reach: int = 0) -> None:
        """Takes in the payload of a step. Raises ProtocolError as `prepare`."""
        self.prepare(parts, forks)
        size = self.bytes_per_position
        view = memoryview(payload)
        offset = 0
        for part in parts:
            row = self._rows.setdefault(part.row, _Row())
            row.data += view[offset : offset + part.length * size]
            if reach != (row.reaches[-1][1] if row.reaches else 0):
                row.reaches.append((part.start, reach))
            offset += part.length * size

    def replay(self, positions_per_step: int = REPLAY_POSITIONS) -> Iterator[tuple[tuple[Chunk, ...], bytes, int]]:
        """Yields parts, payload and reach of steps that rebuild every row, each at most `positions_per_step`."""
        size = self.bytes_per_position
        step = max(1, min(positions_per_step, MAX_PAYLOAD_BYTES // size))
        for number, row in self._rows.items():
            changes = [(0, 0), *row.reaches, (len(row.data) // size, 0)]
            for (begin, reach), (end, _) in pairwise(changes):
                for start in range(begin, end, step):
                    chunk = bytes(row.data[start * size : min(start + step, end) * size])
                    yield (Chunk(number, start, len(chunk) // size, 0),), chunk, reach
