"""A session's hops in one epoch, and the wires between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from scheduler.cost import Encoding, soonest
from scheduler.facts import Link
from simulator.geography import Geography
from simulator.node import Node

if TYPE_CHECKING:
    from simulator.session import Session

Hops = list[tuple[Node, int, int]]
"""Who runs which blocks [start, end)."""


@dataclass(slots=True)
class Wire:
    """What it costs to get a step from one device to the next, directly or by way of the client.

    token_ms: of one position, without the latency. stations: numbers of the devices that a step passes, the last of
    which it ends at; links: between these; encodings: one of each. last_ms: when the last thing that was sent on each
    arrives.
    """

    latency_ms: float
    token_ms: float
    stations: tuple[int, ...]
    links: tuple[Link, ...]
    encodings: tuple[Encoding, ...]
    last_ms: list[float]

    def in_order(self, index: int, arrival_ms: float) -> float:
        """When something arrives over a link: nothing overtakes what was sent before it."""
        self.last_ms[index] = max(self.last_ms[index], arrival_ms)
        return self.last_ms[index]


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """wires: before each hop, and after the last."""

    session: Session
    epoch: int
    hops: Hops
    wires: list[Wire]


def wires_of(
    hops: Hops, client: int, geography: Geography, encodings: Sequence[Encoding], *, through_client: bool
) -> list[Wire]:
    """The wires along some hops.

    through_client: whether the client carries everything between two hops.
    """
    wires: list[Wire] = []
    stations: list[Node | None] = [None, *(node for node, _, _ in hops), None]
    for sender, receiver in pairwise(stations):
        passed = [sender.number if sender else client, receiver.number if receiver else client]
        if through_client and sender and receiver:
            passed.insert(1, client)
        links = tuple(geography.link(here, there) for here, there in pairwise(passed))
        chosen = tuple(soonest(encodings, link.bytes_per_ms) for link in links)
        token_ms = sum(encoding.ms(1, link.bytes_per_ms) for encoding, link in zip(chosen, links, strict=True))
        latency_ms, last_ms = sum(link.latency_ms for link in links), [0.0] * len(links)
        wires.append(Wire(latency_ms, token_ms, tuple(passed), links, chosen, last_ms))
    return wires
