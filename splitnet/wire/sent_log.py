"""The log of a sender: the encoded boundary activations of a session, kept to replay them.

With an int8 codec the log takes about `hidden` bytes per position, far less than the KV cache. The same bytes give the
next hop the same KV cache, so a replacement continues the text with the same tokens.

Rows are cut into pages of `PAGE` positions. The client labels each page with a digest of all encoded positions up to
the end of the page, and of a salt that peers do not know. If another session later sends the same labels, a hop may
use the keys and values that it has stored under these labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice, pairwise
from typing import NamedTuple, TypeVar

from scheduler.batching import PASS_POSITIONS
from splitnet.errors import ProtocolError
from splitnet.wire.block_inputs import RowInputs, end_of_group, pack_inputs, unpack_inputs, values_of
from splitnet.wire.messages import LABEL_BYTES, MAX_PAYLOAD_BYTES, BlockInput, Chunk, Fork, Payload

Row = TypeVar("Row")

PAGE = 32  # positions of a page


def digest(*parts: bytes | memoryview) -> bytes:
    """A label: BLAKE2b (RFC 7693) of all parts, each with its length before it."""
    state = blake2b(digest_size=LABEL_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def page_ends(part: Chunk) -> int:
    """How many pages of the row end within a part of a step."""
    return (part.start + part.length) // PAGE - part.start // PAGE


def fork_rows(rows: Mapping[int, Row], forks: Sequence[Fork], copy: Callable[[Row], Row]) -> dict[int, Row]:
    """The rows after `forks`. Rows that no fork names are dropped; the last fork of a dropped row takes the row over
    without a copy.

    A client never uses a row id twice, so a row that exists already was forked by an earlier copy of the same step, and
    forks can be applied again without a change. Raises ProtocolError: a source does not exist.
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


REPLAY_POSITIONS = PASS_POSITIONS  # positions of one step of a replay


class ReplayStep(NamedTuple):
    """Content of a step that rebuilds a part of a row, see `Step`."""

    parts: tuple[Chunk, ...]
    payload: bytes
    rope_length: int
    labels: tuple[bytes, ...]
    inputs: tuple[BlockInput, ...]


