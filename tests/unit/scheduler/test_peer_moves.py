from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.facts import Peer, Speed, coverage, missing_blocks
from scheduler.peer_moves import MIN_GAIN, SETTLE_S, PeerMove, Willingness, best_move
from scheduler.placement import Spans, sum_per_block
from tests.tiers import examples


def peer(name: str, start: int, end: int, decode_ms: float = 1.0) -> Peer:
    return Peer(name, start, end, Speed.of(decode_ms, decode_ms), kv_free=1000)


def throughput(peers: Iterable[Peer], num_blocks: int) -> list[float]:
    spans = Spans.of(peers, num_blocks)
    return sum_per_block(spans.start, spans.end, spans.rate, num_blocks).tolist()


def served(peers: Iterable[Peer], num_blocks: int) -> set[int]:
    return {block for block, replicas in enumerate(coverage(peers, num_blocks)) if replicas}


def moved(peers: Sequence[Peer], move: PeerMove) -> list[Peer]:
    return [replace(item, start=move.start, end=move.end) if item.id == move.peer else item for item in peers]


@st.composite
def swarms(draw: st.DrawFn, most_peers: int = 9) -> tuple[list[Peer], int, dict[str, int]]:
    """Peers, the number of blocks, and the number of blocks that fit into each peer's memory, at least its span."""
    num_blocks = draw(st.integers(1, 12))
    peers: list[Peer] = []
    max_blocks: dict[str, int] = {}
    for name in draw(st.permutations("abcdefghi"))[: draw(st.integers(0, most_peers))]:
        start = draw(st.integers(0, num_blocks - 1))
        end = draw(st.integers(start + 1, min(num_blocks, start + 6)))
        peers.append(peer(name, start, end, draw(st.sampled_from([0.5, 1.0, 1.1, 7.0]))))
        max_blocks[name] = end - start + draw(st.sampled_from([0, 0, 0, 2]))
    return peers, num_blocks, max_blocks


@given(swarms(), st.integers(0, 10), st.randoms(use_true_random=False))
def test_repeated_moves_end_never_lower_throughput_and_ignore_the_order_of_peers(
    swarm: tuple[list[Peer], int, dict[str, int]], fixed: int, rng: random.Random
) -> None:
    peers, num_blocks, max_blocks = swarm
    max_blocks = dict(list(max_blocks.items())[:fixed])  # Peers without an entry never move.
    for _ in range(300):
        move = best_move(peers, num_blocks, max_blocks=max_blocks)
        shuffled = rng.sample(peers, len(peers))
        assert move == best_move(shuffled, num_blocks, max_blocks=dict(reversed(max_blocks.items())))
        if move is None:
            return
        assert 0 <= move.start < move.end <= num_blocks
        assert move.end - move.start == min(max_blocks[move.peer], num_blocks)
        others = [item for item in peers if item.id != move.peer]
        after = moved(peers, move)
        assert served(after, num_blocks) >= served(peers, num_blocks)
        if not move.confirm:
            assert served(others, num_blocks) == served(peers, num_blocks)
        if not missing_blocks(peers, num_blocks):
            before_ms, after_ms = sorted(throughput(peers, num_blocks)), sorted(throughput(after, num_blocks))
            assert after_ms > before_ms and after_ms[0] >= before_ms[0]
            assert not move.confirm
        peers = after
    pytest.fail("the moves do not end")


@given(swarms(), st.sets(st.sampled_from("abcdefghi")))
def test_departures_are_compensated_if_memory_suffices(
    swarm: tuple[list[Peer], int, dict[str, int]], gone: set[str]
) -> None:
    peers, num_blocks, max_blocks = swarm
    peers = [item for item in peers if item.id not in gone]
    enough = sum(max_blocks[item.id] for item in peers) >= num_blocks
    for _ in range(300):
        if (move := best_move(peers, num_blocks, max_blocks=max_blocks)) is None:
            break
        peers = moved(peers, move)
    assert not (enough and missing_blocks(peers, num_blocks))


