"""The routes of a session as they are now, to be shown."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from scheduler.network import UNMEASURED
from splitnet.client.cache import ModelSession
from splitnet.client.link_use import LinkUse
from splitnet.client.mixed_session import MixedSession
from splitnet.client.route_hop import RouteHop
from splitnet.client.swarm import Swarm


@dataclass(frozen=True, slots=True)
class HopView:
    """The blocks `[start, end)` that a peer runs for a session; `lost`: until another is found for them."""

    peer: str
    start: int
    end: int
    lost: bool = False


@dataclass(frozen=True, slots=True)
class LinkView:
    """A link of a route, in the direction of the activations."""

    codec: str
    bytes_per_token: int
    """See `splitnet.client.link_use.LinkUse`."""
    delay_ms: float | None
    """One way, as measured, or predicted from where the two ends stand; None: nothing is known of it."""
    via_client: bool
    """Its ends cannot reach each other, so the client is between them."""


@dataclass(frozen=True, slots=True)
class RouteView:
    """Hops in a row, and the links before, between and behind them: one more than hops."""

    hops: tuple[HopView, ...]
    links: tuple[LinkView, ...]


def routes_of(swarm: Swarm, session: ModelSession | None) -> tuple[RouteView, ...]:
    """The open routes of a session, in the order of their blocks; what is not on them runs at the client.

    From any thread; where a route is being repaired meanwhile, it may be left out.
    """
    if session is None:
        return ()
    routes: list[RouteView] = []
    for part in session.sessions if isinstance(session, MixedSession) else [session]:
        hops, uses = list(part.hops), part.links()
        if hops and len(uses) == len(hops) + 1:
            ends = pairwise([None, *hops, None])
            links = [_link(swarm, use, *each) for use, each in zip(uses, ends, strict=True)]
            routes.append(RouteView(tuple(HopView(hop.name, *hop.blocks, hop.lost) for hop in hops), tuple(links)))
    return tuple(routes)


def _link(swarm: Swarm, use: LinkUse, sender: RouteHop | None, receiver: RouteHop | None) -> LinkView:
    via_client = sender is not None and sender.relayed
    return LinkView(use.codec, use.bytes_per_token, _delay_ms(swarm, sender, receiver), via_client)


def _delay_ms(swarm: Swarm, sender: RouteHop | None, receiver: RouteHop | None) -> float | None:
    ends = [hop.planned.record if hop is not None else None for hop in (sender, receiver)]
    via_client = sender is not None and sender.relayed
    links = [swarm.link(ends[0], None), swarm.link(None, ends[1])] if via_client else [swarm.link(*ends)]
    return None if UNMEASURED in links else sum(link.latency_ms for link in links)