@dataclass(slots=True)
class _Row:
    data: bytearray = field(default_factory=bytearray)
    rope_lengths: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Pairs of a position and the `rope_length` of steps from this position on; 0 before the first pair."""
    labels: list[bytes] = field(default_factory=list[bytes])  # of the row's first pages; later labels are unknown
    inputs: RowInputs = field(default_factory=RowInputs)

    def copy(self) -> _Row:
        return _Row(bytearray(self.data), list(self.rope_lengths), list(self.labels), self.inputs.copy())

    def rope_length_at(self, position: int) -> int:
        return next((rope_length for start, rope_length in reversed(self.rope_lengths) if start <= position), 0)


class SentLog:
    """Encoded positions by row. Every codec writes one self-contained record per position, so bytes can be cut.

    salt: the client's secret for the labels that this log makes; None: labels come with the steps.
    """

    def __init__(self, codec: int, bytes_per_position: int, salt: bytes | None = None) -> None:
        self.codec = codec
        self.bytes_per_position = bytes_per_position
        self._salt = salt
        self._rows: dict[int, _Row] = {}

    @property
    def nbytes(self) -> int:
        return sum(len(row.data) + row.inputs.nbytes for row in self._rows.values())

    @property
    def positions(self) -> int:
        """Logged positions over all rows."""
        return sum(len(row.data) for row in self._rows.values()) // self.bytes_per_position

    @property
    def only_row(self) -> int | None:
        """The row, if there is exactly one."""
        return next(iter(self._rows)) if len(self._rows) == 1 else None

    def length(self, row: int) -> int:
        """Positions logged for `row`."""
        return len(self._rows[row].data) // self.bytes_per_position if row in self._rows else 0

    def labels(self, row: int) -> tuple[bytes, ...]:
        """Labels of the first pages of `row`; later labels are unknown."""
        return tuple(self._rows[row].labels) if row in self._rows else ()

    def page(self, row: int, index: int) -> tuple[bytes, int]:
        """Encoded positions of a page of `row` with their block inputs, and their `rope_length`. Raises ValueError: the
        page is not complete, or its positions have different values of `rope_length`."""
        held, size = self._rows[row], PAGE * self.bytes_per_position
        data = bytes(held.data[index * size : (index + 1) * size])
        rope_length = held.rope_length_at(index * PAGE)
        if len(data) < size or any(index * PAGE < start < (index + 1) * PAGE for start, _ in held.rope_lengths):
            raise ValueError(f"row {row} has no complete page {index} with one rope length")
        return data + pack_inputs(*held.inputs.cut(index * PAGE, (index + 1) * PAGE), index * PAGE), rope_length

    def first(self, row: int, length: int) -> bytes:
        """The first `length` encoded positions of `row`. Raises ProtocolError: it has fewer."""
        if length > self.length(row):
            raise ProtocolError(f"row {row} has {self.length(row)} positions, not {length}")
        return bytes(self._rows[row].data[: length * self.bytes_per_position])

    def crop(self, row: int, length: int) -> None:
        """Forgets the positions of `row` from `length` on."""
        held = self._rows[row]
        del held.data[length * self.bytes_per_position :]
        del held.labels[length // PAGE :]
        held.inputs.crop(length)
        while held.rope_lengths and held.rope_lengths[-1][0] >= length:
            held.rope_lengths.pop()

    def restore_row(self, row: int, pages: Sequence[tuple[bytes, int, bytes]]) -> None:
        """Replaces all rows by `row`, made of pages: the bytes and `rope_length` that `page` gives, and the label.
        Raises ProtocolError: the block inputs of a page are malformed."""
        held, size = _Row(), PAGE * self.bytes_per_position
        for index, (data, rope_length, label) in enumerate(pages):
            if rope_length != (held.rope_lengths[-1][1] if held.rope_lengths else 0):
                held.rope_lengths.append((index * PAGE, rope_length))
            held.data += data[:size]
            for each, values in unpack_inputs(data[size:], PAGE):
                held.inputs.add(each._replace(start=index * PAGE + each.start), values)
            held.labels.append(label)
        self._rows = {row: held}

    def prepare_step(self, parts: Sequence[Chunk], forks: Sequence[Fork] | None) -> None:
        """Applies the forks of a step, and drops positions at or after the start of each part. Raises ProtocolError: a
        fork of a row that is not logged, or a gap before a part; the log is then unchanged."""
        rows = self._rows if forks is None else fork_rows(self._rows, forks, _Row.copy)
        size = self.bytes_per_position
        for part in parts:
            if part.start * size > (len(rows[part.row].data) if part.row in rows else 0):
                raise ProtocolError(f"row {part.row} has a gap before position {part.start}")
        self._rows = rows
        for part in parts:
            if part.row in rows:
                self.crop(part.row, part.start)

    def record_step(
        self,
        parts: Sequence[Chunk],
        forks: Sequence[Fork] | None,
        payload: Payload,
        rope_length: int = 0,
        labels: Sequence[bytes] = (),
        inputs: Sequence[BlockInput] = (),
    ) -> tuple[bytes, ...]:
        """Logs the payload of a step, with its block inputs after the activations.

        Returns the labels of the pages that end within the step: `labels`, or, with a salt, the labels made here.
        Raises ProtocolError: as `prepare_step`.
        """
        self.prepare_step(parts, forks)
        size = self.bytes_per_position
        view = memoryview(payload)
        offset, came = 0, iter(labels)
        made: list[bytes] = []
        for part in parts:
            self._rows.setdefault(part.row, _Row())
        for each, values in values_of(inputs, view[size * sum(part.length for part in parts) :]):
            self._rows[each.row].inputs.add(each, values)
        for part in parts:
            row = self._rows[part.row]
            row.data += view[offset : offset + part.length * size]
            if rope_length != (row.rope_lengths[-1][1] if row.rope_lengths else 0):
                row.rope_lengths.append((part.start, rope_length))
            offset += part.length * size
            first, count = part.start // PAGE, page_ends(part)
            if self._salt is not None:
                self._label(row, first + count)
                made += row.labels[first : first + count]
            else:
                own = list(islice(came, count))
                if len(row.labels) == first and len(own) == count:
                    row.labels += own
        return tuple(made) if self._salt is not None else tuple(labels)

    def replay(
        self, positions_per_step: int = REPLAY_POSITIONS, since: int = 0, only: int | None = None
    ) -> Iterator[ReplayStep]:
        """Steps that rebuild every row, or the row `only`, from position `since` on, each of at most
        `positions_per_step` positions, or of one whole group of positions that attend to each other."""
        size = self.bytes_per_position
        for number, row in self._rows.items():
            if only not in (None, number):
                continue
            step = max(1, min(positions_per_step, MAX_PAYLOAD_BYTES // (size + row.inputs.position_bytes)))
            changes = [(0, 0), *row.rope_lengths, (len(row.data) // size, 0)]
            for (begin, rope_length), (end, _) in pairwise(changes):
                start = max(begin, since)
                while start < end:
                    last = end_of_group(row.inputs.group_at, min(start + step, end), end)
                    inputs, values = row.inputs.cut(start, last, number)
                    part = Chunk(number, start, last - start, 0)
                    first, count = start // PAGE, page_ends(part)
                    labels = tuple(row.labels[first : first + count])
                    payload = bytes(row.data[start * size : last * size]) + values
                    yield ReplayStep((part,), payload, rope_length, labels if len(labels) == count else (), inputs)
                    start = last

    def _label(self, row: _Row, pages: int) -> None:
        """Labels the first `pages` pages of a row, as far as they have no label."""
        assert self._salt is not None
        size = PAGE * self.bytes_per_position
        with memoryview(row.data) as data:
            while (index := len(row.labels)) < pages:
                before = row.labels[-1] if row.labels else self._salt
                marks = [start for start, _ in row.rope_lengths if index * PAGE < start < (index + 1) * PAGE]
                rope_length = repr((row.rope_length_at(index * PAGE), marks)).encode()
                inputs, values = row.inputs.cut(index * PAGE, (index + 1) * PAGE)
                others = (repr(inputs).encode(), values) if inputs else ()
                with data[index * size : (index + 1) * size] as page:
                    row.labels.append(digest(before, rope_length, page, *others))
