"""Values that blocks read besides hidden states, in steps, logs and stored pages."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import CodecError, ProtocolError
from splitnet.wire.block_inputs import (
    ADDED,
    GROUPS,
    INTEGER_BYTES,
    MAX_GROUP,
    POSITIONS,
    WINDOW_GROUPS,
    check_block_inputs,
    check_groups,
    check_inputs,
    end_of_group,
    passed_on,
    unpack_inputs,
    values_of,
)
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.messages import EVERY_BLOCK, BlockInput, Chunk, Step, decode, encode
from splitnet.wire.sent_log import PAGE, SentLog

ROW, SIZE, LENGTH = 7, 2, 3 * PAGE
PLAIN = codec_by_name("none")
POSITION = BlockInput(POSITIONS, EVERY_BLOCK, ROW, 0, 1, INTEGER_BYTES, 0)


def step(length: int, inputs: list[tuple[BlockInput, bytes]], start: int = 0) -> Step:
    payload = bytes(SIZE * length) + b"".join(data for _, data in inputs)
    described = tuple(each for each, _ in inputs)
    return Step(bytes(16), 1, 1, (Chunk(ROW, start, length, 0),), None, 0, 0, payload, inputs=described)


def groups(numbers: list[int], start: int = 0) -> tuple[BlockInput, bytes]:
    data = b"".join(number.to_bytes(INTEGER_BYTES, "little") for number in numbers)
    return BlockInput(GROUPS, EVERY_BLOCK, ROW, start, len(numbers), INTEGER_BYTES, 0), data


def test_a_step_carries_its_inputs_behind_its_activations() -> None:
    sent = step(3, [(POSITION, bytes(range(8))), (POSITION._replace(name=ADDED, block=2, start=1, size=4), b"abcd")])
    came = decode(encode(sent))
    assert isinstance(came, Step) and came.inputs == sent.inputs
    assert bytes(came.activations) == bytes(SIZE * 3)
    assert [bytes(data) for _, data in values_of(came.inputs, came.input_bytes)] == [bytes(range(8)), b"abcd"]


def test_only_inputs_of_later_blocks_are_passed_on() -> None:
    added = [(POSITION._replace(name=ADDED, block=block, size=4), bytes([block] * 4)) for block in (1, 2, 3)]
    payload, inputs = passed_on(step(3, [(POSITION, bytes(8)), *added]), b"output", 2)
    assert [each.block for each in inputs] == [EVERY_BLOCK, 2, 3]
    assert bytes(payload) == b"output" + bytes(8) + b"\2\2\2\2\3\3\3\3"
    assert passed_on(step(3, []), b"output", 2) == (b"output", ())


@given(st.data())
def test_labels_and_replays_do_not_depend_on_the_division_into_steps(data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.sampled_from([0, 0, 5, 6]), min_size=LENGTH, max_size=LENGTH), "groups")
    edges = data.draw(st.sets(st.integers(1, LENGTH - 1), max_size=5), "edges")
    cuts = sorted({0, *edges, LENGTH})
    logs = [SentLog(0, SIZE, b"salt") for _ in range(2)]
    for log, ends in zip(logs, ([0, LENGTH], cuts), strict=True):
        for start, end in pairwise(ends):
            part = step(end - start, [groups(numbers[start:end], start)], start)
            log.record_step(part.parts, None, part.payload, inputs=part.inputs)
    assert logs[0].labels(ROW) == logs[1].labels(ROW)
    limit = data.draw(st.integers(1, LENGTH), "positions per step")
    replayed = [list(log.replay(limit)) for log in logs]
    assert replayed[0] == replayed[1]
    ends = [replay.parts[0].start + replay.parts[0].length for replay in replayed[0]]
    assert all(not numbers[end] or numbers[end - 1] != numbers[end] for end in ends[:-1])
    hop = SentLog(0, SIZE)
    for replay in replayed[0]:
        hop.record_step(replay.parts, None, replay.payload, inputs=replay.inputs)
    assert list(hop.replay(LENGTH)) == [each._replace(labels=()) for each in logs[0].replay(LENGTH)]


def test_labels_depend_on_inputs() -> None:
    found = set()
    for inputs in ([], [groups([1] * PAGE)], [groups([2] * PAGE)], [groups([1] * (PAGE - 1))]):
        log, part = SentLog(0, SIZE, b"salt"), step(PAGE, inputs)
        found |= {log.record_step(part.parts, None, part.payload, inputs=part.inputs)}
    assert len(found) == 4


def test_a_row_of_stored_pages_has_their_inputs() -> None:
    log, part = SentLog(0, SIZE, b"salt"), step(2 * PAGE, [groups([3] * 40, 10)])
    labels = log.record_step(part.parts, None, part.payload, inputs=part.inputs)
    restored = SentLog(0, SIZE)
    restored.restore_row(ROW, [(*log.page(ROW, index), labels[index]) for index in range(2)])
    assert list(restored.replay()) == list(log.replay())
    log.crop(ROW, 20)
    assert [each.length for each in next(iter(log.replay())).inputs] == [10]


@given(st.binary(max_size=200))
def test_pages_of_strangers_are_refused(packed: bytes) -> None:
    try:
        found = unpack_inputs(packed, PAGE)
    except ProtocolError:
        return
    assert all(each.start + each.length <= PAGE and len(data) == each.length * each.size for each, data in found)


@pytest.mark.parametrize(
    "wrong",
    [
        POSITION._replace(row=8),
        POSITION._replace(start=3),
        POSITION._replace(length=4),
        POSITION._replace(length=0),
        POSITION._replace(size=0),
    ],
)
def test_inputs_outside_their_step_are_refused(wrong: BlockInput) -> None:
    with pytest.raises(ProtocolError):
        check_inputs([wrong], [Chunk(ROW, 0, 3, 0)])
    with pytest.raises(ProtocolError):
        check_inputs([POSITION, POSITION], [Chunk(ROW, 0, 3, 0)])


@pytest.mark.parametrize(
    "wrong",
    [
        POSITION._replace(name="unknown"),
        POSITION._replace(block=1),
        POSITION._replace(size=9),
        POSITION._replace(size=80),
        POSITION._replace(size=2 * INTEGER_BYTES),
        POSITION._replace(name=ADDED, block=1, size=16),
        POSITION._replace(name=ADDED, block=3, size=12),
        POSITION._replace(name=ADDED, block=3, size=16, codec=250),
    ],
)
def test_inputs_that_blocks_do_not_read_are_refused(wrong: BlockInput) -> None:
    right = [POSITION, POSITION._replace(size=3 * INTEGER_BYTES), POSITION._replace(name=ADDED, block=3, size=16)]
    check_block_inputs(right, 4, range(2, 6), axes=3, joins=True)
    with pytest.raises((ProtocolError, CodecError)):
        check_block_inputs([wrong], 4, range(2, 6), axes=3, joins=True)


@pytest.mark.parametrize("name", [ADDED, GROUPS, WINDOW_GROUPS])
def test_blocks_that_join_no_positions_read_positions_alone(name: str) -> None:
    check_block_inputs([POSITION], 4, range(2, 6), axes=1, joins=False)
    with pytest.raises(ProtocolError, match="of this family"):
        check_block_inputs([POSITION._replace(name=name)], 4, range(2, 6), axes=1, joins=False)
    with pytest.raises(ProtocolError):
        check_block_inputs([POSITION._replace(size=3 * INTEGER_BYTES)], 4, range(2, 6), axes=1, joins=False)


def test_a_payload_shorter_than_its_inputs_has_no_activations() -> None:
    short = dataclasses.replace(step(3, [(POSITION._replace(length=3), bytes(24))]), payload=b"short")
    assert not len(short.activations)


def test_groups_are_bounded() -> None:
    check_groups(step(MAX_GROUP, [groups([1] * MAX_GROUP)]))
    with pytest.raises(ProtocolError, match="more than"):
        check_groups(step(MAX_GROUP + 1, [groups([1] * (MAX_GROUP + 1))]))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(0, 20))
def test_texts_are_cut_between_groups(numbers: list[int], end: int) -> None:
    end = min(end, len(numbers))
    found = end_of_group(numbers.__getitem__, end, len(numbers))
    assert end <= found <= len(numbers)
    if 0 < found < len(numbers):
        assert not numbers[found - 1] or numbers[found - 1] != numbers[found]
    assert all(numbers[at] == numbers[end - 1] != 0 for at in range(end, found))
