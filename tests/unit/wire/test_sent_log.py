"""Logs of sent activations and the forks of rows: a replay gives exactly the rows that were sent last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet.errors import ProtocolError
from splitnet.wire import sent_log
from splitnet.wire.messages import MAX_PAYLOAD_BYTES, Chunk, Fork
from splitnet.wire.sent_log import SentLog, fork_rows, page_ends
from tests.tiers import examples

SIZE = 3
"""Bytes per position."""


@dataclass(frozen=True)
class Sent:
    """The arguments with which a sender logs a step."""

    parts: tuple[Chunk, ...]
    forks: tuple[Fork, ...] | None
    payload: bytes
    reach: int


@dataclass
class Model:
    """The expected content of a log: per row, the bytes of each position, which end with the reach of its step."""

    rows: dict[int, list[bytes]] = field(default_factory=dict)
    next_row: int = 1
    written: int = 0

    def fresh(self, reach: int) -> bytes:
        """Bytes of a new position, different from those of all other positions."""
        self.written += 1
        return self.written.to_bytes(SIZE - 1, "big") + bytes([reach])

    def step(self, data: st.DataObject) -> Sent:
        """Draws a step that a client could send next, and applies it to the model."""
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
    """The rows that an empty hop would hold after a replay."""
    receiver: dict[int, list[bytes]] = {}
    for parts, payload, reach, *_ in log.replay(positions_per_step):
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
def test_a_replay_gives_the_rows_that_were_sent_last(data: st.DataObject) -> None:
    model, log = Model(), SentLog(codec=0, bytes_per_position=SIZE)
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        sent = model.step(data)
        log.record_step(sent.parts, sent.forks, sent.payload, sent.reach)
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
        log.record_step(sent.parts, sent.forks, sent.payload, sent.reach)
        once = contents(log)
        log.record_step(sent.parts, sent.forks, sent.payload, sent.reach)
        assert contents(log) == once


def test_a_fork_does_not_change_its_source() -> None:
    log = SentLog(codec=0, bytes_per_position=1)
    log.record_step([Chunk(1, 0, 3, 0)], None, b"abc")
    log.record_step([Chunk(1, 3, 1, 0), Chunk(2, 3, 1, 0)], [Fork(1, 1), Fork(2, 1)], b"de")
    log.record_step([Chunk(2, 1, 1, 0)], None, b"x")
    assert {parts[0].row: payload for parts, payload, *_ in log.replay(10)} == {1: b"abcd", 2: b"ax"}


def test_no_forks_keep_the_rows_and_an_empty_list_drops_them() -> None:
    log = SentLog(codec=0, bytes_per_position=1)
    log.record_step([Chunk(1, 0, 2, 0)], None, b"ab")
    log.record_step([Chunk(2, 0, 1, 0)], None, b"c")
    assert (log.length(1), log.length(2)) == (2, 1)
    log.record_step([Chunk(3, 0, 1, 0)], [], b"d")
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
def test_invalid_steps_are_refused_and_change_nothing(parts: list[Chunk], forks: list[Fork] | None) -> None:
    log = SentLog(codec=0, bytes_per_position=1)
    log.record_step([Chunk(1, 0, 2, 0)], None, b"ab")
    log.record_step([Chunk(9, 0, 1, 0)], None, b"c")
    with pytest.raises(ProtocolError):
        log.record_step(parts, forks, b"xy")
    assert {parts[0].row: payload for parts, payload, *_ in log.replay(10)} == {1: b"ab", 9: b"c"}


def test_a_replayed_step_never_exceeds_a_payload() -> None:
    size = MAX_PAYLOAD_BYTES // 4
    log = SentLog(codec=0, bytes_per_position=size)
    payload = bytearray(6 * size)  # memory pages that are never written are not allocated
    log.record_step([Chunk(1, 0, 6, 0)], None, memoryview(payload))
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
    # The second time a source may be gone: the forked rows exist, so no source is needed.
    again = fork_rows(once, forks, list)
    assert again == once
    assert all(again[row] is once[row] for row in once)
    for fork in forks:
        assert once[fork.row] == rows[fork.row if fork.row in rows else fork.source]
    assert len({id(row) for row in once.values()}) == len(once), "no two forks are one row"


@contextmanager
def pages_of(positions: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sent_log, "PAGE", positions)
        yield


def labelled(positions: Sequence[tuple[bytes, int]], cuts: Sequence[int], salt: bytes = b"salt") -> SentLog:
    """A client's log of one row. Steps end at `cuts`, and at positions where the reach changes."""
    log = SentLog(codec=0, bytes_per_position=SIZE, salt=salt)
    changes = {index for index in range(1, len(positions)) if positions[index][1] != positions[index - 1][1]}
    ends = sorted({*(cut for cut in cuts if 0 < cut < len(positions)), *changes, len(positions)})
    for start, end in pairwise((0, *ends)):
        payload = b"".join(position for position, _ in positions[start:end])
        log.record_step([Chunk(1, start, end - start, 0)], None, payload, positions[start][1])
    return log


texts = st.lists(
    st.tuples(st.binary(min_size=SIZE - 1, max_size=SIZE - 1), st.integers(0, 1)).map(
        lambda drawn: (drawn[0] + bytes([drawn[1]]), drawn[1])
    ),
    min_size=1,
    max_size=24,
)
cut_lists = st.lists(st.integers(1, 24), max_size=6)


