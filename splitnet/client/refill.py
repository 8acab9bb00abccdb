"""How hops that lack a session's KV cache are given it: which log is sent to which of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from splitnet.client.requests import ReplayRequest
from splitnet.client.route_hop import RouteHop
from splitnet.net.endpoints import Endpoint
from splitnet.net.messages import Replay, Step
from splitnet.net.sent_log import SentLog


def next_refill(
    hops: Sequence[RouteHop], sent: SentLog, session: bytes, epoch: int, next_number: Callable[[], int]
) -> tuple[list[RouteHop], list[ReplayRequest]]:
    """The first hops in a row that are not filled, and the replays that fill them.

    Args:
        hops: the route.
        sent: what the client itself has sent.
        session, epoch: of the messages.
        next_number: makes numbers for them.

    Returns:
        Both are empty if all hops are filled.
    """
    first = next((index for index, hop in enumerate(hops) if not hop.filled), None)
    if first is None:
        return [], []
    group = list(takewhile(lambda hop: not hop.filled, hops[first:]))
    before = hops[first - 1] if first else None
    if before is not None and not before.relayed:
        # The client cannot relay what a hop replays, as it does not know its parts.
        direct = len(list(takewhile(lambda hop: not hop.relayed, group[:-1])))
        group = group[: direct + 1]
        number, last = next_number(), group[-1]
        message = Replay(session, epoch, number, last.blocks[1])
        return group, [ReplayRequest(message, before.endpoint, last.endpoint)]
    if before is not None and before.relay_log is not None:
        log, to = before.relay_log, group[0].endpoint
    else:
        # The client begins; if its steps pass hops that are filled, those compute them once more.
        log, to = sent, hops[0].endpoint
    return group, _replay(log, to, group[-1], session, epoch, next_number)


def _replay(
    log: SentLog, to: Endpoint, last: RouteHop, session: bytes, epoch: int, next_number: Callable[[], int]
) -> list[ReplayRequest]:
    until = last.blocks[1]
    return [
        ReplayRequest(Step(session, epoch, next_number(), parts, None, until, log.codec, payload), to, last.endpoint)
        for parts, payload in log.replay()
    ]
