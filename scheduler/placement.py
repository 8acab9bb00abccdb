"""Which blocks a peer should serve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from scheduler.network import Network
from scheduler.swarm import PASS_SIZES, Peer, Speed

BLOCKS_SHARE: Final = 0.6
"""Part of a device's memory that blocks take when nothing is asked for; the rest is for KV caches and the system."""

NEAR_EQUAL: Final = 0.1
"""Throughputs that differ by less than about this share count as equal, so that the length of chains decides."""

SLOWER_POWER: Final = 2
"""A peer that is n times as slow as a new one counts as n to this power times less where the new one should go."""

NEIGHBOURS: Final = 32
"""Of the peers that serve a block only so many, the fastest, are looked at as neighbours in a chain."""

_FASTEST_BLOCK_MS = 1e-5

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def choose_span(
    peers: Iterable[Peer],
    num_blocks: int,
    max_blocks: int,
    network: Network | None = None,
    own_id: str | None = None,
    own_ms: float | None = None,
) -> tuple[int, int]:
    """The span [start, end) of `max_blocks` blocks (all, if the model has fewer) where a new peer helps most.

    1. Coverage: a span with as many blocks that nobody serves as can be.
    2. Throughput: a swarm is as fast as its weakest block. The weakest block of the span has the lowest throughput;
       between (nearly) equal ones the next weakest decides, and so on. (The rule of Petals, Borzunov et al., 2023.)
    3. Latency: a span that fits those of the others, so that chains through it have the fewest hops. With `network`
       and `own_id` also one whose neighbours in a chain are near. Then the lower start.

    The throughput of a block is summed over its peers, see `rates`. Peers that are slower than the new one count less:
    no chain takes them where there is a faster one. So fast peers spread over the whole model among themselves, and
    slow ones go where there is little.

    own_ms: `block_ms` of the new peer; None: not known, so that all others count in full.
    network: links or places of the peers and of `own_id`, the id of the new peer.

    Raises ValueError if max_blocks or num_blocks is less than 1.
    """
    if num_blocks < 1 or max_blocks < 1:
        raise ValueError("a peer serves at least one block")
    spans = Spans.of(peers, num_blocks)
    return best_span(spans, num_blocks, min(max_blocks, num_blocks), network, own_id, own_ms)


