"""How long a client takes to plan the best route through a large swarm.

Peers with random speeds, queues and spans stand at random places and have measured 16 links each; the client has
measured 32. "Warm": the same facts as before, as when a session is opened or repaired. "Cold": the facts are new, so
that the table of all links is filled first. "Candidates": the 300 likeliest are chosen first, as clients do among more
than so many peers; "all": the route is searched over all, which above 2,000 peers is left out. Processor time of this
process, so that others on the machine disturb little.

    python benchmarks/planning.py [--peers 1000] [--blocks 80] [--rounds 30]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from scheduler.candidates import Crowd
from scheduler.coordinates import DIMENSIONS, Coordinate
from scheduler.encoding import encodings_of
from scheduler.network import CLIENT, Link, Network, Place
from scheduler.route import best_route
from scheduler.swarm import PASS_SIZES, Peer, Speed

SPANS = ((10, 10), (4, 20), (1, 40))
HIDDEN = 4096
MEASURED = 16
MOST_AT_ONCE = 2000
ENCODINGS = encodings_of({"none": 4.0 * HIDDEN, "int8": 1.03 * HIDDEN})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(f"{arguments.peers} peers, {arguments.blocks} blocks; medians of {arguments.rounds} swarms (most), ms")
    print()
    print("| blocks of a peer | candidates | route, warm | over all: warm | cold | for throughput, warm |")
    print("|---|---|---|---|---|---|")
    for shortest, longest in SPANS:
        taken: dict[str, list[float]] = {"choose": [], "chosen": [], "warm": [], "cold": [], "throughput": []}
        for seed in range(arguments.rounds):
            peers, network = swarm(random.Random(seed), arguments.peers, arguments.blocks, shortest, longest)
            crowd = Crowd(peers, network)
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


def swarm(
    choices: random.Random, count: int, num_blocks: int, shortest: int, longest: int
) -> tuple[list[Peer], Network]:
    names = [f"peer{number:05}" for number in range(count)]
    peers: list[Peer] = []
    for number, name in enumerate(names):
        blocks = choices.randint(shortest, min(longest, num_blocks))
        # The first ones cover the model, so that there is a route.
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


def place(choices: random.Random) -> Place:
    vector = tuple(choices.gauss(0.0, 40.0) for _ in range(DIMENSIONS))
    return Place(Coordinate(vector, choices.uniform(1.0, 20.0), 0.2), choices.uniform(100, 10_000))


def planning_ms(peers: list[Peer], network: Network, num_blocks: int, in_flight: int) -> float:
    began = time.process_time()
    best_route(
        peers, (0, num_blocks), network, encodings=ENCODINGS, kv_needed=100, in_flight=in_flight, rng=random.Random(1)
    )
    return (time.process_time() - began) * 1000


if __name__ == "__main__":
    main()
