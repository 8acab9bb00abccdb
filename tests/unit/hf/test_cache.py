"""The client's cache object in place of the peers' KV caches: each operation of generation reaches the peers' rows."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitnet.blocks.adapters import AdapterTensors
from splitnet.errors import AdapterError
from splitnet.hf.cache import RESERVE_STEP, RemoteCache, RemoteLayer
from splitnet.session.inference import Session
from splitnet.wire.messages import Chunk, Fork
from splitnet.wire.sent_log import fork_rows
from tests.tiers import examples


class FakeSession:
    """Rows as peers hold them, with a token in place of each position's keys and values."""

    def __init__(self, reservation: int) -> None:
        self.reservation = reservation
        self.rows: dict[int, list[int]] = {}
        self.seen: set[int] = set()
        self.closed = 0
        self.closed_later = 0
        self.adapter: AdapterTensors | None = None
        self.copies = 0

    def reserve(self, positions: int) -> None:
        self.reservation = max(self.reservation, positions)

    def use_namespace(self, name: str) -> None:
        assert not name

    def use_adapter(self, adapter: AdapterTensors) -> None:
        self.adapter = adapter

    def close(self) -> None:
        self.closed += 1

    def close_later(self) -> None:
        self.closed_later += 1

    def step(self, parts: list[Chunk], forks: list[Fork] | None, tokens: list[list[int]]) -> None:
        """Does what a peer does; `tokens` has the tokens of each part."""
        if forks is not None:
            new = [fork.row for fork in forks if fork.row not in self.rows]
            assert not set(new) & self.seen, "row ids are never used twice"
            self.copies += len(new)
            self.rows = fork_rows(self.rows, forks, list)
        for part, added in zip(parts, tokens, strict=True):
            row = self.rows.setdefault(part.row, [])
            assert 0 <= part.start <= len(row), "no gap"
            assert part.length == len(added) >= 1
            row[part.start :] = added
        self.seen |= self.rows.keys()
        assert sum(map(len, self.rows.values())) <= self.reservation


def make_layer() -> tuple[RemoteLayer, list[FakeSession]]:
    made: list[FakeSession] = []

    def open_session(reservation: int) -> Session:
        made.append(FakeSession(reservation))
        return cast(Session, made[-1])

    return RemoteLayer(open_session), made


def mask(*paddings: int, columns: int) -> torch.Tensor:
    return torch.tensor([[column >= padding for column in range(columns)] for padding in paddings])


