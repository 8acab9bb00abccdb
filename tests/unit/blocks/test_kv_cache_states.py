"""The states of one row, with rewinds and forks, compared with sums that are computed again each time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet.blocks.kv_cache import COPIES, OLDEST_COPY_DISTANCE, OneSequence, SequenceCache, SequenceStates
from tests.tiers import examples

SIZE = 3

actions = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 90)),
    st.tuples(st.just("decode"), st.integers(1, 40)),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("draft"), st.integers(1, 6)),
    st.tuples(st.just("fork"), st.floats(0, 1)),
    st.tuples(st.just("fail"), st.integers(1, 3)),
)


class Accumulator:
    """A stand-in for a span of two blocks with states: each block sums up all inputs; one writes to its state in
    place."""

    def __init__(self) -> None:
        self.ran = 0

    def run(self, row: SequenceCache, hidden: torch.Tensor, *, fails: bool = False) -> torch.Tensor:
        """`[positions, SIZE]` -> `[positions, SIZE]`: the sums up to each position."""
        given = row.begin_pass(hidden)
        cache, self.ran = OneSequence(row), self.ran + len(given)
        sums: list[torch.Tensor] = []
        for block in (0, 2):
            before = cache.get_recurrent_state(block)
            cache.update_conv_state(given.T[None], block, conv_kernel_size=2)
            sums.append(given.cumsum(0) + (before[0] if before is not None else 0))
            if before is not None and block:
                before.copy_(sums[-1][None, -1])
            elif not (fails and block):
                cache.update_recurrent_state(sums[-1][None, -1], block)
        if fails:
            return given
        row.advance(len(hidden))
        assert torch.equal(*sums)
        return sums[0][-len(hidden) :]


@settings(max_examples=examples(80))
@given(st.lists(actions, max_size=14), st.sampled_from([None, 16]))
def test_a_row_continues_from_any_crop(steps: list[tuple[str, float]], room: int | None) -> None:
    span, generator = Accumulator(), torch.Generator().manual_seed(0)
    row = SequenceCache(room, states=SequenceStates(1))
    held = torch.empty(0, SIZE, dtype=torch.float64)
    others: list[tuple[SequenceCache, torch.Tensor]] = []

    def grow(row: SequenceCache, held: torch.Tensor, count: int) -> torch.Tensor:
        new = torch.randint(-9, 9, (count, SIZE), generator=generator).double()
        together = torch.cat((held, new))
        assert torch.equal(span.run(row, new), together.cumsum(0)[len(held) :])
        return together

    for action, amount in steps:
        if action == "step":
            held = grow(row, held, int(amount))
        elif action == "decode":
            for _ in range(int(amount)):
                held = grow(row, held, 1)
        elif action == "crop":
            held = held[: int(len(held) * amount)]
            row.crop(len(held))
        elif action == "draft":  # all drafts of a window but the first are rejected
            start, owed = len(held), row.length - row.computed
            held = grow(row, held, int(amount))[: start + 1]
            row.crop(start + 1)
            assert row.length - row.computed <= owed + 1, "what was right runs once more, and nothing else"
        elif action == "fork":
            others.append((row, held))
            held = held[: int(len(held) * amount)]
            row = row.fork(len(held))
        else:
            span.run(row, torch.ones(int(amount), SIZE, dtype=torch.float64), fails=True)
        assert row.length == len(held)
        assert row._states is not None and len(row._states._copies) <= COPIES
    for other, kept in others:  # later steps of a fork have not changed it
        grow(other, kept, 3)
    grow(row, held, 2)


def test_rewinds_within_reach_run_little_again() -> None:
    span, row = Accumulator(), SequenceCache(states=SequenceStates(1))
    span.run(row, torch.ones(200, SIZE))
    for _ in range(100):
        span.run(row, torch.ones(5, SIZE))
        for back in (5, 10):
            if row.length > 210:
                fork = row.fork(row.length - back)
                assert fork.computed == fork.length, "a copy was made before each window"
    fork = row.fork(row.length - OLDEST_COPY_DISTANCE)
    assert fork.length - 2 * OLDEST_COPY_DISTANCE < fork.computed <= fork.length


def test_the_bytes_of_a_row_are_known() -> None:
    span, row = Accumulator(), SequenceCache(4, states=SequenceStates(1))
    span.run(row, torch.ones(3, SIZE))
    assert row.state_bytes == 2 * (SIZE * 4 + SIZE * 2 * 4)  # blocks, sums, and two inputs of a convolution
    assert row.nbytes == row.state_bytes + 4 * SIZE * 4
    assert row.bytes_per_position == SIZE * 4
    assert row.blocks == {0, 2}
