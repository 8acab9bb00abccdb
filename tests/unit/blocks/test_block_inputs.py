"""Block inputs as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitnet.blocks.block_inputs import PositionInputs, decode_inputs, encode_step
from splitnet.errors import CodecError, ProtocolError
from splitnet.wire.block_inputs import GROUPS, POSITIONS
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.messages import EVERY_BLOCK, BlockInput, Chunk

HIDDEN, START = 4, 10
PLAIN = codec_by_name("none")


@given(st.data())
def test_inputs_survive_the_wire_and_any_division_into_passes(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12), "count")
    numbers = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count), "groups")
    axes = data.draw(st.sampled_from([0, 1, 3]), "axes")
    seed = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 50, (count, axes), generator=seed) if axes else None
    states = torch.randn(count, HIDDEN, generator=seed) * torch.tensor(numbers).clamp(max=1)[:, None]
    given_inputs = PositionInputs(positions, torch.tensor(numbers), {3: states}, data.draw(st.booleans(), "windowed"))
    chunk = Chunk(1, START, count, 0)
    hidden = torch.randn(count, HIDDEN, generator=seed)
    payload, inputs = encode_step(hidden, [chunk], [given_inputs], PLAIN)
    values = payload[count * PLAIN.bytes_per_position(HIDDEN) :]
    cut = data.draw(st.integers(1, count), "cut")
    chunks = [Chunk(1, START, cut, 0), *([Chunk(1, START + cut, count - cut, 0)] if cut < count else [])]
    for part, own in zip(chunks, decode_inputs(inputs, values, chunks, HIDDEN, range(2, 5)), strict=True):
        begin = part.start - START
        expected = given_inputs.cut(begin, begin + part.length)
        if own.positions is not None:
            assert expected.positions is not None
            assert torch.equal(own.positions.expand_as(expected.positions), expected.positions)
        if any(expected.groups.tolist()):  # type: ignore[union-attr]
            assert torch.equal(own.groups, expected.groups)  # type: ignore[arg-type]
            assert own.windowed == given_inputs.windowed
            assert torch.equal(own.added[3], expected.added[3])
        else:
            assert own.groups is None and not own.added
    assert not decode_inputs(inputs, values, chunks, HIDDEN, range(4, 5))[0].added


def test_positions_that_are_their_numbers_are_not_sent() -> None:
    chunk = Chunk(1, START, 2, 0)
    usual = PositionInputs(torch.tensor([[10, 10, 10], [11, 11, 11]]))
    assert encode_step(torch.zeros(2, HIDDEN), [chunk], [usual], PLAIN)[1] == ()
    later = PositionInputs(torch.tensor([[5, 5, 5], [6, 6, 6]]))
    ((sent,)) = encode_step(torch.zeros(2, HIDDEN), [chunk], [later], PLAIN)[1]
    assert sent.size == 8  # equal axes are sent once


@pytest.mark.parametrize("number", [-1, 1 << 31])
def test_positions_are_bounded(number: int) -> None:
    wrong = BlockInput(POSITIONS, EVERY_BLOCK, 1, 0, 1, 8, 0)
    data = torch.tensor([number]).numpy().tobytes()
    with pytest.raises(ProtocolError):
        decode_inputs([wrong], data, [Chunk(1, 0, 1, 0)], HIDDEN, range(1))


def test_states_that_are_not_finite_are_refused() -> None:
    chunk = Chunk(1, 0, 1, 0)
    added = {1: torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    payload, inputs = encode_step(torch.zeros(1, HIDDEN), [chunk], [PositionInputs(added=added)], PLAIN)
    values = bytearray(payload[16:])
    values[:4] = torch.tensor([torch.nan]).numpy().tobytes()
    with pytest.raises(CodecError):
        decode_inputs(inputs, bytes(values), [chunk], HIDDEN, range(4))


def test_groups_of_a_batch_stay_with_their_rows() -> None:
    chunks = [Chunk(1, 0, 2, 0), Chunk(2, 0, 2, 0)]
    own = [PositionInputs(groups=torch.tensor([5, 5])), PositionInputs(groups=torch.tensor([0, 6]))]
    payload, inputs = encode_step(torch.zeros(4, HIDDEN), chunks, own, PLAIN)
    assert [each.row for each in inputs if each.name == GROUPS] == [1, 2]
    found = decode_inputs(inputs, payload[64:], chunks, HIDDEN, range(4))
    assert [each.groups.tolist() for each in found if each.groups is not None] == [[5, 5], [0, 6]]


@pytest.mark.parametrize(("places", "zeros"), [([0, 2, 4, 6], 1), (range(7), 0)], ids=["gaps", "all"])
def test_memory_for_the_states_of_a_block_is_allocated_once(
    places: Sequence[int], zeros: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, states, allocated = Chunk(1, 0, 7, 0), torch.zeros(7, HIDDEN), list[Any]()
    states[list(places)] = 1.0
    payload, inputs = encode_step(torch.zeros(7, HIDDEN), [chunk], [PositionInputs(added={1: states})], PLAIN)
    make = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **how: (allocated.append(size), make(*size, **how))[1])
    (found,) = decode_inputs(inputs, payload[7 * 4 * HIDDEN :], [chunk], HIDDEN, range(4))
    assert len(allocated) == zeros
    assert torch.equal(found.added[1], states)
