"""Logs of sent activations and the forks of rows: a replay gives exactly what was last sent."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet.errors import ProtocolError
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, Chunk, Fork
from splitnet.wire.sent_log import SentLog, fork_rows
from tests.tiers import examples

SIZE = 3
"""Bytes per position."""


@dataclass(frozen=True)
class Sent:
    """One step as a sender logs it."""

    parts: tuple[Chunk, ...]
    forks: tuple[Fork, ...] | None
    payload: bytes
    reach: int


@dataclass
class Model:
    """What a log must hold: per row the list of its positions' bytes, which end with the reach of their step."""

    rows: dict[int, list[bytes]] = field(default_factory=dict)
    next_row: int = 1
    written: int = 0

    def fresh(self, reach: int) -> bytes:
        """Bytes that no other position has."""
        self.written += 1
        return self.written.to_bytes(SIZE - 1, "big") + bytes([reach])

    def step(self, data: st.DataObject) -> Sent:
        """Draws a step that a client could send next, and takes it in."""
        forks = self._forks(data) if self.rows and data.draw(st.booleans(), "with forks") else None
        candidates = [*self.rows, self.next_row]
        chosen = data.draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=3, unique=True), "rows")
        reach = data.draw(st.integers(0, 2), "reach")
        parts: list[Chunk] = []
        payload = b""
        for row in chosen:
            positions = self.rows.setdefault(row, [])
            self.next_row = max(self.next_row, row + 1)
            start = data.draw(st.integers(0, len(positions)), "start")
            new = [self.fresh(reach) for _ in range(data.draw(st.integers(1, 4), "length"))]
            positions[start:] = new
            parts.append(Chunk(row, start, len(new), 0))
            payload += b"".join(new)
        return Sent(tuple(parts), forks, payload, reach)

    def _forks(self, data: st.DataObject) -> tuple[Fork, ...]:
        sources = data.draw(st.lists(st.sampled_from(sorted(self.rows)), max_size=4), "sources")
        forks: list[Fork] = []
        for source in sources:
            stays = source not in {fork.row for fork in forks} and data.draw(st.booleans(), "keeps its id")
            forks.append(Fork(source if stays else self.next_row, source))
            self.next_row += not stays
        self.rows = {fork.row: list(self.rows[fork.source]) for fork in forks}
        return tuple(forks)


def contents(log: SentLog, positions_per_step: int = 1000) -> dict[int, list[bytes]]:
    """The rows that a hop would hold after a replay into nothing."""
    receiver: dict[int, list[bytes]] = {}
    for parts, payload, reach, _ in log.replay(positions_per_step):
        assert 1 <= sum(part.length for part in parts) <= positions_per_step
        offset = 0
        for part in parts:
            row = receiver.setdefault(part.row, [])
            assert part.start == len(row), "a replay leaves no gap and sends nothing twice"
            for _ in range(part.length):
                row.append(payload[offset : offset + SIZE])
                assert row[-1][-1] == reach, "the next hop computes the same keys as before"
                offset += SIZE
        assert offset == len(payload)
    return receiver


@given(st.data())
def test_a_replay_gives_what_was_last_sent(data: st.DataObject) -> None:
    model, log = Model(), SentLog(codec=0, bytes_per_position=SIZE)
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        sent = model.step(data)
        log.record(sent.parts, sent.forks, sent.payload, sent.reach)
        assert {row: log.length(row) for row in model.rows} == {row: len(held) for row, held in model.rows.items()}
    held = {row: positions for row, positions in model.rows.items() if positions}
    assert contents(log) == held
    assert contents(log, data.draw(st.integers(1, 5), "positions per step")) == held
    assert log.nbytes == SIZE * sum(map(len, held.values()))


@given(st.data())
def test_a_step_that_is_logged_twice_changes_nothing(data: st.DataObject) -> None:
    model, log = Model(), SentLog(codec=0, bytes_per_position=SIZE)
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        sent = model.step(data)
        log.record(sent.parts, sent.forks, sent.payload, sent.reach)
        once = contents(log)
        log.record(sent.parts, sent.forks, sent.payload, sent.reach)
        assert contents(log) == once


def test_a_fork_goes_its_own_way() -> None:
    log = SentLog(codec=0, bytes_per_position=1)
    log.record([Chunk(1, 0, 3, 0)], None, b"abc")
    log.record([Chunk(1, 3, 1, 0), Chunk(2, 3, 1, 0)], [Fork(1, 1), Fork(2, 1)], b"de")
    log.record([Chunk(2, 1, 1, 0)], None, b"x")
    assert {parts[0].row: payload for parts, payload, *_ in log.replay(10)} == {1: b"abcd", 2: b"ax"}


def test_no_forks_keep_the_rows_and_an_empty_list_drops_them() -> None:
    log = SentLog(codec=0, bytes_per_position=1)
    log.record([Chunk(1, 0, 2, 0)], None, b"ab")
    log.record([Chunk(2, 0, 1, 0)], None, b"c")
    assert (log.length(1), log.length(2)) == (2, 1)
    log.record([Chunk(3, 0, 1, 0)], [], b"d")
    assert (log.length(1), log.length(2), log.length(3)) == (0, 0, 1)


@pytest.mark.parametrize(
    ("parts", "forks"),
    [
        ([Chunk(1, 3, 1, 0)], None),
        ([Chunk(2, 1, 1, 0)], None),
        ([Chunk(5, 0, 1, 0)], [Fork(5, 4)]),
        ([Chunk(1, 0, 1, 0), Chunk(2, 1, 1, 0)], [Fork(1, 1)]),
    ],
    ids=["gap", "gap in a new row", "fork of nothing", "gap in the second part"],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(parts: list[Chunk], forks: list[Fork] | None) -> None:
    log = SentLog(codec=0, bytes_per_position=1)
    log.record([Chunk(1, 0, 2, 0)], None, b"ab")
    log.record([Chunk(9, 0, 1, 0)], None, b"c")
    with pytest.raises(ProtocolError):
        log.record(parts, forks, b"xy")
    assert {parts[0].row: payload for parts, payload, *_ in log.replay(10)} == {1: b"ab", 9: b"c"}


def test_a_replayed_step_never_exceeds_a_payload() -> None:
    size = MAX_PAYLOAD_BYTES // 4
    log = SentLog(codec=0, bytes_per_position=size)
    payload = bytearray(6 * size)  # pages that are never touched take no memory
    log.record([Chunk(1, 0, 6, 0)], None, memoryview(payload))
    assert [parts[0].length for parts, *_ in log.replay(512)] == [4, 2]


forks_of = st.lists(st.builds(Fork, st.integers(1, 8), st.integers(1, 4)), max_size=6, unique_by=lambda fork: fork.row)


@settings(max_examples=examples(200))
@given(st.dictionaries(st.integers(1, 4), st.lists(st.integers(), max_size=3), max_size=4), forks_of)
def test_forks_made_twice_change_nothing(rows: dict[int, list[int]], forks: list[Fork]) -> None:
    before = {row: list(held) for row, held in rows.items()}
    try:
        once = fork_rows(rows, forks, list)
    except ProtocolError:
        assert any(fork.row not in rows and fork.source not in rows for fork in forks)
        return
    finally:
        assert rows == before
    assert list(once) == [fork.row for fork in forks]
    # Once made, a source may be gone: the rows are there, so nothing is looked up.
    again = fork_rows(once, forks, list)
    assert again == once
    assert all(again[row] is once[row] for row in once)
    for fork in forks:
        assert once[fork.row] == rows[fork.row if fork.row in rows else fork.source]
    assert len({id(row) for row in once.values()}) == len(once), "no two forks are one row"
