"""A client's session: where its hops are, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from scheduler.encoding import Encoding
from scheduler.network import CLIENT, Link
from scheduler.replan import RouteWatch, prediction_error
from scheduler.simulation.clients import Client
from scheduler.simulation.geography import Geography
from scheduler.simulation.node import Node
from scheduler.simulation.policies import SeenHop
from scheduler.simulation.world import Request

RUNNING: Final = "running"
FINISHED: Final = "finished"
FAILED: Final = "failed"

Hops = list[tuple[Node, int, int]]
"""Who runs which blocks [start, end)."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What it costs to get a step from one device to the next, directly or by way of the client.

    token_ms: of one position, without the latency. sender: whose way up a long step occupies; None: the client's.
    """

    latency_ms: float
    token_ms: float
    links: tuple[Link, ...]
    sender: Node | None

    def ms(self, positions: int, encodings: tuple[Encoding, ...]) -> float:
        """Of a step, without the latency."""
        return sum(min(encoding.ms(positions, link.bytes_per_ms) for encoding in encodings) for link in self.links)

    def uplink_ms(self, positions: int, encodings: tuple[Encoding, ...], up_bytes_per_ms: float) -> float:
        """For how long the sender's way up is occupied."""
        return positions * min(encoding.bytes_per_position for encoding in encodings) / up_bytes_per_ms


@dataclass(slots=True, eq=False)
class Session:
    """One request and its way through the swarm. All times in ms.

    epoch: grows with each repair; what was sent before is void. generations: of the nodes, when they were opened.
    wires: before each hop, and after the last. replays: that are awaited. trouble_since_ms: when it lost a hop or was
    refused; -1: it has a route. first_ms, last_ms: when the client had its first and its latest token. foretold_ms: of
    a token, by the plan. asked_ms: what planning took. seen, latencies: what it met at its hops, and between them.
    looked_ms: when it last looked for a better route; moves: how often it took one. sent_ms: when the latest step went.
    watch: what tokens took on this route; doubt: by what factor routes were slower than foretold.
    """

    request: Request
    client: Client
    arrived_ms: float
    hops: Hops = field(default_factory=list[tuple[Node, int, int]])
    generations: list[int] = field(default_factory=list[int])
    wires: list[Wire] = field(default_factory=list[Wire])
    epoch: int = 0
    state: str = RUNNING
    tokens: int = 0
    first_ms: float = 0.0
    last_ms: float = 0.0
    ended_ms: float = 0.0
    replays: int = 0
    repairs: int = 0
    refusals: int = 0
    trouble_since_ms: float = -1.0
    uplink_free_ms: float = 0.0
    banned: set[str] = field(default_factory=set[str])
    foretold_ms: float = 0.0
    watch: RouteWatch = field(default_factory=RouteWatch)
    asked_ms: float = 0.0
    seen: dict[Node, SeenHop] = field(default_factory=dict["Node", SeenHop])
    latencies: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    looked_ms: float = 0.0
    sent_ms: float = 0.0
    doubt: float = 1.0
    moves: int = 0

    @property
    def context(self) -> int:
        """Positions that its hops have to hold when the next token comes."""
        return self.request.prompt + self.tokens - 1

    def got_token(self, now_ms: float) -> None:
        """Counts a token that the client has."""
        if self.tokens == 0:
            self.first_ms = now_ms
        else:
            ratio = self.watch.step_took(now_ms - self.sent_ms)
            if ratio is not None:
                self.doubt = prediction_error(self.doubt, ratio)
        self.tokens += 1
        self.last_ms = now_ms

    def met(self, node: Node, block_ms: float, wait_ms: float) -> None:
        """Takes in what a token met at a hop."""
        seen = self.seen.get(node)
        if seen is None:
            seen = self.seen[node] = SeenHop()
        seen.block_ms.add(block_ms)
        seen.wait_ms.add(wait_ms)

    def lost_hops(self) -> list[int]:
        """Hops whose node no longer holds the session."""
        return [
            index
            for index, (node, _, _) in enumerate(self.hops)
            if not node.serves or node.generation != self.generations[index]
        ]

    def connect(self, geography: Geography, encodings: tuple[Encoding, ...], through_client: bool) -> None:
        """Draws the wires of the present hops."""
        client = self.client.number
        stations: list[Node | None] = [None, *(node for node, _, _ in self.hops), None]
        self.wires = []
        for sender, receiver in pairwise(stations):
            here = sender.number if sender else client
            there = receiver.number if receiver else client
            if through_client and sender and receiver:
                links = (geography.link(here, client), geography.link(client, there))
            else:
                links = (geography.link(here, there),)
            token_ms = sum(min(encoding.ms(1, link.bytes_per_ms) for encoding in encodings) for link in links)
            names = sender.id if sender else CLIENT, receiver.id if receiver else CLIENT
            self.latencies[names] = geography.one_way_ms(here, there)
            self.wires.append(Wire(sum(link.latency_ms for link in links), token_ms, links, sender))