class CacheMachine(RuleBasedStateMachine):
    """Steps, rewinds, beams and new conversations in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.made = make_layer()
        self.batch: list[tuple[int, list[int]]] = []
        """Padding and tokens of each row."""
        self.columns = 0
        self.tokens = 0

    @initialize(paddings=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def prompt(self, paddings: list[int]) -> None:
        self.batch = [(padding, []) for padding in paddings]
        self.columns = 0
        self.step(4)

    @rule(new=st.integers(1, 5))
    def step(self, new: int) -> None:
        columns = self.columns + new
        keep = 1 + new % 2
        session, parts, forks = self.layer.begin_step(
            mask(*(padding for padding, _ in self.batch), columns=columns), keep
        )
        sent: list[list[int]] = []
        for (padding, held), part in zip(self.batch, parts, strict=True):
            added = [self.token() for _ in range(columns - padding - len(held))]
            held += added
            sent.append(added)
            assert part.keep == min(part.length, keep)
        cast(FakeSession, session).step(parts, forks, sent)
        self.columns = columns
        self.current = [part.row for part in parts]

    def token(self) -> int:
        self.tokens += 1
        return self.tokens

    @rule(count=st.integers(0, 6))
    def crop(self, count: int) -> None:
        # A prompt is never cropped, so that padding stays unchanged.
        count = min(count, self.columns - 4)
        self.layer.crop(-count)
        self.columns -= count
        self.batch = [(padding, held[: self.columns - padding]) for padding, held in self.batch]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, len(self.batch) - 1), min_size=1, max_size=5))
        if data.draw(st.booleans()):
            self.layer.reorder_cache(torch.tensor(chosen))
        else:
            self.layer.batch_select_indices(torch.tensor(chosen))
        self.choose(chosen)

    @precondition(lambda self: len(self.batch) <= 3)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats: int) -> None:
        self.layer.batch_repeat_interleave(repeats)
        self.choose([row for row in range(len(self.batch)) for _ in range(repeats)])

    def choose(self, chosen: list[int]) -> None:
        self.batch = [(self.batch[row][0], list(self.batch[row][1])) for row in chosen]

    @rule(paddings=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def reset(self, paddings: list[int]) -> None:
        self.layer.reset()
        assert self.layer.batch == 0
        self.prompt(paddings)

    @rule()
    def look(self) -> None:
        """After the next step, the peers hold exactly the tokens that the model would have in its own cache."""
        self.step(1)
        [session] = self.made
        assert [session.rows[row] for row in self.current] == [held for _, held in self.batch]
        assert len(session.rows) == len(self.batch), "rows that nobody continues are dropped"

    @invariant()
    def knows_its_length(self) -> None:
        assert self.layer.get_seq_length() == self.columns
        assert self.layer.get_mask_sizes(3) == (self.columns + 3, 0)
        assert self.layer.batch == len(self.batch)

    def teardown(self) -> None:
        if self.batch:
            self.look()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=examples(60), stateful_step_count=25)


def test_a_beam_that_continues_is_not_copied() -> None:
    layer, made = make_layer()
    session, parts, forks = layer.begin_step(mask(0, 0, 0, columns=2), 1)
    cast(FakeSession, session).step(parts, forks, [[1, 2], [3, 4], [5, 6]])
    layer.reorder_cache(torch.tensor([0, 1, 1]))
    _, parts, forks = layer.begin_step(mask(0, 0, 0, columns=3), 1)
    assert forks is not None
    made[0].step(parts, forks, [[7], [8], [9]])
    assert made[0].copies == 1
    assert [made[0].rows[part.row] for part in parts] == [[1, 2, 7], [3, 4, 8], [3, 4, 9]]


def test_an_unchanged_order_of_rows_needs_no_forks() -> None:
    layer, _ = make_layer()
    layer.begin_step(mask(0, 0, columns=2), 1)
    layer.reorder_cache(torch.tensor([0, 1]))
    layer.batch_repeat_interleave(1)
    assert layer.begin_step(mask(0, 0, columns=3), 1)[2] is None


def test_the_first_step_drops_all_earlier_rows_of_the_session() -> None:
    layer, _ = make_layer()
    assert layer.begin_step(mask(0, columns=2), 1)[2] == []


def test_padding_is_not_sent() -> None:
    layer, _ = make_layer()
    _, parts, _ = layer.begin_step(mask(0, 2, 3, columns=4), 0)
    assert [(part.start, part.length, part.keep) for part in parts] == [(0, 4, 4), (0, 2, 2), (0, 1, 1)]
    _, parts, _ = layer.begin_step(mask(0, 2, 3, columns=5), 1)
    assert [(part.start, part.length, part.keep) for part in parts] == [(4, 1, 1), (2, 1, 1), (1, 1, 1)]


def test_memory_is_reserved_ahead_and_for_all_rows() -> None:
    layer, made = make_layer()
    layer.begin_step(mask(0, 0, columns=3), 1)
    [session] = made
    assert session.reservation == 2 * RESERVE_STEP
    layer.begin_step(mask(0, 0, columns=RESERVE_STEP), 1)
    assert session.reservation == 2 * RESERVE_STEP
    layer.begin_step(mask(0, 0, columns=RESERVE_STEP + 1), 1)
    assert session.reservation == 4 * RESERVE_STEP
    layer.batch_repeat_interleave(3)
    layer.begin_step(mask(0, 0, 0, 0, 0, 0, columns=RESERVE_STEP + 2), 1)
    assert session.reservation == 12 * RESERVE_STEP


def test_a_known_length_is_reserved_at_once_and_exactly() -> None:
    layer, made = make_layer()
    layer.reserve(40)
    layer.reserve(20)
    layer.begin_step(mask(0, 0, columns=3), 1)
    assert made[0].reservation == 2 * 40


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([[True, True, False]]),
        torch.tensor([[True, False, True]]),
    ],
)
def test_padding_that_is_not_on_the_left_is_refused(wrong: torch.Tensor) -> None:
    layer, made = make_layer()
    with pytest.raises(ValueError, match="padding_side"):
        layer.begin_step(wrong, 1)
    assert not made, "before anything is reserved"


def test_a_mask_that_changes_the_past_is_refused() -> None:
    layer, _ = make_layer()
    layer.begin_step(mask(1, columns=3), 1)
    with pytest.raises(ValueError, match="has changed"):
        layer.begin_step(mask(0, columns=4), 1)


def test_another_number_of_rows_is_refused() -> None:
    layer, _ = make_layer()
    layer.begin_step(mask(0, 0, columns=3), 1)
    with pytest.raises(ValueError, match="cache holds 2 rows and the batch has 3"):
        layer.begin_step(mask(0, 0, 0, columns=4), 1)


def test_cropping_takes_a_negative_number_as_transformers_does() -> None:
    layer, _ = make_layer()
    layer.begin_step(mask(0, columns=3), 1)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)
    layer.crop(-100)
    assert layer.get_seq_length() == 0


def test_the_cache_has_no_keys_and_values() -> None:
    layer, _ = make_layer()
    nothing = torch.empty(0)
    with pytest.raises(NotImplementedError):
        layer.update(nothing, nothing)
    with pytest.raises(NotImplementedError):
        layer.lazy_initialization(nothing, nothing)


def test_the_session_of_a_collected_cache_is_closed_later_by_another_thread() -> None:
    """The garbage collector may run in a thread that holds the locks which closing takes."""
    made: list[FakeSession] = []

    def open_session(reservation: int) -> Any:
        made.append(FakeSession(reservation))
        return made[-1]

    RemoteCache(open_session).close()
    assert not made
    cache = RemoteCache(open_session)
    cache.remote.begin_step(mask(0, columns=2), 1)
    assert cache.session is made[0]
    assert cache.get_seq_length() == 2
    del cache
    assert made[0].closed_later and not made[0].closed, "a finalizer must wait for no lock"
    closed = RemoteCache(open_session)
    closed.remote.begin_step(mask(0, columns=2), 1)
    closed.close()
    del closed
    assert made[1].closed == 1
    assert not made[1].closed_later


def test_columns_of_padding_alone_send_nothing_and_begin_nothing() -> None:
    """In a prefill in chunks, a row begins with the chunk that has its first token."""
    layer, _ = make_layer()
    _, parts, forks = layer.begin_step(mask(4, 3, columns=2), 1)
    assert [part.length for part in parts] == [0, 0]
    assert forks is None
    session, parts, forks = layer.begin_step(mask(4, 3, columns=5), 1)
    assert [(part.start, part.length) for part in parts] == [(0, 1), (0, 2)]
    assert forks == []
    cast(FakeSession, session).step(parts, forks, [[1], [2, 3]])
    with pytest.raises(ValueError, match="attention_mask has changed at cached positions"):
        layer.begin_step(mask(5, 3, columns=6), 1)


def test_rows_with_changed_padding_keep_their_common_positions() -> None:
    layer, _ = make_layer()
    session, parts, forks = layer.begin_step(mask(2, 0, columns=6), 1)
    cast(FakeSession, session).step(parts, forks, [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]])
    layer.rewind(4, [0, 1])
    _, parts, forks = layer.begin_step(mask(0, 1, columns=5), 1)
    assert forks is None
    assert [(part.start, part.length) for part in parts] == [(4, 1), (3, 1)]


def test_another_adapter_needs_a_new_sequence_and_gets_a_new_session() -> None:
    layer, made = make_layer()
    layer.begin_step(mask(0, columns=2), 1)
    adapter = AdapterTensors({})
    with pytest.raises(AdapterError, match="new cache"):
        layer.begin_step(mask(0, columns=3), 1, adapter)
    layer.rewind(0, [0])
    layer.begin_step(mask(0, columns=2), 1, adapter)
    assert [session.closed for session in made] == [1, 0]
    assert made[1].adapter is adapter
    layer.reset()
    layer.begin_step(mask(0, columns=2), 1)
    assert [session.closed for session in made] == [1, 1, 0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 6))
def test_parts_are_the_real_positions_of_the_mask(paddings: list[int], new: int, keep: int) -> None:
    layer, _ = make_layer()
    columns = max(paddings) + new
    given_mask = mask(*paddings, columns=columns)
    _, parts, _ = layer.begin_step(given_mask, keep)
    assert [part.length for part in parts] == given_mask.sum(dim=1).tolist()
    assert all(part.start == 0 and part.keep == (min(keep, part.length) if keep else part.length) for part in parts)
    assert len({part.row for part in parts}) == len(parts)


def test_a_cache_closed_before_its_first_step_keeps_no_session_open() -> None:
    layer, made = make_layer()
    layer.close()
    layer.begin_step(mask(0, columns=4), 0)
    assert [session.closed for session in made] == [1]