@settings(max_examples=examples(100))
@given(swarms(), st.randoms(use_true_random=False), st.integers(1, 8))
def test_simultaneous_moves_with_stale_views_uncover_no_block(
    swarm: tuple[list[Peer], int, dict[str, int]], rng: random.Random, rounds: int
) -> None:
    """Each peer has an old view of each other peer, and all peers that plan their own move make it at the same time."""
    peers, num_blocks, max_blocks = swarm
    history = [list(peers)]
    loading: dict[str, tuple[int, Peer]] = {}  # Peers that serve nothing while they load, and their span afterwards.
    for now in range(rounds):
        state = list(history[-1])
        moves: list[PeerMove] = []
        for own in state:
            if own.start == own.end:
                continue
            view = [
                own if item.id == own.id else next(old for old in rng.choice(history) if old.id == item.id)
                for item in state
            ]
            move = best_move(view, num_blocks, max_blocks=max_blocks)
            if move is not None and move.peer == own.id and not move.confirm:
                moves.append(move)
        for move in moves:
            place = next(index for index, item in enumerate(state) if item.id == move.peer)
            loading[move.peer] = now + rng.randint(0, 2), replace(state[place], start=move.start, end=move.end)
            state[place] = replace(state[place], start=0, end=0)
        assert served(state, num_blocks) == served(history[-1], num_blocks)
        for name, (ready, later) in list(loading.items()):
            if ready <= now:
                state = [later if item.id == name else item for item in state]
                del loading[name]
        history.append(state)


class Announcing:
    """A peer of a swarm that announces each move, holds it and checks it again; views are up to `late` rounds old."""

    def __init__(self, own: Peer, late: int) -> None:
        self.own = own
        self.late = late
        self.announced: PeerMove | None = None
        self.since = 0
        self.ready_at: int | None = None

    @property
    def public(self) -> tuple[Peer, tuple[int, int] | None]:
        return self.own, (self.announced.start, self.announced.end) if self.announced else None

    def act(
        self,
        now: int,
        view: Mapping[str, tuple[Peer, tuple[int, int] | None]],
        num_blocks: int,
        max_blocks: Mapping[str, int],
        load_rounds: int,
    ) -> None:
        if self.ready_at is not None:
            if now >= self.ready_at:
                assert self.announced is not None
                self.own = replace(self.own, start=self.announced.start, end=self.announced.end)
                self.announced = self.ready_at = None
            return
        others = {name: seen for name, seen in view.items() if name != self.own.id}
        moving = {name: target for name, (_, target) in others.items() if target is not None}
        present = [self.own, *(other for other, _ in others.values())]
        move = best_move(present, num_blocks, max_blocks=max_blocks, moving=moving)
        if move is None or move.peer != self.own.id:
            self.announced = None
        elif self.announced != move:
            self.announced, self.since = move, now
        elif now - self.since > self.late:
            self.own = replace(self.own, start=0, end=0)
            self.ready_at = now + load_rounds


@settings(max_examples=examples(40))
@given(swarms(), st.randoms(use_true_random=False), st.integers(0, 3))
def test_announced_moves_uncover_no_block_if_held_longer_than_views_are_old(
    swarm: tuple[list[Peer], int, dict[str, int]], rng: random.Random, late: int
) -> None:
    peers, num_blocks, max_blocks = swarm
    actors = {item.id: Announcing(item, late) for item in peers}
    history = [{name: actor.public for name, actor in actors.items()}]
    for now in range(30):
        before = served((actor.own for actor in actors.values()), num_blocks)
        taken_along: set[int] = set()
        for name, actor in actors.items():
            view = {other: rng.choice(history[-late - 1 :])[other] for other in actors}
            was = actor.own
            actor.act(now, view, num_blocks, max_blocks, load_rounds=rng.randint(1, 3))
            if actor.ready_at is not None and was.start < was.end:
                assert actor.announced is not None and actor.announced.peer == name
                taken_along |= set(range(was.start, was.end)) & set(range(actor.announced.start, actor.announced.end))
        history.append({name: actor.public for name, actor in actors.items()})
        assert before - served((actor.own for actor in actors.values()), num_blocks) <= taken_along


def test_a_replica_moves_into_a_hole_at_once() -> None:
    swarm = [peer("a", 0, 5), peer("b", 0, 5), peer("c", 5, 8)]
    budgets = {"a": 5, "b": 5, "c": 3}
    busy = Willingness(sessions={"b": 1000}, load_s={"b": 1e6}, settled_s={"b": 0.0})
    assert best_move(swarm, 10, max_blocks=budgets, willingness=busy) == PeerMove("b", 5, 10)
    assert best_move(swarm, 10, max_blocks={"a": 5, "c": 3}) == PeerMove("a", 5, 10, confirm=True)
    # Only block 8 is missing. Spans 4:9 and 5:10 both fill it; 4:9 also helps block 4, which is weaker than block 9.
    assert best_move([*swarm, peer("d", 9, 10)], 10, max_blocks=budgets) == PeerMove("b", 4, 9)


