"""A client's session: where its hops are, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Final

from scheduler.encoding import Encoding
from scheduler.network import CLIENT, Link
from scheduler.simulation.clients import Client
from scheduler.simulation.geography import Geography
from scheduler.simulation.node import Node
from scheduler.simulation.policies import SeenHop
from scheduler.simulation.world import Request

RUNNING: Final = "running"
FINISHED: Final = "finished"
FAILED: Final = "failed"

TRIAL_STEPS: Final = 8
RELIEF: Final = 0.2
MAX_DOUBT: Final = 20.0
"""As in real clients."""

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
    trial_ms: what the first tokens on this route took; doubt: by what factor routes were slower than foretold.
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
    asked_ms: float = 0.0
    seen: dict[Node, SeenHop] = field(default_factory=dict["Node", SeenHop])
    latencies: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    looked_ms: float = 0.0
    sent_ms: float = 0.0
    trial_ms: list[float] = field(default_factory=list[float])
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
            self._step_took(now_ms - self.sent_ms)
        self.tokens += 1
        self.last_ms = now_ms

    def _step_took(self, ms: float) -> None:
        """Doubts forecasts by what came of them, as real clients do."""
        if self.foretold_ms and len(self.trial_ms) < TRIAL_STEPS:
            self.trial_ms.append(ms)
            if len(self.trial_ms) == TRIAL_STEPS:
                ratio = median(self.trial_ms) / self.foretold_ms
                relieved = self.doubt + RELIEF * (ratio - self.doubt)
                self.doubt = min(max(1.0, ratio, relieved), MAX_DOUBT)

    def met(self, node: Node, block_ms: float, wait_ms: float) -> None:
        """Takes in what a token met at a hop."""
        before = self.seen.get(node)
        if before is not None:
            block_ms = (before.block_ms + block_ms) / 2
            wait_ms = (before.wait_ms + wait_ms) / 2
        self.seen[node] = SeenHop(block_ms, wait_ms)

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
