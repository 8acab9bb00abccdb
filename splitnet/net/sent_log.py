"""What a sender keeps of a session: the encoded boundary activations that it sent, ready to be sent again.

About `hidden` bytes per position with an int8 codec, far less than the KV cache that they stand for. The same bytes
give the next hop the same KV cache, so a replacement continues the text token for token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scheduler.packing import PASS_POSITIONS
from splitnet.errors import ProtocolError
from splitnet.net.messages import MAX_PAYLOAD_BYTES, Fork, Part, Payload
from splitnet.net.rows import fork_rows

REPLAY_POSITIONS = PASS_POSITIONS
"""Positions per step of a replay, whoever sends it."""


class SentLog:
    """Encoded positions by row. Every codec writes one self-contained record per position, so bytes can be cut."""

    def __init__(self, codec: int, bytes_per_position: int) -> None:
        self.codec = codec
        self.bytes_per_position = bytes_per_position
        self._rows: dict[int, bytearray] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(len, self._rows.values()))

    @property
    def positions(self) -> int:
        """Logged over all rows."""
        return self.nbytes // self.bytes_per_position

    def length(self, row: int) -> int:
        """Positions logged for `row`."""
        return len(self._rows.get(row, b"")) // self.bytes_per_position

    def prepare(self, parts: Sequence[Part], forks: Sequence[Fork] | None) -> None:
        """Forgets what a step replaces, and makes its forks: positions at or after a part's start are no more.

        Raises:
            ProtocolError: a fork of a row that is not logged, or a gap before a part. Nothing is changed then.
        """
        rows = self._rows if forks is None else fork_rows(self._rows, forks, bytearray)
        size = self.bytes_per_position
        for part in parts:
            if part.start * size > len(rows.get(part.row, b"")):
                raise ProtocolError(f"row {part.row} has a gap before position {part.start}")
        self._rows = rows
        for part in parts:
            if part.row in rows:
                del rows[part.row][part.start * size :]

    def record(self, parts: Sequence[Part], forks: Sequence[Fork] | None, payload: Payload) -> None:
        """Takes in what a step sent.

        Raises:
            ProtocolError: as `prepare`.
        """
        self.prepare(parts, forks)
        size = self.bytes_per_position
        view = memoryview(payload)
        offset = 0
        for part in parts:
            row = self._rows.setdefault(part.row, bytearray())
            row += view[offset : offset + part.length * size]
            offset += part.length * size

    def replay(self, positions_per_step: int = REPLAY_POSITIONS) -> Iterator[tuple[tuple[Part, ...], bytes]]:
        """Steps that rebuild every row from nothing, at most `positions_per_step` positions each."""
        size = self.bytes_per_position
        step = max(1, min(positions_per_step, MAX_PAYLOAD_BYTES // size))
        for row, data in self._rows.items():
            for start in range(0, len(data) // size, step):
                chunk = bytes(data[start * size : (start + step) * size])
                yield (Part(row, start, len(chunk) // size, 0),), chunk
