"""A client's own knowledge of the network: where it stands, and the links that it has measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scheduler.candidates import measured_first
from scheduler.coordinates import Coordinate
from scheduler.network import CLIENT, Link, Place
from splitnet.simulation.directory import View
from splitnet.simulation.world import World, measured_to

RANDOM_PROBES = 16


@dataclass(frozen=True, slots=True)
class Client:
    """number: in the geography. links: both ways between the client and the peers that it has measured.

    silent: those that did not answer when it measured them.
    """

    number: int
    place: Place
    links: dict[tuple[str, str], Link]
    silent: frozenset[str] = frozenset()


def new_client(world: World, number: int, view: View, rng: np.random.Generator, now_s: float = 0.0) -> Client:
    """A client that measured its links to some random peers, and then to those that its routes most likely go through.

    A round trip is measured up to 10% too long. Of a peer that has died in the meantime the client knows that it does
    not answer; that such a peer counts for its coordinate is an error of the simulator.
    """
    geography = world.geography
    coordinate = Coordinate()
    links: dict[tuple[str, str], Link] = {}
    count = len(view.peers)
    chosen: list[int] = rng.choice(count, min(RANDOM_PROBES, count), replace=False).tolist()
    for index in chosen:
        record = view.records[view.peers[index].id]
        coordinate = measured_to(rng, geography, number, coordinate, record.number, record.place.coordinate)
    outside = [Place(coordinate, 0.0)]
    likely = view.idle_crowd.near(
        outside,
        (0, world.settings.num_blocks),
        encodings=world.settings.encodings,
        kv_needed=1,
        limit=measured_first(count) if world.settings.probes is None else world.settings.probes,
        everywhere=False,
    )
    near = [view.index[peer.id] for peer in likely]
    for index in near:
        record = view.records[view.peers[index].id]
        coordinate = measured_to(rng, geography, number, coordinate, record.number, record.place.coordinate)
    for index in {*chosen, *near}:
        record = view.records[view.peers[index].id]
        late = 1 + 0.1 * rng.random()
        for sender, receiver, names in (
            (number, record.number, (CLIENT, record.peer.id)),
            (record.number, number, (record.peer.id, CLIENT)),
        ):
            link = geography.link(sender, receiver)
            links[names] = Link(link.latency_ms * late, link.bytes_per_ms)
    tried = [view.peers[index].id for index in {*chosen, *near}]
    silent = frozenset(name for name in tried if world.devices[world.number_of[name]].leaves_s <= now_s)
    return Client(number, Place(coordinate, float(geography.up[number])), links, silent)
