"""Which peer should move to other blocks, and to which blocks.

All peers evaluate the same public facts, and only the peer that the result names moves: peers move one after the other
without a lock. Their views may be stale, though. Two rules keep peers from leaving a block at the same time:

- Among the peers of a block, the one with the lowest id never leaves. This works without messages: however stale the
  views are, every block keeps the lowest of the peers that would leave it at the same time. (A peer leaves only blocks
  at which it has seen a lower id. The lowest id that ever served a block never sees a lower one.) The rule does not
  help against peers that crash.
- Where a model lacks blocks and no other peer can help, a lowest peer may move too: a move with `confirm`. The peer
  must first announce the move (`moving`), wait until the records of all peers that could leave one of the same blocks
  are younger than the announcement, and move only if the result still names it. Among the peers that want to leave a
  block, the last peer to announce sees the announcements of all others.

Which peer fills a hole depends only on the spans of peers, not on speeds. Speeds change with every record; with them,
peers with different records could name different peers, and no peer would know whose blocks it should take over.

The moves come to an end: each leaves fewer blocks without a peer, or brings spare replicas nearer to such blocks, or
lifts some of the weakest blocks above all blocks that it weakens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from scheduler.facts import Floats, Integers, Peer
from scheduler.placement import Spans, best_span, fewest_hops, rates, sum_per_block

# A move must raise the throughput of weak blocks above (1 + this share) times that of the weakest block.
MIN_GAIN: Final = 0.2
SETTLE_S: Final = 300.0  # how long a peer stays after a move, unless some blocks have no peer
HORIZON_S: Final = 600.0  # seconds for which the gain of a move counts; within this time it must repay its cost
LOAD_S: Final = 30.0  # time for which a moving peer serves no blocks, unless it states another time
# Time for which a session waits for its replay when a peer leaves (1,000 positions, docs/benchmarks.md).
REPLAY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class PeerMove:
    """The peer should leave its span and serve the blocks [start, end)."""

    peer: str
    start: int
    end: int
    confirm: bool = False  # announce, hold and check again before the move, see this module's docstring


@dataclass(frozen=True, slots=True)
class Willingness:
    """What a move would cost each peer, by id; a peer that is missing has the default cost."""

    # Open sessions, which must be replayed elsewhere.
    sessions: Mapping[str, int] = field(default_factory=dict[str, int])
    load_s: Mapping[str, float] = field(default_factory=dict[str, float])  # from leaving a span to serving the new one
    settled_s: Mapping[str, float] = field(default_factory=dict[str, float])  # since the peer last moved or joined


def best_move(
    peers: Sequence[Peer],
    num_blocks: int,
    *,
    max_blocks: Mapping[str, int],
    willingness: Willingness | None = None,
    moving: Mapping[str, tuple[int, int]] | None = None,
) -> PeerMove | None:
    """The move that improves the swarm most; None if no move pays. The order of the peers does not matter.

    While some blocks have no peer, the model cannot be used: a move fills as many of them as possible, at any cost.
    Otherwise the throughput of the weakest block counts (as in `choose_span`). A move must raise weak blocks, which
    have less than 1 + `MIN_GAIN` times the throughput of the weakest, beyond that mark, and leave all other blocks
    above it. Lifting only some of the weak blocks earns that share of the gain, because other peers must follow. The
    gain within `HORIZON_S` must exceed the tokens lost while the peer loads and its sessions are replayed (at worst,
    the swarm waits for each).

    max_blocks: blocks for which a peer has memory. A peer that is missing stays where it is.
    moving: peers that have announced a move or are moving, and their new spans. They count as peers of their new
        blocks only. While there are any, other peers move only to blocks without a peer. A peer that asks about its
        own announced move leaves itself out.

    Raises ValueError if two peers have the same id, or num_blocks is less than 1.
    """
    if num_blocks < 1 or len({peer.id for peer in peers}) != len(peers):
        raise ValueError("two peers have the same id, or num_blocks is less than 1")
    moving = moving or {}
    by_id = sorted(peers, key=lambda peer: peer.id)
    serving = Spans.of((peer for peer in by_id if peer.id not in moving), num_blocks)
    arriving = (replace(peer, start=moving[peer.id][0], end=moving[peer.id][1]) for peer in by_id if peer.id in moving)
    view = _MoveFacts(serving, Spans.of(arriving, num_blocks), max_blocks, num_blocks)
    if not view.planned.all():
        return _fill(view) or _shift(view)
    if moving:
        return None
    return _reinforce(view, willingness or Willingness())


class _MoveFacts:
    """The facts as arrays: by serving peer in the order of ids, or by block.

    length: number of blocks that a peer would serve after a move; 0: it cannot move. lowest: whether the peer has the
    lowest id at some block.
    planned, replicas: tokens per 1000 s and peers of each block after all current moves.
    """

    def __init__(self, serving: Spans, arriving: Spans, max_blocks: Mapping[str, int], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.serving = serving
        self.all = serving.beside(arriving)
        self.length: Integers = np.array([max_blocks.get(peer, 0) for peer in serving.ids], dtype=np.int64)
        self.length = self.length.clip(0, num_blocks)
        self.rate = serving.rate
        self.planned = sum_per_block(self.all.start, self.all.end, self.all.rate, num_blocks)
        self.replicas = sum_per_block(self.all.start, self.all.end, np.ones(len(self.all.ids)), num_blocks)
        self.lowest = np.zeros(len(serving.ids), dtype=bool)
        first = np.full((num_blocks + 1, num_blocks + 1), len(serving.ids))
        np.minimum.at(first, (serving.start, serving.end), np.arange(len(serving.ids)))
        for block in range(num_blocks):
            peer = first[: block + 1, block + 1 :].min()
            if peer < len(self.lowest):
                self.lowest[peer] = True

    def without(self, peer: int) -> Spans:
        """All other peers, at their spans after all current moves."""
        return self.all.of_some(np.delete(np.arange(len(self.all.ids)), peer))


def _fill(view: _MoveFacts) -> PeerMove | None:
    """Moves a peer that has the lowest id at no block to where it fills most blocks without a peer; among equally good
    peers, the peer whose blocks have most replicas."""
    free = np.flatnonzero(~view.lowest & (view.length > 0))
    if not len(free):
        return None
    holes = np.concatenate([[0], np.cumsum(view.planned == 0)])
    most = np.array([0, *((holes[size:] - holes[:-size]).max() for size in range(1, view.num_blocks + 1))])
    spare = _range_minima(view.replicas)[view.serving.start, view.serving.end][free]
    peer = int(free[np.lexsort((free, -spare, -most[view.length[free]]))[0]])
    span = best_span(view.without(peer), view.num_blocks, int(view.length[peer]))
    return PeerMove(view.serving.ids[peer], *span)


def _shift(view: _MoveFacts) -> PeerMove | None:
    """Moves a peer although it has the lowest id at some block, because the model cannot be used otherwise.

    Every block that the peer leaves has another replica. Blocks of both the old and the new span have no peer during
    the move. If no move fills a hole, the result is the move that brings spare replicas nearer to a hole: consecutive
    moves shift spare memory to the hole.
    """
    served = sum_per_block(view.serving.start, view.serving.end, np.ones(len(view.rate)), view.num_blocks)
    planned = view.replicas
    blocks = np.arange(view.num_blocks)
    nothing = view.num_blocks + 1
    best = int((planned == 0).sum()), int(_distance_to_holes(planned[None, :])[0]), False
    found: PeerMove | None = None
    # `_fill` found no move, so every peer here has the lowest id at some block: there are at most as many as blocks.
    for peer in map(int, np.flatnonzero(view.length > 0)):
        length = int(view.length[peer])
        starts = np.arange(view.num_blocks - length + 1)
        old = (view.serving.start[peer] <= blocks) & (blocks < view.serving.end[peer])
        new = (starts[:, None] <= blocks) & (blocks < starts[:, None] + length)
        after = planned - old + new
        lost = (old & ~new & (served < 2)).any(axis=1)
        holes = np.where(lost, nothing, (after == 0).sum(axis=1))
        distance = np.where(lost, nothing, _distance_to_holes(after))
        start = int(np.lexsort((starts, distance, holes))[0])
        alone = bool((old & (served < 2)).any())
        key = int(holes[start]), int(distance[start]), alone
        if key[:2] < best[:2] or (found is not None and key < best):
            best, found = key, PeerMove(view.serving.ids[peer], start, start + length, confirm=True)
    return found


def _distance_to_holes(replicas: Floats) -> Integers:
    """The distance from the holes to the nearest block with a spare replica, `[cases, blocks]` -> `[cases]`."""
    cases, num_blocks = replicas.shape
    nearest = np.full(cases, num_blocks)
    last_hole, last_spare = np.full(cases, -num_blocks), np.full(cases, -num_blocks)
    for block in range(num_blocks):
        hole, spare = replicas[:, block] == 0, replicas[:, block] >= 2
        np.minimum(nearest, np.where(hole, block - last_spare, num_blocks), out=nearest)
        np.minimum(nearest, np.where(spare, block - last_hole, num_blocks), out=nearest)
        last_hole[hole], last_spare[spare] = block, block
    return nearest


def _reinforce(view: _MoveFacts, willingness: Willingness) -> PeerMove | None:
    """The move with the largest gain for the weakest blocks, less its cost, of a peer with the lowest id at no
    block."""
    ids, now = view.serving.ids, view.planned
    settled = np.array([willingness.settled_s.get(peer, np.inf) >= SETTLE_S for peer in ids], dtype=bool)
    movers = np.flatnonzero(~view.lowest & (view.length > 0) & settled)
    if not len(movers):
        return None
    weakest = float(now.min())
    mark = weakest * (1 + MIN_GAIN)
    old_start, old_end, length = view.serving.start[movers], view.serving.end[movers], view.length[movers]
    old_rate = view.rate[movers]
    new_rate = rates(view.serving.work_ms[movers], length, view.serving.sending_ms[movers])
    least = _range_minima(now)
    raised = (now < mark) & (now + new_rate[:, None] >= mark)
    raised_before = np.zeros((len(movers), view.num_blocks + 1), dtype=np.int64)  # raised blocks before each boundary
    np.cumsum(raised, axis=1, out=raised_before[:, 1:])
    rows = np.arange(len(movers))

    load_s = np.array([willingness.load_s.get(ids[peer], LOAD_S) for peer in map(int, movers)])
    sessions = np.array([willingness.sessions.get(ids[peer], 0) for peer in map(int, movers)])
    while_loading = np.minimum(weakest, least[old_start, old_end] - old_rate)
    cost = (weakest - while_loading) * load_s + sessions * REPLAY_S * weakest

    score = np.full((len(movers), view.num_blocks), -np.inf)
    for start in range(view.num_blocks):
        # Ranges whose end is before their start are empty: their minimum is infinite, and they contain no raised block.
        end = np.minimum(start + length, view.num_blocks)
        left = np.minimum(least[old_start, np.minimum(old_end, start)], least[np.maximum(old_start, end), old_end])
        kept = least[np.maximum(old_start, start), np.minimum(old_end, end)]
        # Boundaries between the new blocks before the old span, and those after it.
        before = np.minimum(end, old_start)
        behind = np.maximum(start, old_end)
        lifted = np.maximum(raised_before[rows, before] - raised_before[:, start], 0)
        lifted += np.maximum(raised_before[rows, end] - raised_before[rows, behind], 0)
        entered = np.minimum(least[start, before], least[behind, end])
        outside = np.minimum(least[0, np.minimum(start, old_start)], least[np.maximum(end, old_end), view.num_blocks])
        between = least[np.minimum(end, old_end), np.maximum(start, old_start)]
        after = np.minimum(np.minimum(left - old_rate, kept - old_rate + new_rate), entered + new_rate)
        after = np.minimum(np.minimum(outside, between), after)
        allowed = (left - old_rate >= mark) & ((new_rate >= old_rate) | (kept - old_rate + new_rate >= mark))
        allowed &= (lifted > 0) & (start + length <= view.num_blocks)
        share = lifted / (now < mark).sum()
        part: Floats = (mark - weakest) * share
        gain = np.where(after >= mark, after - weakest, part)
        score[:, start] = np.where(allowed, gain * HORIZON_S - cost, -np.inf)
    best = score.max()
    if best <= 0:
        return None
    mover = int(np.flatnonzero(score.max(axis=1) == best)[0])
    peer, size = int(movers[mover]), int(length[mover])
    start = fewest_hops(np.flatnonzero(score[mover] == best), size, view.without(peer), view.num_blocks)
    return PeerMove(ids[peer], start, start + size)


def _range_minima(values: Floats) -> Floats:
    """The least value in values[i:j] for each [i, j]; infinite for an empty range."""
    count = len(values)
    minima = np.full((count + 1, count + 1), np.inf)
    for start in range(count):
        minima[start, start + 1 :] = np.minimum.accumulate(values[start:])
    return minima
