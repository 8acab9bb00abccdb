"""The memory of a session's rows: every step that fits the budget is taken, and what is allocated stays near it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peers.rows import prepare_rows, room_for
from peers.sessions import HopSession, SessionTooLong
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.wire.codecs import CODECS
from splitnet.wire.endpoints import Connection
from splitnet.wire.messages import Chunk, Fork, Step
from splitnet.wire.sent_log import SentLog
from tests.tiers import examples

BYTES_PER_POSITION = 8


class Rows:
    """A session whose steps are prepared and stored as the engine does it; values tell the row and the position."""

    def __init__(self, reservation: int) -> None:
        self.session = HopSession(
            id=bytes(16),
            owner=b"owner",
            reply_to=Connection(b"client", b"owner"),
            epoch=1,
            start=0,
            end=1,
            reservation=reservation,
            codec=CODECS["none"],
            next=None,
            log=SentLog(0, 4),
            used_at=0.0,
        )
        self.expected: dict[int, list[float]] = {}
        self.moved = 0
        self.names = 0

    @property
    def held(self) -> int:
        return sum(map(len, self.expected.values()))

    @property
    def allocated(self) -> float:
        """In positions."""
        return sum(row.nbytes for row in self.session.row_state.caches.values()) / BYTES_PER_POSITION

    def name(self) -> int:
        self.names += 1
        return self.names

    def step(self, *parts: Chunk, forks: tuple[Fork, ...] | None = None) -> None:
        places = {row_id: self.place(row) for row_id, row in self.session.row_state.caches.items()}
        prepare_rows(self.session, Step(bytes(16), 1, 0, parts, forks, 0, 0))
        expected = self.expected
        if forks is not None:
            expected = {fork.row: expected.get(fork.row, expected.get(fork.source, [])) for fork in forks}
        for part in parts:
            row = self.session.row_state.caches.get(part.row)
            if row is None:
                row = self.session.row_state.caches[part.row] = SequenceCache(self.session.row_state.new_room[part.row])
            assert row.length == part.start
            new = [float(100_000 * part.row + part.start + i) for i in range(part.length)]
            tensor = torch.tensor(new)[None, None, :, None]
            keys, values = row.append(0, tensor, -tensor)
            row.advance(part.length)
            expected = expected | {part.row: expected.get(part.row, [])[: part.start] + new}
            assert keys.flatten().tolist() == expected[part.row] == (-values).flatten().tolist()
        self.expected = expected
        now = {row_id: self.place(row) for row_id, row in self.session.row_state.caches.items()}
        self.moved += sum(places.get(row_id, place) != place for row_id, place in now.items())

    @staticmethod
    def place(row: SequenceCache) -> int:
        return row._blocks[0].keys.data_ptr()


def check(rows: Rows) -> None:
    assert {row_id: row.length for row_id, row in rows.session.row_state.caches.items()} == {
        row_id: len(values) for row_id, values in rows.expected.items()
    }
    for row_id, values in rows.expected.items():
        [(_, keys, _)] = rows.session.row_state.caches[row_id].keys_and_values(len(values))
        assert keys.flatten().tolist() == values
    assert rows.allocated <= room_for(rows.session.reservation)


@settings(max_examples=examples(150))
@given(st.data(), st.sampled_from([64, 200, 1000, 3000]))
def test_every_step_within_the_budget_is_taken(data: st.DataObject, reservation: int) -> None:
    rows = Rows(reservation)
    for _ in range(data.draw(st.integers(1, 15))):
        forks: tuple[Fork, ...] | None = None
        lengths = {row_id: len(values) for row_id, values in rows.expected.items()}
        if lengths and data.draw(st.booleans()):
            sources = data.draw(st.lists(st.sampled_from(sorted(lengths)), min_size=1, max_size=8))
            kept = data.draw(st.sets(st.sampled_from(sorted(lengths))))
            named = [(row_id, row_id) for row_id in sorted(kept)] + [(rows.name(), source) for source in sources]
            forks = tuple(Fork(row_id, source) for row_id, source in named)
            lengths = {row_id: lengths[source] for row_id, source in named}
        chosen = data.draw(st.sets(st.sampled_from(sorted(lengths)), max_size=4)) if lengths else set[int]()
        chosen |= {rows.name() for _ in range(data.draw(st.integers(0, 3)))}
        starts = {
            row_id: data.draw(st.sampled_from([lengths.get(row_id, 0), lengths.get(row_id, 0) // 2]))
            for row_id in sorted(chosen)
        }
        held = sum(lengths.values()) + sum(start - lengths.get(row_id, 0) for row_id, start in starts.items())
        parts: list[Chunk] = []
        for row_id, start in starts.items():
            left = reservation - held - (len(starts) - len(parts) - 1)
            length = data.draw(st.integers(1, max(1, left)))
            held += length
            parts.append(Chunk(row_id, start, length, 0))
        if not parts:
            continue
        if held > reservation:
            before = dict(rows.session.row_state.caches)
            with pytest.raises(SessionTooLong):
                rows.step(*parts, forks=forks)
            assert rows.session.row_state.caches == before
        else:
            rows.step(*parts, forks=forks)
        check(rows)


@pytest.mark.default_cases(batch=(2, 6, 64))
@pytest.mark.parametrize("batch", [1, 2, 5, 6, 8, 64])
def test_a_batch_that_fills_its_budget_is_seldom_moved(batch: int) -> None:
    columns = 4096 // batch
    rows = Rows(batch * columns)
    for position in range(columns):
        rows.step(*(Chunk(row, position, 1, 1) for row in range(batch)))
    check(rows)
    assert rows.moved <= 8 * batch


@pytest.mark.parametrize(("prompt", "batch"), [(9, 6), (9, 8), (1000, 4)])
def test_a_prompt_that_many_continue_fits(prompt: int, batch: int) -> None:
    """As the samples of a server do, and as a replay of a batch at another peer."""
    rows = Rows(batch * (prompt + 5))
    rows.step(Chunk(100, 0, prompt, 1))
    rows.step(*(Chunk(row, prompt, 1, 1) for row in range(batch)), forks=tuple(Fork(row, 100) for row in range(batch)))
    for position in range(prompt + 1, prompt + 5):
        rows.step(*(Chunk(row, position, 1, 1) for row in range(batch)))
    check(rows)


def test_rows_that_wait_give_their_memory_to_one_that_goes_on() -> None:
    rows = Rows(2000)
    rows.step(*(Chunk(row, 0, 100, 1) for row in range(4)))
    for position in range(100, 1700):
        rows.step(Chunk(0, position, 1, 1))
        assert rows.allocated <= room_for(2000)
    check(rows)
    assert rows.moved <= 20
