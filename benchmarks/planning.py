"""How long a client takes to plan the best route through a large swarm.

Peers have random speeds, queues, spans and network coordinates, and have measured 16 links each; the client has
measured 32 links. "Warm": the facts are unchanged, as when a session is opened or repaired. "Cold": the facts are new,
so that the table of all links is filled first. "Candidates": the 300 likeliest peers are chosen first, as clients do in
larger swarms; "all": the route is searched over all peers, up to 2,000. Times are processor times of this process, so
that other programs on the machine change them little.

With --client, the benchmark measures the planning of a client: its `Planner` plans with signed records, 300 prompt
tokens and 128 measured links. "Cold": the first plan with these records; "one changed": one record was renewed since
the last plan; "in a session": steps of the client gave new facts about two hops and the link between them; "without
some": two peers must not be used.

    python -m benchmarks.planning [--client] [--peers 1000] [--blocks 80] [--rounds 30]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from scheduler.candidates import CandidateIndex
from scheduler.cost import encodings_of
from scheduler.facts import CLIENT, DIMENSIONS, PASS_SIZES, Coordinate, Link, Network, NetworkPlace, Peer, Speed
from scheduler.route import best_route
from splitnet.directory.record import KEY_PREFIX_BYTES, PeerRecord, SeenLink
from splitnet.security.identity import Identity
from splitnet.swarm.measure import Measurements
from splitnet.swarm.plan import Needs, PlannedHop, Planner
from splitnet.wire.messages import LoadReport

SPANS = ((10, 10), (4, 20), (1, 40))
HIDDEN = 4096
MEASURED = 16
MOST_AT_ONCE = 2000
COLD = 3
OWN_LINKS = 128
ENCODINGS = encodings_of({"none": 4.0 * HIDDEN, "int8": 1.03 * HIDDEN})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--client", action="store_true")
    arguments = parser.parse_args()
    if arguments.client:
        time_a_client(arguments.peers, arguments.blocks, arguments.rounds)
        return
    print(f"{arguments.peers} peers, {arguments.blocks} blocks; medians of {arguments.rounds} swarms (maximum), ms")
    print()
    print("| blocks of a peer | candidates | route, warm | over all: warm | cold | for throughput, warm |")
    print("|---|---|---|---|---|---|")
    for shortest, longest in SPANS:
        taken: dict[str, list[float]] = {"choose": [], "chosen": [], "warm": [], "cold": [], "throughput": []}
        for seed in range(arguments.rounds):
            peers, network = swarm(random.Random(seed), arguments.peers, arguments.blocks, shortest, longest)
            crowd = CandidateIndex(peers, network)
            ends, blocks = [network.places[CLIENT]] * 2, (0, arguments.blocks)
            likely: list[Peer] = []
            for number in range(4):
                began = time.process_time()
                likely = crowd.near(ends, blocks, encodings=ENCODINGS, kv_needed=100)
                took_ms = (time.process_time() - began) * 1000
                route_ms = planning_ms(likely, network, arguments.blocks, in_flight=1)
                if number:
                    taken["choose"].append(took_ms)
                    taken["chosen"].append(route_ms)
            if arguments.peers > MOST_AT_ONCE:
                continue
            taken["cold"].append(planning_ms(peers, network, arguments.blocks, in_flight=1))
            taken["warm"] += [planning_ms(peers, network, arguments.blocks, in_flight=1) for _ in range(3)]
            if seed < 5:
                taken["throughput"].append(planning_ms(peers, network, arguments.blocks, in_flight=8))
        name = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        cells = [f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "" for values in taken.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def time_a_client(count: int, num_blocks: int, rounds: int) -> None:
    choices = random.Random(1)
    keys = [Identity.generate() for _ in range(count)]
    print(f"{count} peers, {num_blocks} blocks; medians of {COLD} x {rounds} plans (maximum), ms")
    print()
    print("| blocks of a peer | cold | warm | in a session | without some | one changed |")
    print("|---|---|---|---|---|---|")
    for shortest, longest in SPANS:
        peers, network = swarm(choices, count, num_blocks, shortest, longest)
        links: dict[str, list[SeenLink]] = {}
        by_name = {peer.id: key for peer, key in zip(peers, keys, strict=True)}
        for (sender, receiver), link in network.measured.items():
            if CLIENT not in (sender, receiver):
                prefix = by_name[receiver].public.raw[:KEY_PREFIX_BYTES]
                links.setdefault(sender, []).append(SeenLink(prefix, 2 * link.latency_ms, link.bytes_per_ms))
        packed = [
            record_of(key, peer, network.places[peer.id], num_blocks, links[peer.id]).pack(key)
            for key, peer in zip(keys, peers, strict=True)
        ]
        taken: dict[str, list[float]] = {"cold": [], "warm": [], "seen": [], "without": [], "changed": []}
        for _ in range(COLD):
            client = Client(choices, packed, num_blocks)
            taken["cold"].append(client.planning_ms())
            taken["warm"] += [client.planning_ms() for _ in range(rounds)]
            for _ in range(rounds):
                before, after, *_ = client.hops
                client.measurements.hop_seen(before.name, 1, choices.uniform(1, 5), choices.uniform(1, 20))
                client.measurements.hop_seen(after.name, 1, choices.uniform(1, 5), choices.uniform(1, 20))
                client.measurements.link_seen(before.name, after.name, choices.uniform(1, 150))
                taken["seen"].append(client.planning_ms())
            for _ in range(rounds):
                taken["without"].append(client.planning_ms({hop.name for hop in client.hops[:2]}))
            some = choices.randrange(count)
            client.records[some] = replace(client.records[some], queue_ms=choices.expovariate(0.2))
            taken["changed"].append(client.planning_ms())
        name = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        cells = [f"{statistics.median(values):.1f} ({max(values):.1f})" for values in taken.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


class Client:
    """A client that has measured some links. hops: the hops of its last route."""

    def __init__(self, choices: random.Random, packed: Sequence[bytes], num_blocks: int) -> None:
        self.records = [PeerRecord.unpack(data) for data in packed]
        self.measurements = Measurements()
        measured = {record.endpoint: record for record in choices.sample(self.records, min(len(packed), OWN_LINKS))}
        links = {endpoint: Link(choices.uniform(1, 150), choices.uniform(100, 10_000)) for endpoint in measured}
        loads = {endpoint: LoadReport(choices.expovariate(0.2), choices.random(), time.time()) for endpoint in measured}
        self.measurements.links_measured(measured, links, loads)
        self.hops: list[PlannedHop] = []
        self._planner = Planner(self.measurements, "a-model")
        self._needs = Needs(100, ENCODINGS, (0, num_blocks), prompt=300)

    def planning_ms(self, exclude: Collection[str] = ()) -> float:
        began = time.process_time()
        self.hops = self._planner.plan_route(list(self.records), self._needs, self._needs.blocks, exclude=exclude)
        return (time.process_time() - began) * 1000


def record_of(key: Identity, peer: Peer, place: NetworkPlace, num_blocks: int, links: Sequence[SeenLink]) -> PeerRecord:
    coordinate = place.coordinate
    return PeerRecord.idle(
        key=key.public,
        model="ab" * 32,
        model_name="a-model",
        address="tcp://192.0.2.1:31331",
        start=peer.start,
        end=peer.end,
        num_blocks=num_blocks,
        block_ms=peer.speed.block_ms,
        queue_ms=peer.queue_ms,
        kv_free_positions=peer.kv_free,
        serves=True,
        coordinate=(*coordinate.vector, coordinate.height_ms),
        coordinate_error=coordinate.error,
        bytes_per_ms=place.bytes_per_ms,
        links=tuple(links),
        issued_at=time.time(),
    )


def swarm(
    choices: random.Random, count: int, num_blocks: int, shortest: int, longest: int
) -> tuple[list[Peer], Network]:
    names = [f"peer{number:05}" for number in range(count)]
    peers: list[Peer] = []
    for number, name in enumerate(names):
        blocks = choices.randint(shortest, min(longest, num_blocks))
        # The first peers cover the model, so that there is a route.
        start = min(number * shortest, num_blocks - blocks) if number * shortest < num_blocks else None
        start = choices.randint(0, num_blocks - blocks) if start is None else start
        per_block = choices.lognormvariate(0.0, 1.0)
        speed = Speed(tuple(per_block * (1 + size / 16) for size in PASS_SIZES))
        peers.append(Peer(name, start, start + blocks, speed, choices.expovariate(0.2), 0.0, 1 << 20))
    places = {name: place(choices) for name in (*names, CLIENT)}
    links = {
        (name, other): Link(choices.uniform(1, 150), choices.uniform(100, 10_000))
        for name in names
        for other in choices.sample(names, MEASURED)
        if other != name
    }
    for name in choices.sample(names, min(count, 2 * MEASURED)):
        links[CLIENT, name] = links[name, CLIENT] = Link(choices.uniform(1, 150), choices.uniform(100, 10_000))
    return peers, Network(links, places=places)


def place(choices: random.Random) -> NetworkPlace:
    vector = tuple(choices.gauss(0.0, 40.0) for _ in range(DIMENSIONS))
    return NetworkPlace(Coordinate(vector, choices.uniform(1.0, 20.0), 0.2), choices.uniform(100, 10_000))


def planning_ms(peers: list[Peer], network: Network, num_blocks: int, in_flight: int) -> float:
    began = time.process_time()
    best_route(
        peers, (0, num_blocks), network, encodings=ENCODINGS, kv_needed=100, in_flight=in_flight, rng=random.Random(1)
    )
    return (time.process_time() - began) * 1000


if __name__ == "__main__":
    main()