@dataclass(frozen=True, eq=False, slots=True)
class Spans:
    """Peers as arrays; those that serve no block of the model are left out.

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
        """Some of them, by where they stand."""
        names = [self.ids[int(index)] for index in chosen]
        return Spans(names, self.start[chosen], self.end[chosen], self.work_ms[chosen], self.sending_ms[chosen])

    def beside(self, others: Spans) -> Spans:
        """Both together."""
        return Spans(
            [*self.ids, *others.ids],
            np.concatenate([self.start, others.start]),
            np.concatenate([self.end, others.end]),
            np.concatenate([self.work_ms, others.work_ms]),
            np.concatenate([self.sending_ms, others.sending_ms]),
        )

    @property
    def rate(self) -> Floats:
        """What each peer gives to each of its blocks, see `rates`."""
        return rates(self.work_ms, self.end - self.start, self.sending_ms)

    @property
    def block_ms(self) -> Floats:
        """See `block_ms`."""
        return block_ms(self.work_ms, self.end - self.start, self.sending_ms)


def work_ms(speed: Speed) -> float:
    """Of one block for a token of an answer, that shares its pass with another, and a position of the prompt for it."""
    return speed.at(2) / 2 + speed.at(PASS_SIZES[-1]) / PASS_SIZES[-1]


def block_ms(work_ms: Floats | float, blocks: Integers | int, sending_ms: Floats | float) -> Floats:
    """Ms per block of a token and the position of a prompt, by what takes longer: the blocks, or both on the way up."""
    return np.maximum(np.maximum(work_ms, _FASTEST_BLOCK_MS), 2.0 * sending_ms / blocks)


def rates(work_ms: Floats, blocks: Integers, sending_ms: Floats) -> Floats:
    """Tokens per 1000 s of peers, each with the position of a prompt.

    A token that a peer takes passes its whole span, so that its time is divided among its blocks. That is exact if all
    chains use whole spans, and else too low, as chains may leave the busy part of a span to others.

    Whole numbers, at least 1: so sums are exact, and equal in whatever order the peers are known.
    """
    return np.maximum(1.0, np.rint(1e6 / (block_ms(work_ms, blocks, sending_ms) * blocks)))


def sum_per_block(start: Integers, end: Integers, values: Floats, num_blocks: int) -> Floats:
    """For each block the sum of the values of the spans that hold it; exactly 0 if none does."""
    return _Flow(start, end, values, num_blocks).throughput


def best_span(
    spans: Spans,
    num_blocks: int,
    length: int,
    network: Network | None = None,
    own_id: str | None = None,
    own_ms: float | None = None,
) -> tuple[int, int]:
    """`choose_span` for peers that are arrays already."""
    flow = _Flow(spans.start, spans.end, spans.rate, num_blocks)
    counted = flow.throughput
    if own_ms is not None:
        share = np.minimum(1.0, own_ms / spans.block_ms) ** SLOWER_POWER
        counted = sum_per_block(spans.start, spans.end, np.rint(spans.rate * share), num_blocks)
    levels = np.rint(np.log(np.maximum(counted, 1.0)) / math.log1p(NEAR_EQUAL))
    levels[flow.throughput == 0] = -1.0
    windows = np.sort(sliding_window_view(levels, length), axis=1)
    weakest = windows[np.lexsort(windows.T[::-1])[0]]
    starts = np.flatnonzero((windows == weakest).all(axis=1))
    start = starts[0] if len(starts) == 1 else _shortest(starts, length, flow, spans, network, own_id)
    return int(start), int(start) + length


def fewest_hops(starts: Integers, length: int, spans: Spans, num_blocks: int) -> int:
    """Of these starts of spans the one with which chains have the fewest hops."""
    return _shortest(starts, length, _Flow(spans.start, spans.end, spans.rate, num_blocks), spans, None, None)


class _Flow:
    """How tokens flow through the spans, if at each block they choose among its peers in proportion to their rates."""

    def __init__(self, start: Integers, end: Integers, rate: Floats, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        width = num_blocks + 1
        table = np.bincount(start * width + end, weights=rate, minlength=width * width)[: width * width]
        table = table.reshape(width, width)  # [start, end]; sums only, as differences would leave noise in holes
        self._by_end = table.cumsum(axis=0)  # [block, end]: of the peers that start at or before a block
        self._by_start = table[:, ::-1].cumsum(axis=1)[:, ::-1]  # [start, block]: that end at or behind it
        blocks = np.arange(num_blocks)
        self.throughput: Floats = self._by_end[:, ::-1].cumsum(axis=1)[:, ::-1][blocks, blocks + 1]

    def hops(self, length: int) -> tuple[Floats, Floats]:
        """Mean hops of chains over the blocks before each boundary, and over those from it on.

        Blocks that nobody serves count as served by peers with `length` blocks each, which are still to come.
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


def _shortest(
    starts: Integers, length: int, flow: _Flow, spans: Spans, network: Network | None, own_id: str | None
) -> int:
    before, after = flow.hops(length)
    cost = before[starts] + after[starts + length]
    if network is not None and own_id is not None:
        order = np.argsort(-spans.rate, kind="stable")
        towards = _nearest(network, own_id, spans, order, starts - 1, inwards=True)
        onwards = _nearest(network, own_id, spans, order, starts + length, inwards=False)
        known = np.concatenate([towards, onwards])
        known = known[np.isfinite(known)]
        typical = float(known.mean()) if len(known) else 1.0
        # Where the chain goes to a client, or to a peer that is still to come, a typical link stands for that one.
        links = np.where(np.isfinite(towards), towards, typical) + np.where(np.isfinite(onwards), onwards, typical)
        cost = cost * typical + links
    return int(starts[np.round(cost, 6).argmin()])


def _nearest(
    network: Network, own_id: str, spans: Spans, order: Integers, blocks: Integers, *, inwards: bool
) -> Floats:
    """The least latency between the own peer and the peers of each of these blocks; infinite if there are none."""
    start, end = spans.start[order], spans.end[order]
    nearest = np.full(len(blocks), np.inf)
    for position, block in enumerate(blocks):
        for peer in order[np.flatnonzero((start <= block) & (block < end))[:NEIGHBOURS]]:
            name = spans.ids[int(peer)]
            link = network.link(name, own_id) if inwards else network.link(own_id, name)
            nearest[position] = min(nearest[position], link.latency_ms)
    return nearest
