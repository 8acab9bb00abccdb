"""Whether a session should leave hops for others while it runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from scheduler.cost import occupied_ms
from scheduler.network import CLIENT
from scheduler.replan import move_pays
from scheduler.route import NoRoute
from scheduler.simulation.directory import View
from scheduler.simulation.node import PASS_POSITIONS
from scheduler.simulation.policies import Plan, Planned, Routing
from scheduler.simulation.session import Session
from scheduler.simulation.world import Settings
from scheduler.swarm import Hop


@dataclass(frozen=True, slots=True)
class Change:
    """New hops in the place of the hops [first, end) of a session. planned: the whole new route."""

    first: int
    end: int
    hops: list[Hop]
    planned: Planned


def better_route(
    session: Session, routing: Routing, view: View, settings: Settings, rng: random.Random
) -> Change | None:
    """The change that pays for the tokens that are left, or None."""
    request = session.request
    present = [Hop(node.id, start, end) for node, start, end in session.hops]
    blocks = (0, settings.num_blocks)
    seen = {node.id: seen for node, seen in session.seen.items()}
    plan = Plan(
        session.client,
        request,
        blocks,
        CLIENT,
        CLIENT,
        session.banned,
        request.positions,
        present=present,
        seen=seen,
        latencies=session.latencies,
    )
    try:
        planned = routing.route(plan, view, rng)
    except NoRoute:
        return None
    first = _equal_at_start(planned.hops, present)
    behind = _equal_at_start(planned.hops[first:][::-1], present[first:][::-1])
    hops = planned.hops[first : len(planned.hops) - behind]
    if not hops or not planned.present_ms:
        return None
    sender = present[first - 1].peer if first else CLIENT
    move_ms = _move_ms(hops, sender, session.context, view, settings)
    # What is known of the present route was seen; what is known of the other was told, and is doubted.
    new_ms = planned.token_ms * (session.doubt if settings.doubts else 1.0)
    if not move_pays(planned.present_ms, new_ms, move_ms, request.output - session.tokens):
        return None
    return Change(first, len(present) - behind, hops, planned)


def _equal_at_start(hops: Sequence[Hop], others: Sequence[Hop]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(hops, others, strict=False)))


def _move_ms(hops: Sequence[Hop], sender: str, context: int, view: View, settings: Settings) -> float:
    """About what it takes to give the context to new hops, foretold from what the records say.

    The first pass goes through all hops one after the other; behind it the slowest stage counts.
    """
    passes = max(1.0, context / PASS_POSITIONS)
    total, slowest = 0.0, 0.0
    for hop in hops:
        peer = view.records[hop.peer].peer
        link = view.places.link(sender, hop.peer)
        compute = (hop.end - hop.start) * peer.speed.at(context / passes) * passes
        sending = occupied_ms(link, context, settings.encodings)
        total += link.latency_ms + peer.queue_ms + (compute + sending) / passes
        slowest = max(slowest, sending, compute)
        sender = hop.peer
    return total + slowest
