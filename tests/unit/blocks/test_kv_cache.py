"""The cache of one row, compared with concatenation and slicing."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet.blocks.kv_cache import FIRST_CAPACITY, SequenceCache
from splitnet.quant.device import WORTH_LARGE_PAGES
from tests.tiers import examples

HEADS, KEY_SIZE, VALUE_SIZE, BLOCKS = 2, 4, 3, 2

actions = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 300)),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("fork"), st.just(0)),
    st.tuples(st.just("room"), st.integers(0, 400)),
)


def _new(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, HEADS, count, KEY_SIZE, generator=generator),
        torch.randn(1, HEADS, count, VALUE_SIZE, generator=generator),
    )


@settings(max_examples=examples(60))
@given(st.lists(actions, max_size=12), st.sampled_from([None, 0, 700]))
def test_equals_concatenation(steps: list[tuple[str, float]], room: int | None) -> None:
    row = SequenceCache(room)
    expected = [(torch.empty(1, HEADS, 0, KEY_SIZE), torch.empty(1, HEADS, 0, VALUE_SIZE)) for _ in range(BLOCKS)]
    abandoned: list[tuple[SequenceCache, int]] = []
    for number, (action, amount) in enumerate(steps):
        if action == "append":
            for block in range(BLOCKS):
                keys, values = _new(int(amount), seed=100 * number + block)
                old_keys, old_values = expected[block]
                expected[block] = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
                stored = row.append(block, keys, values)
                assert torch.equal(stored[0], expected[block][0])
                assert torch.equal(stored[1], expected[block][1])
            row.advance(int(amount))
        elif action == "crop":
            length = int(row.length * amount)
            row.crop(length)
            expected = [(keys[:, :, :length], values[:, :, :length]) for keys, values in expected]
        elif action == "room":
            row.room = row.length + int(amount)
        else:
            abandoned.append((row, row.length))
            row = row.fork()
        assert row.length == expected[0][0].shape[2]
    for original, length in abandoned:  # later changes of copies have not changed it
        assert original.length == length


def test_a_fork_shares_nothing() -> None:
    row = SequenceCache()
    row.append(0, *_new(5, seed=1))
    row.advance(5)
    copy = row.fork()
    row.crop(2)
    row.append(0, *_new(3, seed=2))
    kept, _ = copy.append(0, *_new(1, seed=3))
    assert torch.equal(kept[:, :, :5], _new(5, seed=1)[0])


def test_a_pass_that_fails_leaves_the_row_as_it_was() -> None:
    row = SequenceCache()
    row.append(0, *_new(5, seed=1))
    row.append(1, *_new(5, seed=2))
    row.advance(5)
    row.append(0, *_new(7, seed=3))  # block 1 never gets its part
    assert row.length == 5
    keys, _ = row.append(0, *_new(1, seed=4))
    assert torch.equal(keys, torch.cat((_new(5, seed=1)[0], _new(1, seed=4)[0]), 2))


def test_appending_a_token_does_not_move_the_others() -> None:
    row = SequenceCache()
    places: set[int] = set()
    for position in range(FIRST_CAPACITY * 4):
        keys, _ = row.append(0, *_new(1, seed=position))
        row.advance(1)
        places.add(keys.data_ptr())
    assert len(places) <= 3  # 256, 512 and 1024 positions


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no large pages")
def test_a_long_row_lies_in_large_pages() -> None:
    keys, values = torch.randn(1, HEADS, 600, 256), torch.randn(1, HEADS, 600, 3)
    row = SequenceCache(WORTH_LARGE_PAGES // (4 * HEADS * 256))
    long, short = row.append(0, keys, values)
    assert torch.equal(long, keys) and torch.equal(short, values)
    assert long.data_ptr() % (1 << 21) == 0 and not long.is_contiguous()
    assert row.nbytes == row.room * 4 * HEADS * (256 + 3)


def test_memory_follows_the_positions_or_the_room() -> None:
    row = SequenceCache()
    assert row.nbytes == 0
    per_position = HEADS * (KEY_SIZE + VALUE_SIZE) * 4

    def append(count: int) -> int:
        row.append(0, *_new(count, seed=count))
        row.advance(count)
        return row.nbytes // per_position

    assert append(1) == FIRST_CAPACITY
    assert append(FIRST_CAPACITY) == 2 * FIRST_CAPACITY
    row.room = 600
    assert append(300) == 600
    row.room = 570
    assert row.nbytes == 570 * per_position
    assert append(1) == 570
    copy = row.fork(10, 20)
    assert (copy.length, copy.nbytes) == (10, 20 * per_position)
    assert row.bytes_per_position == per_position
    with pytest.raises(ValueError, match="cannot have room"):
        row.room = 100


@pytest.mark.parametrize("length", [-1, 6])
def test_crop_beyond_the_row_is_refused(length: int) -> None:
    row = SequenceCache()
    row.append(0, *_new(5, seed=1))
    row.advance(5)
    with pytest.raises(ValueError, match="cannot crop"):
        row.crop(length)
