"""Whether a session should leave hops for others while it runs."""

from __future__ import annotations

import random
from dataclasses import dataclass

from scheduler.network import CLIENT
from scheduler.replan import changed_hops, move_pays
from scheduler.route import NoRoute
from scheduler.simulation.directory import View
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
    plan = Plan(
        session.client,
        request,
        (0, settings.num_blocks),
        CLIENT,
        CLIENT,
        session.banned,
        request.positions,
        present=present,
        cached=session.context,
        seen={node.id: seen for node, seen in session.seen.items()},
        latencies=session.latencies,
    )
    try:
        planned = routing.route(plan, view, rng)
    except NoRoute:
        return None
    before, hops = changed_hops(present, planned.hops)
    if not hops or not planned.present_ms:
        return None
    # What is known of the present route was seen; what is known of the other was told, and is doubted.
    new_ms = planned.token_ms * (session.doubt if settings.doubts else 1.0)
    if not move_pays(planned.present_ms, new_ms, planned.move_ms, request.output - session.tokens):
        return None
    first = planned.hops.index(before) + 1 if before else 0
    behind = len(planned.hops) - first - len(hops)
    return Change(first, len(present) - behind, hops, planned)
