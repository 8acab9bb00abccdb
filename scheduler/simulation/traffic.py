"""Steps on their way: over links, into queues, through passes."""

from __future__ import annotations

import random
from collections.abc import Callable

from scheduler.packing import DECODE_POSITIONS, PASS_POSITIONS
from scheduler.simulation.events import Events
from scheduler.simulation.node import Node, Step
from scheduler.simulation.session import RUNNING, Session
from scheduler.simulation.world import World

Pass = tuple[Node, int, list[tuple[Step, int]]]
"""A pass under way: at which node, in which generation of it, and how many positions of each step."""


class Traffic:
    """Carries steps from hop to hop. Times in ms.

    through_client: whether the client carries everything between two hops.
    arrived: called when the last step of a prompt, a token or a replay came back to its client.
    """

    def __init__(self, world: World, events: Events, through_client: bool, arrived: Callable[[Step], None]) -> None:
        self._geography = world.geography
        self._settings = world.settings
        self._encodings = world.settings.encodings
        self._events = events
        self._through_client = through_client
        self._arrived = arrived
        self._jitter = random.Random(world.settings.seed)

    def connect(self, session: Session) -> None:
        """Draws the wires of a session's present hops."""
        session.connect(self._geography, self._encodings, self._through_client)

    def send_long(self, session: Session, hop: int, last_hop: int, positions: int, *, replay: bool) -> None:
        """Sends so many positions to a hop, in steps that fit a pass."""
        while positions > 0:
            step = Step(session, session.epoch, hop, last_hop, min(positions, PASS_POSITIONS), replay=replay)
            positions -= step.positions
            step.final = positions == 0
            self.send(step)

    def send(self, step: Step) -> None:
        """Sends a step to its hop from whoever comes before it."""
        wire = step.session.wires[step.hop]
        if step.positions == 1:
            arrival = self._events.now + wire.token_ms
        elif step.positions <= DECODE_POSITIONS:
            arrival = self._events.now + wire.ms(step.positions, self._encodings)
        else:
            arrival = self._sent(step, wire.ms(step.positions, self._encodings))
        step.remaining = step.positions
        self._events.at(arrival + self._latency(wire.latency_ms), self._receive, step)

    def _sent(self, step: Step, took_ms: float) -> float:
        """When a long step has been sent: those of one sender go one after the other; tokens slip in between."""
        session = step.session
        wire = session.wires[step.hop]
        sender = session if wire.sender is None or self._through_client else wire.sender
        number = session.client.number if isinstance(sender, Session) else sender.number
        rate = float(self._geography.up[number])
        begin = max(self._events.now, sender.uplink_free_ms)
        sender.uplink_free_ms = begin + min(took_ms, wire.uplink_ms(step.positions, self._encodings, rate))
        return begin + took_ms

    def _latency(self, ms: float) -> float:
        if self._settings.jitter:
            ms *= 1 + self._jitter.expovariate(1 / self._settings.jitter)
        if self._settings.loss and self._jitter.random() < self._settings.loss:
            ms += 2 * ms + 20.0
        return ms

    def _receive(self, step: Step) -> None:
        session = step.session
        if step.epoch != session.epoch or session.state != RUNNING:
            return
        node = session.hops[step.hop][0]
        if node.generation != session.generations[step.hop]:
            return
        step.arrived_ms = self._events.now
        node.ready.append(step)
        if not node.running:
            self._begin_pass(node)

    def _begin_pass(self, node: Node) -> None:
        node.ready = [step for step in node.ready if step.epoch == step.session.epoch]
        if node.ready:
            taken, took_ms = node.next_pass(self._events.now)
            self._events.at(self._events.now + took_ms, self._end_pass, (node, node.generation, taken))

    def _end_pass(self, item: Pass) -> None:
        node, generation, taken = item
        if node.generation != generation:
            return
        node.running = False
        for step, done in taken:
            step.remaining -= done
            if step.remaining:
                node.ready.append(step)
            elif step.epoch == step.session.epoch and step.session.state == RUNNING:
                self._forward(step)
        if node.ready:
            self._begin_pass(node)

    def _forward(self, step: Step) -> None:
        session = step.session
        if step.hop < step.last_hop:
            following = Step(session, step.epoch, step.hop + 1, step.last_hop, step.positions, step.final, step.replay)
            self.send(following)
        elif step.final:
            # Of a prompt only its last position comes back.
            wire = session.wires[-1]
            payload_ms = 0.0 if step.replay else wire.token_ms
            self._events.at(self._events.now + payload_ms + self._latency(wire.latency_ms), self._arrived, step)