def test_the_most_replicated_peer_fills_the_hole() -> None:
    swarm = [peer("a", 0, 4), peer("b", 0, 4), peer("c", 4, 8), peer("d", 4, 8), peer("e", 4, 8)]
    assert best_move(swarm, 12, max_blocks=dict.fromkeys("abcde", 4)) == PeerMove("d", 8, 12)
    assert best_move(swarm, 12, max_blocks={**dict.fromkeys("acde", 3), "b": 4}) == PeerMove("b", 8, 12)


def test_spans_shift_towards_missing_blocks() -> None:
    swarm = [peer("a", 0, 2), peer("b", 1, 3), peer("c", 3, 5)]
    budgets = dict.fromkeys("abc", 2)
    first = best_move(swarm, 6, max_blocks=budgets)
    assert first is not None and first == PeerMove("b", 2, 4, confirm=True)
    second = best_move(moved(swarm, first), 6, max_blocks=budgets)
    assert second == PeerMove("c", 4, 6, confirm=True)
    assert best_move([peer("a", 0, 2)], 4, max_blocks={"a": 4}) == PeerMove("a", 0, 4, confirm=True)
    assert best_move([peer("a", 0, 2)], 4, max_blocks={"a": 2}) is None


def test_a_hole_is_left_to_the_peer_that_moves_into_it() -> None:
    swarm = [peer("a", 0, 4), peer("b", 0, 4), peer("c", 0, 4)]
    budgets = dict.fromkeys("abc", 4)
    assert best_move(swarm, 8, max_blocks=budgets) == PeerMove("b", 4, 8)
    assert best_move(swarm, 8, max_blocks=budgets, moving={"b": (4, 8)}) is None
    assert best_move(swarm, 12, max_blocks=budgets, moving={"b": (4, 8)}) == PeerMove("c", 8, 12)


def crowded() -> list[Peer]:
    return [*(peer(name, 0, 4) for name in "abcd"), peer("e", 4, 8)]


def test_a_replica_of_strong_blocks_moves_to_the_weakest() -> None:
    budgets = dict.fromkeys("abcde", 4)
    move = best_move(crowded(), 8, max_blocks=budgets)
    assert move is not None and move == PeerMove("b", 4, 8)
    assert best_move(moved(crowded(), move), 8, max_blocks=budgets) is None
    assert best_move(crowded(), 8, max_blocks=budgets, moving={"c": (4, 8)}) is None


def test_a_move_must_be_worth_its_cost() -> None:
    budgets = dict.fromkeys("abcde", 4)

    def move(willingness: Willingness) -> PeerMove | None:
        return best_move(crowded(), 8, max_blocks=budgets, willingness=willingness)

    assert move(Willingness(settled_s=dict.fromkeys("bcd", SETTLE_S - 1))) is None
    assert move(Willingness(settled_s={"b": SETTLE_S - 1, "c": SETTLE_S})) == PeerMove("c", 4, 8)
    assert move(Willingness(sessions={"b": 2, "c": 1, "d": 2})) == PeerMove("c", 4, 8)
    assert move(Willingness(sessions=dict.fromkeys("bcd", 10_000))) is None
    two = [peer("a", 0, 4), peer("b", 0, 4), peer("c", 4, 8, decode_ms=5.0)]
    assert best_move(two, 8, max_blocks={"b": 4}) == PeerMove("b", 4, 8)
    nearly = [peer("a", 0, 4, 1.0), peer("b", 0, 4, 10.0), peer("c", 4, 8, 1.0 + MIN_GAIN / 10)]
    assert best_move(nearly, 8, max_blocks={"b": 4}) is None


def test_several_needed_moves_are_made_one_at_a_time() -> None:
    swarm = [*(peer(name, 0, 4) for name in "abcdef"), peer("g", 4, 12, decode_ms=1.0)]
    budgets = dict.fromkeys("abcdef", 4)
    first = best_move(swarm, 12, max_blocks=budgets)
    assert first is not None and first == PeerMove("b", 4, 8)
    second = best_move(moved(swarm, first), 12, max_blocks=budgets)
    assert second == PeerMove("c", 8, 12)
    assert best_move(swarm, 12, max_blocks=budgets, moving={"b": (4, 8)}) is None  # Only one peer moves at a time.


def test_the_peer_with_the_lowest_id_stays() -> None:
    swarm = [peer("a", 0, 4, decode_ms=9.0), *(peer(name, 0, 4) for name in "bcd"), peer("e", 4, 8)]
    assert best_move(swarm, 8, max_blocks={"a": 4}) is None
    assert best_move(swarm, 8, max_blocks={"a": 4, "d": 4}) == PeerMove("d", 4, 8)


def test_equal_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="same id"):
        best_move([peer("a", 0, 4), peer("a", 0, 4)], 4, max_blocks={})
