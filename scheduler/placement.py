"""Which blocks a peer should serve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from scheduler.facts import PASS_SIZES, Floats, Integers, Peer, Speed

# Share of a device's memory that blocks may use by default; the rest is for KV caches and the system.
BLOCKS_SHARE: Final = 0.6
# Throughputs that differ by less than this share count as equal, so that the length of chains decides.
NEAR_EQUAL: Final = 0.1
# A peer that is n times as slow as the new peer, including its link, counts with the weight (1 / n) ** SLOWER_POWER.
SLOWER_POWER: Final = 2
_FASTEST_BLOCK_MS = 1e-5


def choose_span(
    peers: Iterable[Peer],
    num_blocks: int,
    max_blocks: int,
    own_ms: float | None = None,
    away_ms: Mapping[str, float] | None = None,
) -> tuple[int, int]:
    """The span [start, end) of `max_blocks` blocks (all, if the model has fewer) where a new peer helps most.

    1. Coverage: the span with the most blocks that no other peer serves.
    2. Throughput: a swarm is as fast as its weakest block. The weakest block of the span has the lowest throughput;
       between spans with (nearly) equal weakest blocks the next weakest block decides, and so on. (The rule of Petals,
       Borzunov et al., 2023.)
    3. Latency: a span that matches the spans of other peers, so that chains through it have the fewest hops. Among
       equal spans, the one with the lower start.

    The throughput of a block is summed over its peers, see `rates`. Peers that are slower than the new peer, or far
    from it, count less, because no chain uses them where a faster or nearer peer exists. So fast peers spread over the
    whole model, slow peers go to blocks with little throughput, and the peers of each region serve the whole model if
    they can.

    own_ms: `block_ms` of the new peer; None: unknown, and all other peers count in full. away_ms: one-way latencies
    from the new peer to others, by their ids; a peer that is missing counts as near.

    Raises ValueError if max_blocks or num_blocks is less than 1.
    """
    if num_blocks < 1 or max_blocks < 1:
        raise ValueError("a peer serves at least one block")
    spans = Spans.of(peers, num_blocks)
    away = np.array([(away_ms or {}).get(peer, 0.0) for peer in spans.ids])
    return best_span(spans, num_blocks, min(max_blocks, num_blocks), own_ms, away)


@dataclass(frozen=True, eq=False, slots=True)
class Spans:
    """Peers as arrays, without peers that serve no block of the model.

    start, end: within 0 .. num_blocks. work_ms: see `work_ms`. sending_ms: see `Peer`.
    """

    ids: Sequence[str]
    start: Integers
    end: Integers
    work_ms: Floats
    sending_ms: Floats

    @classmethod
    def of(cls, peers: Iterable[Peer], num_blocks: int) -> Spans:
        present = [peer for peer in peers if peer.start < peer.end and peer.start < num_blocks and peer.end > 0]
        return cls(
            [peer.id for peer in present],
            np.array([peer.start for peer in present], dtype=np.int64).clip(0),
            np.array([peer.end for peer in present], dtype=np.int64).clip(max=num_blocks),
            np.array([work_ms(peer.speed) for peer in present], dtype=np.float64),
            np.array([peer.sending_ms for peer in present], dtype=np.float64),
        )

    def of_some(self, chosen: Integers) -> Spans:
        names = [self.ids[int(index)] for index in chosen]
        return Spans(names, self.start[chosen], self.end[chosen], self.work_ms[chosen], self.sending_ms[chosen])

    def beside(self, others: Spans) -> Spans:
        return Spans(
            [*self.ids, *others.ids],
            np.concatenate([self.start, others.start]),
            np.concatenate([self.end, others.end]),
            np.concatenate([self.work_ms, others.work_ms]),
            np.concatenate([self.sending_ms, others.sending_ms]),
        )

    @property
    def rate(self) -> Floats:
        """The throughput of each peer at each of its blocks, see `rates`."""
        return rates(self.work_ms, self.end - self.start, self.sending_ms)

    @property
    def block_ms(self) -> Floats:
        return block_ms(self.work_ms, self.end - self.start, self.sending_ms)


def work_ms(speed: Speed) -> float:
    """Ms of one block for a token (in a pass with one other token) and for a position of a prompt, added up."""
    return speed.block_ms_at(2) / 2 + speed.block_ms_at(PASS_SIZES[-1]) / PASS_SIZES[-1]


def block_ms(work_ms: Floats | float, blocks: Integers | int, sending_ms: Floats | float) -> Floats:
    """Ms per block of a token and a position of a prompt: to compute them, or to send both, whichever takes longer."""
    return np.maximum(np.maximum(work_ms, _FASTEST_BLOCK_MS), 2.0 * sending_ms / blocks)


def rates(work_ms: Floats, blocks: Integers, sending_ms: Floats) -> Floats:
    """Throughput of peers: tokens per 1000 s, where each token comes with one position of a prompt.

    A token passes the whole span of a peer, so the peer's time is divided among its blocks. The result is exact if
    all chains use whole spans. Otherwise it is too low, because chains may use other peers for the busy part of a span.

    The results are whole numbers, at least 1, so that sums are exact and do not depend on the order of the peers.
    """
    return np.maximum(1.0, np.rint(1e6 / (block_ms(work_ms, blocks, sending_ms) * blocks)))


def sum_per_block(start: Integers, end: Integers, values: Floats, num_blocks: int) -> Floats:
    """For each block the sum of the values of the spans that contain it; exactly 0 without such spans."""
    return _Flow(start, end, values, num_blocks).throughput


def best_span(
    spans: Spans, num_blocks: int, length: int, own_ms: float | None = None, away_ms: Floats | float = 0.0
) -> tuple[int, int]:
    """`choose_span` for peers in arrays. away_ms: `[peers]`."""
    flow = _Flow(spans.start, spans.end, spans.rate, num_blocks)
    counted = flow.throughput
    if own_ms is not None:
        hop_ms = spans.block_ms + away_ms / (spans.end - spans.start)
        share = np.minimum(1.0, own_ms / hop_ms) ** SLOWER_POWER
        counted = sum_per_block(spans.start, spans.end, np.rint(spans.rate * share), num_blocks)
    levels = np.rint(np.log(np.maximum(counted, 1.0)) / math.log1p(NEAR_EQUAL))
    levels[flow.throughput == 0] = -1.0
    windows = np.sort(sliding_window_view(levels, length), axis=1)
    weakest = windows[np.lexsort(windows.T[::-1])[0]]
    starts = np.flatnonzero((windows == weakest).all(axis=1))
    start = starts[0] if len(starts) == 1 else flow.shortest(starts, length)
    return int(start), int(start) + length


def fewest_hops(starts: Integers, length: int, spans: Spans, num_blocks: int) -> int:
    return _Flow(spans.start, spans.end, spans.rate, num_blocks).shortest(starts, length)


class _Flow:
    """The flow of tokens through the spans, if each block chooses among its peers in proportion to their rates."""

    def __init__(self, start: Integers, end: Integers, rate: Floats, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        width = num_blocks + 1
        table = np.bincount(start * width + end, weights=rate, minlength=width * width)[: width * width]
        table = table.reshape(width, width)  # [start, end]; sums only, because differences would leave noise in holes.
        self._by_end = table.cumsum(axis=0)  # [block, end]: of the peers that start at or before a block.
        # [start, block]: of the peers that end at or after a block.
        self._by_start = table[:, ::-1].cumsum(axis=1)[:, ::-1]
        blocks = np.arange(num_blocks)
        self.throughput: Floats = self._by_end[:, ::-1].cumsum(axis=1)[:, ::-1][blocks, blocks + 1]

    def hops(self, length: int) -> tuple[Floats, Floats]:
        """Mean hops of chains over the blocks before each boundary, and over the blocks after it.

        Blocks without a peer count as if future peers with `length` blocks each served them.
        """
        before, after = np.zeros(self.num_blocks + 1), np.zeros(self.num_blocks + 1)
        covered = self.throughput > 0
        hole_start = 0
        for end in range(1, self.num_blocks + 1):
            if covered[end - 1]:
                before[end] = 1 + self._by_start[:end, end] @ before[:end] / self.throughput[end - 1]
                hole_start = end
            else:
                before[end] = 1 + before[max(hole_start, end - length)]
        hole_end = self.num_blocks
        for start in range(self.num_blocks - 1, -1, -1):
            if covered[start]:
                after[start] = 1 + self._by_end[start, start + 1 :] @ after[start + 1 :] / self.throughput[start]
                hole_end = start
            else:
                after[start] = 1 + after[min(hole_end, start + length)]
        return before, after

    def shortest(self, starts: Integers, length: int) -> int:
        """Among these starts of spans, the one with which chains have the fewest hops."""
        before, after = self.hops(length)
        return int(starts[np.round(before[starts] + after[starts + length], 6).argmin()])
