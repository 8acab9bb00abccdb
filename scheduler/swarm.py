"""Facts about a swarm: who serves which blocks, at what speed and under what load. All frozen."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

PASS_SIZES: Final = (1, 4, 16, 64, 256)
"""Positions in a pass through the blocks at which a peer's speed is stated."""


MAX_WATTS: Final = 1e5
"""That a peer may say it draws."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Ms per block of one pass, by the positions in it: the decode tokens of a batch, or a chunk of a prefill.

    block_ms: one value for each of `PASS_SIZES`. Between two sizes it runs straight, beyond the last in proportion.
    Raises ValueError for another number of values.
    """

    block_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.block_ms) != len(PASS_SIZES):
            raise ValueError(f"a speed has {len(PASS_SIZES)} values, one for each of {PASS_SIZES}")

    @classmethod
    def of(cls, decode_ms: float, prefill_ms: float) -> Speed:
        """Of a device that takes `decode_ms` to read a block's weights, and `prefill_ms` of arithmetic per position."""
        return cls(tuple(max(decode_ms, size * prefill_ms) for size in PASS_SIZES))

    def at(self, positions: float) -> float:
        """Ms per block of a pass of so many positions."""
        if positions <= PASS_SIZES[0]:
            return self.block_ms[0]
        if positions >= PASS_SIZES[-1]:
            return self.block_ms[-1] * positions / PASS_SIZES[-1]
        above = bisect_left(PASS_SIZES, positions)
        low, high = PASS_SIZES[above - 1], PASS_SIZES[above]
        share = (positions - low) / (high - low)
        return self.block_ms[above - 1] * (1 - share) + self.block_ms[above] * share


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that serves the blocks [start, end).

    speed: observed. queue_ms: wait of a step until its pass starts. batch: positions of other sessions that share the
    pass of a decode step. kv_free: positions that new sessions may still take. watts: drawn while it computes; 0: not
    known. sending_ms: for which what a position gives to the next hop occupies its way up; 0: not known.
    """

    id: str
    start: int
    end: int
    speed: Speed
    queue_ms: float = 0.0
    batch: float = 0.0
    kv_free: int = 0
    watts: float = 0.0
    sending_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Hop:
    """The blocks [start, end) that a peer runs on a route."""

    peer: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that cover all blocks in order, no peer twice. cost_ms: by the objective that it was planned for."""

    hops: tuple[Hop, ...]
    cost_ms: float


def coverage(peers: Iterable[Peer], num_blocks: int) -> list[int]:
    """How many peers serve each of the blocks 0 .. num_blocks - 1."""
    change = [0] * (num_blocks + 1)
    for peer in peers:
        start, end = max(peer.start, 0), min(peer.end, num_blocks)
        if start < end:
            change[start] += 1
            change[end] -= 1
    replicas = 0
    return [replicas := replicas + step for step in change[:num_blocks]]


def missing_blocks(peers: Iterable[Peer], num_blocks: int, first: int = 0) -> list[tuple[int, int]]:
    """The ranges [start, end) of blocks that no peer serves, in order; of the blocks from `first` on."""
    ranges: list[tuple[int, int]] = []
    for block, replicas in enumerate(coverage(peers, num_blocks)):
        if replicas or block < first:
            continue
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges
