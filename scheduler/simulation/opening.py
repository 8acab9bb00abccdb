"""How a session gets its hops, and others in place of those that it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Final

from scheduler.network import CLIENT
from scheduler.simulation.geography import Geography
from scheduler.simulation.node import Node
from scheduler.simulation.session import Session
from scheduler.swarm import Hop

DEAD_MS: Final = 1000.0
"""Without an answer for so long when a route is opened, a peer counts as dead."""

Replacement = tuple[int, int, list[Hop]]
"""The hops in place of those of the index range [from, to) of a session."""

Section = tuple[int, int]
"""Hops [from, to) that are new."""


def lost_parts(
    session: Session, lost: Sequence[int], num_blocks: int
) -> list[tuple[int, int, tuple[int, int], str, str]]:
    """What has to be planned: hops [from, to), their blocks, and who comes before and after them."""
    if not session.hops:
        return [(0, 0, (0, num_blocks), CLIENT, CLIENT)]
    parts: list[tuple[int, int, tuple[int, int], str, str]] = []
    for _, group in groupby(enumerate(lost), lambda item: item[1] - item[0]):
        run = [index for _, index in group]
        first, last = run[0], run[-1]
        source = session.hops[first - 1][0].id if first else CLIENT
        target = session.hops[last + 1][0].id if last + 1 < len(session.hops) else CLIENT
        parts.append((first, last + 1, (session.hops[first][1], session.hops[last][2]), source, target))
    return parts


def reserve(
    session: Session, replaced: Sequence[Replacement], nodes: Mapping[str, Node], rtt_ms: float
) -> float | None:
    """Reserves memory at all new hops, or at none: then says after how many ms the client knows of the refusal.

    Peers that refuse are not asked again by this session.
    """
    refused: float | None = None
    reserved: list[Node] = []
    for _, _, hops in replaced:
        for hop in hops:
            node = nodes[hop.peer]
            fits = node.start <= hop.start and hop.end <= node.end
            if not node.serves:
                refused = max(refused or 0.0, DEAD_MS)
            elif not fits or not node.reserve(session, session.request.positions):
                refused = max(refused or 0.0, rtt_ms)
            else:
                reserved.append(node)
                continue
            session.banned.add(hop.peer)
    if refused is not None:
        session.refusals += 1
        for node in reserved:
            node.release(session, session.request.positions)
    return refused


def exchange(session: Session, replaced: Sequence[Replacement], nodes: Mapping[str, Node]) -> list[Section]:
    """Puts new hops, the last ones first, in the place of old ones; returns where they are now."""
    sections: list[Section] = []
    for first, end, hops in replaced:
        session.hops[first:end] = [(nodes[hop.peer], hop.start, hop.end) for hop in hops]
        grown = len(hops) - (end - first)
        sections = [(begin + grown, stop + grown) for begin, stop in sections] + [(first, first + len(hops))]
    session.generations = [node.generation for node, _, _ in session.hops]
    return sections


def round_trip_ms(
    session: Session, replaced: Sequence[Replacement], nodes: Mapping[str, Node], where: Geography
) -> float:
    """To the farthest of the new hops; all are asked at the same time."""
    numbers = [nodes[hop.peer].number for _, _, hops in replaced for hop in hops]
    return max(2 * where.one_way_ms(session.client.number, number) for number in numbers)
