"""The discrete-event simulation: every pass at every peer and every message between them is an event of its own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from itertools import count, groupby, takewhile
from typing import Any, Final

import numpy as np

from scheduler.coordinates import Coordinate
from scheduler.cost import occupied_ms
from scheduler.network import CLIENT
from scheduler.replan import move_pays
from scheduler.route import NoRoute
from scheduler.simulation.clients import new_client
from scheduler.simulation.directory import Directory, View
from scheduler.simulation.node import DECODE_POSITIONS, PASS_POSITIONS, Node, Step
from scheduler.simulation.placing import Placing
from scheduler.simulation.policies import Plan, Routing
from scheduler.simulation.session import FAILED, FINISHED, RUNNING, Session
from scheduler.simulation.world import Device, Request, World, measured_to
from scheduler.swarm import Hop, Peer

MEASURED_LINKS: Final = 16
"""Links that a record holds at most."""

PROBES: Final = 4
"""Peers to which a peer measures the round trip each time before it publishes."""

ATTEMPTS: Final = 8
RETRY_MS: Final = 2000.0
DEAD_MS: Final = 1000.0
"""Without an answer for so long when a route is opened, a peer counts as dead."""

DRAIN_S: Final = 600.0
"""How long sessions may still run when no more clients come."""


class Simulation:
    """A world in which clients route by one policy. Times in ms.

    Attributes:
        sessions: of all clients that have come so far.
        moves: how often peers changed their blocks.
        nodes: of all devices that have joined so far.
    """

    def __init__(self, world: World, routing: Routing, placing: Placing) -> None:
        settings = world.settings
        self.world = world
        self.settings = settings
        self.routing = routing
        self.placing = placing
        self.now = 0.0
        self.sessions: list[Session] = []
        self.nodes: dict[str, Node] = {}
        self.moves = 0
        self.record_bytes = 0
        self.events = 0
        self._directory = Directory(settings.record_ttl_s, settings.num_blocks)
        self._order = count()
        self._queue: list[tuple[float, int, Callable[[Any], None], Any]] = []
        # Streams of their own, so that a policy's choices do not change what the network does to its peers.
        self._rng = np.random.default_rng([settings.seed, 1])
        self._jitter = random.Random(settings.seed)
        self._choices = random.Random(settings.seed + 1)
        self._encodings = settings.encodings
        self._start()
        self.view: View = self._directory.view(0.0)

    def run(self) -> Iterator[float]:
        """Runs to the end; says from time to time which share of the clients' arrivals has passed, at most 1."""
        arrivals_end = self.settings.duration_s * 1000
        end = arrivals_end + DRAIN_S * 1000
        queue, pop = self._queue, heapq.heappop
        while queue and queue[0][0] <= end:
            self.now, _, act, subject = pop(queue)
            act(subject)
            self.events += 1
            if self.events % 20_000 == 0:
                yield min(1.0, self.now / arrivals_end)
            if self.now > arrivals_end and all(session.state != RUNNING for session in self.sessions):
                break
        for node in self.nodes.values():
            if node.serves:
                node.served_ms += self.now - node.served_since_ms
                node.served_since_ms = self.now

    def _at(self, ms: float, act: Callable[[Any], None], subject: Any) -> None:
        heapq.heappush(self._queue, (ms, next(self._order), act, subject))

    # The swarm: joining, publishing, moving, leaving.

    def _start(self) -> None:
        present = [device for device in self.world.devices if device.joins_s == 0]
        for device, span in zip(present, self.placing.founders(present), strict=True):
            node = self._new_node(device, span, self.world.coordinates[device.number])
            node.begin(0.0)
        nodes = list(self.nodes.values())
        by_block = [[node for node in nodes if node.start <= block < node.end] for block in range(self._num_blocks)]
        for node in nodes:
            onward = by_block[node.end % self._num_blocks]
            if onward:
                for index in self._rng.integers(0, len(onward), 2 * MEASURED_LINKS).tolist():
                    self._measure(node, onward[index])
            self._directory.publish(node.record(0.0, node.up_bytes_per_ms))
            self._at(self._rng.random() * self.settings.refresh_s * 1000, self._publish, node)
        for device in self.world.devices:
            if device.joins_s > 0:
                self._at(device.joins_s * 1000, self._join, device)
        for request in self.world.requests:
            self._at(request.at_s * 1000, self._arrive, request)
        self._at(self.settings.view_s * 1000, self._read_directory, None)

    @property
    def _num_blocks(self) -> int:
        return self.settings.num_blocks

    def _new_node(self, device: Device, span: tuple[int, int], coordinate: Coordinate) -> Node:
        node = Node(device, span, coordinate, float(self.world.geography.up[device.number]))
        self.nodes[device.id] = node
        self._at(device.leaves_s * 1000, self._leave, node)
        if self.settings.moves:
            self._at(self.now + 2000 * self.placing.check_s * self._rng.random(), self._consider_move, node)
        return node

    def _read_directory(self, _: None) -> None:
        self.view = self._directory.view(self.now / 1000)
        self._at(self.now + self.settings.view_s * 1000, self._read_directory, None)

    def _join(self, device: Device) -> None:
        coordinate = Coordinate()
        numbers = self.view.numbers
        for index in self._rng.integers(0, len(numbers), min(32, 4 * len(numbers))).tolist():
            theirs = self.view.records[self.view.peers[index].id].place.coordinate
            other = int(numbers[index])
            coordinate = measured_to(self._rng, self.world.geography, device.number, coordinate, other, theirs)
        span = self.placing.join(device, coordinate, self.view)
        node = self._new_node(device, span, coordinate)
        self._at(self.now + self._load_ms(node), self._begin, node)

    def _load_ms(self, node: Node) -> float:
        return self.settings.load_s * 1000 * (node.end - node.start)

    def _begin(self, node: Node) -> None:
        if not node.gone:
            node.begin(self.now)
            self._publish(node)

    def _publish(self, node: Node) -> None:
        if node.gone or not node.serves:
            return
        serving = self.view.serving[node.end % self._num_blocks]
        for _ in range(PROBES // 2):
            self._probe(node, int(self._rng.integers(len(self.view.peers))))
            if len(serving):
                self._probe(node, int(serving[int(self._rng.random() * len(serving))]))
        record = node.record(self.now, node.up_bytes_per_ms)
        self.record_bytes = max(self.record_bytes, record.size_bytes)
        self._directory.publish(record)
        self._at(self.now + self.settings.refresh_s * 1000, self._publish, node)

    def _probe(self, node: Node, index: int) -> None:
        other = self.nodes[self.view.peers[index].id]
        if not other.serves:
            node.measured.pop(other.number, None)
        elif other is not node:
            self._measure(node, other)
            node.coordinate = measured_to(
                self._rng, self.world.geography, node.number, node.coordinate, other.number, other.coordinate
            )

    def _measure(self, node: Node, other: Node) -> None:
        """Keeps the nearest of the peers to which a token goes from this one, and what is left of the others."""
        node.measured[other.number] = self.world.geography.link(node.number, other.number)
        if len(node.measured) > MEASURED_LINKS:
            del node.measured[max(node.measured, key=lambda number: node.measured[number].latency_ms)]

    def _consider_move(self, node: Node) -> None:
        if node.gone:
            return
        self._at(self.now + 2000 * self.placing.check_s * self._rng.random(), self._consider_move, node)
        span = self.placing.move(node, self.view) if node.serves else None
        if span is not None and span != (node.start, node.end):
            self.moves += 1
            for session in node.stop(self.now):
                self._at(self.now + 100.0, self._repair, session)
            node.start, node.end = span
            node.measured.clear()
            ready = self.now + self._load_ms(node)
            peer = Peer(node.id, *span, node.device.speed)
            self._directory.announce(peer, ready / 1000 + self.settings.refresh_s)
            self._at(ready, self._begin, node)

    def _leave(self, node: Node) -> None:
        node.gone = True
        silence = self.settings.silence_s * 1000 if node.device.crashes else 100.0
        if not node.device.crashes or not node.serves:
            self._directory.withdraw(node.id)
        for session in node.stop(self.now):
            self._at(self.now + silence, self._repair, session)

    # Clients: opening a route, prefill, tokens, repairs.

    def _arrive(self, request: Request) -> None:
        client = new_client(self.world, request.number, self.view, self._rng)
        session = Session(request, client, self.now)
        self.sessions.append(session)
        self._repair(session)

    def _repair(self, session: Session) -> None:
        """Plans and opens what the session lacks: all of its route at first, later the hops that were lost."""
        if session.state != RUNNING:
            return
        lost = session.lost_hops()
        if session.hops and not lost:
            return
        if session.trouble_since_ms < 0:
            session.trouble_since_ms = self.now
        session.epoch += 1
        for index in lost:
            session.banned.add(session.hops[index][0].id)
        try:
            replaced = self._plan(session, lost)
        except NoRoute:
            self._try_later(session, RETRY_MS)
            return
        delay = self._open(session, replaced)
        if delay is not None:
            self._try_later(session, delay)

    def _try_later(self, session: Session, delay: float) -> None:
        if self.now + delay - session.trouble_since_ms > self.settings.patience_s * 1000 or session.refusals > ATTEMPTS:
            self._end(session, FAILED)
        else:
            self._at(self.now + delay, self._repair, session)

    def _plan(self, session: Session, lost: list[int]) -> list[tuple[int, int, list[Hop]]]:
        """The hops in place of those of the index range [from, to), for each such range, the last first."""
        if not session.hops:
            return [(0, 0, self._hops(session, (0, self._num_blocks), CLIENT, CLIENT))]
        replaced: list[tuple[int, int, list[Hop]]] = []
        for _, group in groupby(enumerate(lost), lambda item: item[1] - item[0]):
            run = [index for _, index in group]
            first, last = run[0], run[-1]
            source = session.hops[first - 1][0].id if first else CLIENT
            target = session.hops[last + 1][0].id if last + 1 < len(session.hops) else CLIENT
            blocks = session.hops[first][1], session.hops[last][2]
            used = {hop.peer for _, _, hops in replaced for hop in hops}
            replaced.append((first, last + 1, self._hops(session, blocks, source, target, used)))
        return replaced[::-1]

    def _hops(
        self, session: Session, blocks: tuple[int, int], source: str, target: str, used: set[str] | None = None
    ) -> list[Hop]:
        exclude = session.banned | (used or set()) | {node.id for node, _, _ in session.hops}
        request = session.request
        plan = Plan(session.client, request, blocks, source, target, exclude, request.positions)
        planned = self.routing.route(plan, self.view, self._choices)
        if source == target == CLIENT:
            session.foretold_ms = planned.token_ms
        session.asked_ms = planned.asked_ms
        return planned.hops

    def _open(self, session: Session, replaced: list[tuple[int, int, list[Hop]]]) -> float | None:
        """Opens new hops and goes on; or says after how many ms the client knows that it must plan anew."""
        nodes = [self.nodes[hop.peer] for _, _, hops in replaced for hop in hops]
        geography, client = self.world.geography, session.client.number
        rtt = max(2 * geography.one_way_ms(client, node.number) for node in nodes)
        refused: float | None = None
        reserved: list[Node] = []
        for _, _, hops in replaced:
            for hop in hops:
                node = self.nodes[hop.peer]
                fits = node.start <= hop.start and hop.end <= node.end
                if not node.serves:
                    refused = max(refused or 0.0, DEAD_MS)
                elif not fits or not node.reserve(session, session.request.positions):
                    refused = max(refused or 0.0, rtt)
                else:
                    reserved.append(node)
                    continue
                session.banned.add(hop.peer)
        if refused is not None:
            session.refusals += 1
            for node in reserved:
                node.release(session, session.request.positions)
            return refused
        first_time = not session.hops
        sections: list[tuple[int, int]] = []
        for first, end, hops in replaced:
            session.hops[first:end] = [(self.nodes[hop.peer], hop.start, hop.end) for hop in hops]
            grown = len(hops) - (end - first)
            sections = [(begin + grown, stop + grown) for begin, stop in sections] + [(first, first + len(hops))]
        session.generations = [node.generation for node, _, _ in session.hops]
        session.connect(geography, self._encodings, self.routing.through_client)
        session.trouble_since_ms = -1.0
        session.refusals = 0
        session.repairs += not first_time
        # Connecting takes a round trip, and so does opening.
        ready = self.now + session.asked_ms + 2 * rtt
        if session.tokens == 0:
            self._at(ready, self._prefill, (session, session.epoch))
        else:
            session.replays = len(sections)
            self._at(ready, self._replay, (session, session.epoch, sections))
        return None

    def _prefill(self, item: tuple[Session, int]) -> None:
        session, epoch = item
        if session.state == RUNNING and session.epoch == epoch:
            self._send_long(session, 0, len(session.hops) - 1, session.request.prompt, replay=False)

    def _replay(self, item: tuple[Session, int, list[tuple[int, int]]]) -> None:
        session, epoch, sections = item
        if session.state == RUNNING and session.epoch == epoch:
            for first, end in sections:
                context = session.request.prompt + session.tokens - 1
                self._send_long(session, first, end - 1, context, replay=True)

    def _send_long(self, session: Session, hop: int, last_hop: int, positions: int, *, replay: bool) -> None:
        while positions > 0:
            step = Step(session, session.epoch, hop, last_hop, min(positions, PASS_POSITIONS), replay=replay)
            positions -= step.positions
            step.final = positions == 0
            self._send(step)

    def _send(self, step: Step) -> None:
        """Sends a step to its hop from whoever comes before it."""
        session = step.session
        wire = session.wires[step.hop]
        if step.positions == 1:
            arrival = self.now + wire.token_ms
        elif step.positions <= DECODE_POSITIONS:
            arrival = self.now + wire.ms(step.positions, self._encodings)
        else:
            arrival = self._sent(session, step, wire.ms(step.positions, self._encodings))
        step.remaining = step.positions
        self._at(arrival + self._latency(wire.latency_ms), self._receive, step)

    def _sent(self, session: Session, step: Step, took_ms: float) -> float:
        """When a long step has been sent: those of one sender go one after the other; tokens slip in between."""
        wire = session.wires[step.hop]
        sender = wire.sender if wire.sender and not self.routing.through_client else None
        geography = self.world.geography
        rate = sender.up_bytes_per_ms if sender else float(geography.up[session.client.number])
        occupied = min(took_ms, wire.uplink_ms(step.positions, self._encodings, rate))
        free = sender.uplink_free_ms if sender else session.uplink_free_ms
        begin = max(self.now, free)
        if sender:
            sender.uplink_free_ms = begin + occupied
        else:
            session.uplink_free_ms = begin + occupied
        return begin + took_ms

    def _latency(self, ms: float) -> float:
        if self.settings.jitter:
            ms *= 1 + self._jitter.expovariate(1 / self.settings.jitter)
        if self.settings.loss and self._jitter.random() < self.settings.loss:
            ms += 2 * ms + 20.0
        return ms

    def _receive(self, step: Step) -> None:
        session = step.session
        if step.epoch != session.epoch or session.state != RUNNING:
            return
        node = session.hops[step.hop][0]
        if node.generation != session.generations[step.hop]:
            return
        step.arrived_ms = self.now
        node.ready.append(step)
        if not node.running:
            self._begin_pass(node)

    def _begin_pass(self, node: Node) -> None:
        node.ready = [step for step in node.ready if step.epoch == step.session.epoch]
        if node.ready:
            taken, took_ms = node.next_pass(self.now)
            self._at(self.now + took_ms, self._end_pass, (node, node.generation, taken))

    def _end_pass(self, item: tuple[Node, int, list[tuple[Step, int]]]) -> None:
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
            self._send(following)
        elif step.final:
            # Of a prompt only its last position comes back.
            wire = session.wires[-1]
            payload_ms = 0.0 if step.replay else wire.token_ms
            self._at(self.now + payload_ms + self._latency(wire.latency_ms), self._result, step)

    def _result(self, step: Step) -> None:
        session = step.session
        if step.epoch != session.epoch or session.state != RUNNING:
            return
        if step.replay:
            session.replays -= 1
            if session.replays:
                return
        else:
            session.tokens += 1
            session.token_times_ms.append(self.now)
            if session.tokens == 1:
                session.first_ms = self.now
            if session.tokens >= session.request.output:
                self._end(session, FINISHED)
                return
        if self.routing.replans and self.now - session.looked_ms >= self.settings.replan_s * 1000:
            session.looked_ms = self.now
            if session.tokens > 1 and self._moved(session):
                return
        self._send(Step(session, session.epoch, 0, len(session.hops) - 1, 1))

    def _moved(self, session: Session) -> bool:
        """Looks for a better route between two tokens, and goes over to it if that pays."""
        request = session.request
        present = [Hop(node.id, start, end) for node, start, end in session.hops]
        if session.lost_hops():
            return False
        blocks = (0, self._num_blocks)
        seen = {node.id: seen for node, seen in session.seen.items()}
        plan = Plan(
            session.client, request, blocks, CLIENT, CLIENT, session.banned, request.positions, present, seen,
            session.latencies,
        )  # fmt: skip
        try:
            planned = self.routing.route(plan, self.view, self._choices)
        except NoRoute:
            return False
        hops = planned.hops
        stay = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(hops, present, strict=False))))
        behind = takewhile(lambda pair: pair[0] == pair[1], zip(hops[stay:][::-1], present[stay:][::-1], strict=False))
        stay_behind = len(list(behind))
        changed = hops[stay : len(hops) - stay_behind]
        if not changed or not planned.present_ms:
            return False
        context = request.prompt + session.tokens - 1
        move_ms = self._move_ms(session, changed, present[stay - 1].peer if stay else CLIENT, context)
        if not move_pays(planned.present_ms, planned.token_ms, move_ms, request.output - session.tokens):
            return False
        session.epoch += 1
        old = session.hops[stay : len(session.hops) - stay_behind]
        for node, _, _ in old:
            node.release(session, request.positions)
        session.asked_ms = planned.asked_ms
        if self._open(session, [(stay, stay + len(old), changed)]) is None:
            session.repairs -= 1
            session.moves += 1
            session.foretold_ms = planned.token_ms
            return True
        # A peer refused, as its facts were old. What was released a moment ago is still free.
        for node, _, _ in old:
            node.reserve(session, request.positions)
        return False

    def _move_ms(self, session: Session, hops: list[Hop], sender: str, context: int) -> float:
        """About what it takes to give the context to new hops, foretold from what the records say."""
        network = self.view.places
        total, slowest = 0.0, 0.0
        for hop in hops:
            peer = self.view.records[hop.peer].peer
            compute = (hop.end - hop.start) * peer.speed.at(min(context, PASS_POSITIONS)) * context
            compute /= min(context, PASS_POSITIONS)
            link = network.link(sender, hop.peer)
            total += link.latency_ms + peer.queue_ms
            slowest = max(slowest, occupied_ms(link, context, self._encodings), compute)
            total += (compute + occupied_ms(link, context, self._encodings)) / max(1.0, context / PASS_POSITIONS)
            sender = hop.peer
        return total + slowest

    def _end(self, session: Session, state: str) -> None:
        session.state = state
        session.ended_ms = self.now
        for node, _, _ in session.hops:
            node.release(session, session.request.positions)
