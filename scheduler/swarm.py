"""Facts about a swarm: who serves which blocks at what speed, and the links between them. All frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

CLIENT: Final = ""
"""Stands for the client where a peer's id is expected."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that serves the blocks [start, end).

    decode_ms: ms per block for one token. prefill_ms: ms per block and token of a long step.
    queue_ms: wait before a step starts. kv_free: positions that new sessions may still take.
    """

    id: str
    start: int
    end: int
    decode_ms: float
    prefill_ms: float
    queue_ms: float
    kv_free: int


@dataclass(frozen=True, slots=True)
class Link:
    """A directed connection. latency_ms: one way. bytes_per_ms: bandwidth."""

    latency_ms: float
    bytes_per_ms: float


UNMEASURED: Final = Link(latency_ms=100.0, bytes_per_ms=1250.0)
"""Between two peers of whom nothing is known: across the world, 10 Mbit/s. Pessimistic, so that measured links win."""


class Network:
    """The links that were measured, by (sender, receiver); any other link counts as `unmeasured`. Immutable."""

    def __init__(self, links: Mapping[tuple[str, str], Link] | None = None, unmeasured: Link = UNMEASURED) -> None:
        self.measured: Mapping[tuple[str, str], Link] = MappingProxyType(dict(links or {}))
        self.unmeasured = unmeasured

    def link(self, sender: str, receiver: str) -> Link:
        """The link from `sender` to `receiver`; either may be `CLIENT`."""
        return self.measured.get((sender, receiver), self.unmeasured)

    def with_link(self, sender: str, receiver: str, link: Link) -> Network:
        """The same network with one link measured anew."""
        return Network({**self.measured, (sender, receiver): link}, self.unmeasured)


@dataclass(frozen=True, slots=True)
class Hop:
    """The blocks [start, end) that a peer runs on a route."""

    peer: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that cover all blocks in order, no peer twice. cost_ms: what the planned step takes by the cost model."""

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


def missing_blocks(peers: Iterable[Peer], num_blocks: int) -> list[tuple[int, int]]:
    """The ranges [start, end) of blocks that no peer serves, in order."""
    ranges: list[tuple[int, int]] = []
    for block, replicas in enumerate(coverage(peers, num_blocks)):
        if replicas:
            continue
        if ranges and ranges[-1][1] == block:
            ranges[-1] = (ranges[-1][0], block + 1)
        else:
            ranges.append((block, block + 1))
    return ranges