@given(text=texts, cuts=cut_lists, others=cut_lists, page=st.integers(1, 5))
def test_labels_depend_only_on_the_text(
    text: list[tuple[bytes, int]], cuts: list[int], others: list[int], page: int
) -> None:
    with pages_of(page):
        labels = labelled(text, cuts).labels(1)
        assert len(labels) == len(text) // page == len(set(labels))
        assert labelled(text, others).labels(1) == labels
        assert not set(labels) & set(labelled(text, cuts, salt=b"another").labels(1))


@given(text=texts, cuts=cut_lists, page=st.integers(1, 5), at=st.integers(0, 23), what=st.booleans())
def test_another_position_or_reach_changes_all_later_labels(
    text: list[tuple[bytes, int]], cuts: list[int], page: int, at: int, what: bool
) -> None:
    at %= len(text)
    data, reach = text[at]
    other = [*text]
    other[at] = (bytes((data[0] ^ 1, *data[1:])), reach) if what else (data, 1 - reach)
    with pages_of(page):
        pairs = list(zip(labelled(text, cuts).labels(1), labelled(other, cuts).labels(1), strict=True))
        same = [one == another for one, another in pairs]
        assert same == [index < at // page for index in range(len(same))]


def recorded(data: st.DataObject, model: Model, client: SentLog) -> Iterator[tuple[Sent, Sequence[bytes]]]:
    """Draws steps that a client logs, each with its labels."""
    for _ in range(data.draw(st.integers(1, 10), "steps")):
        sent = model.step(data)
        yield sent, client.record_step(sent.parts, sent.forks, sent.payload, sent.reach)


@given(data=st.data(), page=st.integers(1, 4))
def test_a_hop_knows_the_labels_of_its_pages(data: st.DataObject, page: int) -> None:
    """After any steps, rewinds and forks. The next hop after a replay has the same labels, and so has a new client."""
    model, client, hop = Model(), SentLog(0, SIZE, salt=b"salt"), SentLog(0, SIZE)
    with pages_of(page):
        for sent, labels in recorded(data, model, client):
            assert len(labels) == sum(map(page_ends, sent.parts))
            assert hop.record_step(sent.parts, sent.forks, sent.payload, sent.reach, labels) == labels
        again, following = SentLog(0, SIZE, salt=b"salt"), SentLog(0, SIZE)
        for parts, payload, reach, labels, _ in hop.replay(data.draw(st.integers(1, 7), "positions per step")):
            assert again.record_step(parts, None, payload, reach) == labels
            following.record_step(parts, None, payload, reach, labels)
        for row, positions in model.rows.items():
            assert len(client.labels(row)) == len(positions) // page
            assert client.labels(row) == hop.labels(row) == following.labels(row) == again.labels(row)


@given(data=st.data(), page=st.integers(1, 4))
def test_a_hop_that_misses_labels_has_no_later_ones(data: st.DataObject, page: int) -> None:
    """Steps without labels leave gaps; later pages get no wrong labels."""
    model, client, hop = Model(), SentLog(0, SIZE, salt=b"salt"), SentLog(0, SIZE)
    with pages_of(page):
        for sent, labels in recorded(data, model, client):
            kept = labels if data.draw(st.booleans(), "labelled") else ()
            hop.record_step(sent.parts, sent.forks, sent.payload, sent.reach, kept)
            for row in model.rows:
                known = hop.labels(row)
                assert known == client.labels(row)[: len(known)]


@given(text=texts, cuts=cut_lists, page=st.integers(1, 4), kept=st.integers(0, 24), step=st.integers(1, 7))
def test_pages_and_a_replay_of_the_rest_make_the_whole_row(
    text: list[tuple[bytes, int]], cuts: list[int], page: int, kept: int, step: int
) -> None:
    with pages_of(page):
        log, hop = labelled(text, cuts), SentLog(0, SIZE)
        pages: list[tuple[bytes, int, bytes]] = []
        for index, label in enumerate(log.labels(1)[: kept // page]):
            reaches = {reach for _, reach in text[index * page : (index + 1) * page]}
            if len(reaches) > 1:
                with pytest.raises(ValueError, match="no complete page"):
                    log.page(1, index)
                break
            data, reach = log.page(1, index)
            assert data == b"".join(each for each, _ in text[index * page : (index + 1) * page])
            assert {reach} == reaches
            pages.append((data, reach, label))
        hop.record_step([Chunk(9, 0, 1, 0)], None, bytes(SIZE))
        hop.restore_row(1, pages)
        since = len(pages) * page
        for parts, payload, reach, labels, _ in log.replay(step, since):
            assert parts[0].start >= since and parts[0].length <= step
            hop.record_step(parts, None, payload, reach, labels)
        assert contents(hop) == contents(log)
        assert hop.labels(1) == log.labels(1)
        assert [(each.payload, each.rope_length) for each in hop.replay()] == [
            (e.payload, e.rope_length) for e in log.replay()
        ]


def test_a_page_that_is_not_logged_is_an_error() -> None:
    with pages_of(2):
        log = labelled([(b"abc", 0)] * 5, [])
        assert log.page(1, 1) == (b"abcabc", 0)
        with pytest.raises(ValueError, match="no complete page 2"):
            log.page(1, 2)
