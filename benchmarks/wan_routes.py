"""Whether clients choose the route that measurements show to be the fastest, and change it when another route becomes
the fastest.

Five daemons and a client are hosts of an emulated network (see docs/netlab.md) at 5, 20 and 60 ms from each other. Each
block has two replicas: peers a and b have a half of the model each; c, d and e a third each. For every order of peers
that can run all blocks, the benchmark measures decode steps through sessions with this route, in turns. If two peers of
an order share some blocks, they divide these blocks evenly, or as a client has chosen: the devices are equally fast.
The benchmark also records which routes new clients choose. It does all of this three times:

1. unchanged;
2. after the link between the first two peers of the fastest route has become slow;
3. with the fast link again, but other sessions generate through the last peer of the fastest route.

Each change happens while a session generates that has begun on the fastest route; the benchmark shows when this session
moves, and to which route.

    sudo .venv/bin/python -m benchmarks.wan_routes CHECKPOINT [--rounds 3] [--tokens 12] [--clients 5]

Takes about 12 minutes, and needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.crowd import ANSWER_TOKENS, PROMPT_POSITIONS, Crowd
from benchmarks.netlab.generation import generate
from benchmarks.netlab.peers import GuidedSwarm, LabPeers, RouteChanged, measure_steps
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.hf.cache import ModelSession
from splitnet.hf.causal_lm import attach
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.plan import PlannedHop
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.bench.backends import Clock, gaps_s

Hop = tuple[str, int, int]
Route = tuple[Hop, ...]

TEXT = Path(__file__).parent / "data" / "varied_text.txt"
DELAYS_MS = {
    ("client", "a"): 5.0,
    ("client", "b"): 20.0,
    ("client", "c"): 60.0,
    ("client", "d"): 20.0,
    ("client", "e"): 20.0,
    ("a", "b"): 20.0,
    ("a", "c"): 60.0,
    ("a", "d"): 20.0,
    ("a", "e"): 20.0,
    ("b", "c"): 60.0,
    ("b", "d"): 5.0,
    ("b", "e"): 20.0,
    ("c", "d"): 60.0,
    ("c", "e"): 60.0,
    ("d", "e"): 20.0,
}
SLOW_MS = 120.0
CROWD_MS = 5.0
"""One-way delay from the crowd's host to all others, in ms."""
CODEC = "none"
"""Lossless, so that the tokens of a moved session can be compared."""
CONTEXT = 16
ROOM = 512
FACTS_S = 20.0
"""Seconds to wait after a change of the network: peers measure and publish every 15 s, and until then new clients plan
with earlier facts."""
BEFORE, AFTER, MOST = 20, 30, 250
"""Tokens of the running session: before the network changes, after its move, and in total."""


@dataclass(frozen=True)
class Figures:
    """Figures of one state of the network."""

    name: str
    measured: Mapping[Route, list[float]]
    """Mean decode time per token of each route in each round, in ms: not medians, since under load only some steps
    wait."""
    delays_ms: Mapping[Route, float]
    predicted: Mapping[Route, float]
    chosen: Counter[Route]

    @property
    def ranking(self) -> list[Route]:
        return sorted(self.measured, key=self.ms)

    def ms(self, route: Route) -> float:
        return statistics.median(self.measured[route])


@dataclass(frozen=True)
class Followed:
    """The reaction of a running session to a change of the network."""

    name: str
    before: Route
    after: Route
    before_ms: float
    changed_ms: float
    """Ms per token from the change until the move, or until the end if the session did not move."""
    moved_s: float | None
    """Seconds from the change until the move; None: the session did not move."""
    after_ms: float
    pause_ms: float
    """Ms of the token during the move."""
    same: bool


class Bench:
    """The complete lab, from the client's view.

    Args:
        lab: the lab in which the peers run.
        swarm: the client's connection, which can use given routes.
        checkpoint: the model.
        arguments: the arguments of the command line.
    """

    def __init__(
        self,
        lab: Lab,
        peers: LabPeers,
        swarm: GuidedSwarm,
        checkpoint: Checkpoint,
        arguments: argparse.Namespace,
    ) -> None:
        self.lab = lab
        self._peers = peers
        self._swarm = swarm
        self._checkpoint = checkpoint
        self._arguments = arguments
        self._facts = ModelFacts.of(checkpoint)
        self._records = {peers.host_of(record): record for record in swarm.peers(fresh=True)}
        if len(self._records) != len(spans_of(checkpoint.num_blocks)):
            raise LabError(f"the client sees only the peers in {', '.join(sorted(self._records))}: try again")
        self._delays = dict(DELAYS_MS)
        self._prompt = checkpoint.tokenizer()(TEXT.read_text(), return_tensors="pt").input_ids[:, :CONTEXT]
        self._expected = torch.empty(0)

    def delay(self, a: str, b: str, ms: float) -> None:
        self.lab.delay(a, b, ms)
        self._delays[(a, b) if (a, b) in DELAYS_MS else (b, a)] = ms

    def measure(self, name: str) -> Figures:
        """Measures which routes new clients choose, and the times of all routes, in turns."""
        chosen, predicted = self._choices()
        orders = {order_of(route) for route in chosen}
        evenly = [route for route in all_routes(self._checkpoint.num_blocks) if order_of(route) not in orders]
        routes = [*chosen, *evenly]
        hidden = torch.randn(CONTEXT, self._facts.hidden_size)
        measured: dict[Route, list[float]] = {route: [] for route in routes}
        for _ in range(self._arguments.rounds):
            for route in random.sample(routes, len(routes)):
                self._swarm.route = self._planned(route)
                session = Session(self._swarm, ConnectionOptions(codec=CODEC), reservation=ROOM)
                try:
                    measured[route].append(measure_steps(session, hidden, self._arguments.tokens).mean_ms)
                except RouteChanged as error:  # only some rounds may fail
                    print(f"left out: {error}", file=sys.stderr)
                finally:
                    session.close()
        if not all(measured.values()):
            raise LabError("some routes could not be measured in any round: is the machine busy?")
        return Figures(name, measured, {route: self._distance(route) for route in routes}, predicted, chosen)

    def expect(self) -> None:
        """Generates the expected text of the running sessions, without a disturbance."""
        self._swarm.route = None
        self._expected = generate(attach(self._checkpoint, self._swarm, codec=CODEC), self._prompt, MOST, Clock())

    def follow(self, name: str, route: Route, change: Callable[[], None]) -> Followed:
        """Has a session generate along `route`, changes the network meanwhile, and continues until it has moved."""
        with GuidedSwarm(self._facts, list(self._peers.addresses.values())) as swarm:
            swarm.route = self._planned(route)
            model = attach(self._checkpoint, swarm, codec=CODEC)
            print(f"a session generates: {name}", file=sys.stderr)
            with model.session(max_length=CONTEXT + MOST) as cache:
                moved_at = 0

                def look(count: int) -> None:
                    nonlocal moved_at
                    assert cache.session is not None
                    if count == BEFORE:
                        swarm.route = None  # from here on the session plans by itself
                        change()
                    if cache.session.recoveries and not moved_at:
                        moved_at = count

                clock = Clock(look)
                tokens = generate(
                    model,
                    self._prompt,
                    MOST,
                    clock,
                    until=lambda: bool(moved_at) and len(clock.times) >= moved_at + AFTER,
                )
                assert cache.session is not None
                gaps = [1000 * gap for gap in gaps_s(clock.times)]
                ends = moved_at - 2 if moved_at else len(gaps)
                return Followed(
                    name,
                    route,
                    self._route_of(cache.session),
                    statistics.median(gaps[: BEFORE - 1]),
                    statistics.median(gaps[BEFORE:ends]) if ends > BEFORE else float("nan"),
                    clock.times[moved_at - 1] - clock.times[BEFORE - 1] if moved_at else None,
                    statistics.median(gaps[moved_at - 1 :]) if moved_at else float("nan"),
                    gaps[moved_at - 2] if moved_at else float("nan"),
                    torch.equal(tokens, self._expected[: len(tokens)]),
                )

    def crowd(self, host: str) -> Crowd:
        """Sessions that can generate through the peer of a host."""
        join = list(self._peers.addresses.values())
        address = self._records[host].address
        return Crowd(self.lab, "crowd", self._arguments.checkpoint, join, address, self._arguments.crowd)

    def _choices(self) -> tuple[Counter[Route], dict[Route, float]]:
        """The routes that new clients choose, and the predicted time of a step on each route, from the facts of the
        first client.
        """
        chosen: Counter[Route] = Counter()
        costs: dict[Route, float] = {}
        for _ in range(self._arguments.clients):
            with Swarm(self._facts, list(self._peers.addresses.values())) as swarm:
                session = Session(swarm, ConnectionOptions(codec=CODEC), reservation=ROOM)
                session.open()
                route = self._route_of(session)
                chosen[route] += 1
                for known in (route, *all_routes(self._checkpoint.num_blocks)):
                    if known not in costs:
                        costs[known] = swarm.planner.cost_ms(session.needs(), self._planned(known))
                session.close()
        return chosen, costs

    def _planned(self, route: Route) -> list[PlannedHop]:
        return [PlannedHop(self._records[host], start, end) for host, start, end in route]

    def _route_of(self, session: ModelSession) -> Route:
        return tuple((self._peers.host_of(hop.planned.record), *hop.blocks) for hop in session.hops)

    def _distance(self, route: Route) -> float:
        hosts = ["client", *order_of(route), "client"]
        return sum(self._delays.get((a, b)) or self._delays[b, a] for a, b in itertools.pairwise(hosts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12, help="decode tokens of each route and round")
    parser.add_argument("--clients", type=int, default=5, help="new clients that choose a route")
    parser.add_argument("--crowd", type=int, default=2, help="sessions that keep a peer busy")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    spans = spans_of(checkpoint.num_blocks)
    try:
        with Lab(["client", "crowd", *spans]) as lab:
            for pair, delay_ms in DELAYS_MS.items():
                lab.delay(*pair, delay_ms)
            for host in ("client", *spans):
                lab.delay("crowd", host, CROWD_MS)
            with (
                LabPeers(lab, arguments.checkpoint, spans) as peers,
                lab.inside("client"),
                GuidedSwarm(ModelFacts.of(checkpoint), list(peers.addresses.values())) as swarm,
            ):
                time.sleep(FACTS_S)
                run(Bench(lab, peers, swarm, checkpoint, arguments))
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(bench: Bench) -> None:
    figures = [bench.measure("as it is")]
    report_routes(figures[-1])
    bench.expect()
    best = figures[0].ranking[0]

    a, b, *_ = order_of(best)
    name = f"the link {a}-{b} takes {SLOW_MS:g} ms"
    followed = [bench.follow(name, best, lambda: bench.delay(a, b, SLOW_MS))]
    time.sleep(FACTS_S)
    figures.append(bench.measure(name))
    report_routes(figures[-1])
    bench.delay(a, b, DELAYS_MS.get((a, b)) or DELAYS_MS[b, a])
    time.sleep(FACTS_S)

    busy = best[-1][0]
    name = f"others generate through {busy}"
    with bench.crowd(busy) as crowd:
        followed.append(bench.follow(name, best, crowd.begin))
        time.sleep(FACTS_S)
        figures.append(bench.measure(name))
        report_routes(figures[-1])
    report_choices(figures)
    report_followed(followed)


def spans_of(num_blocks: int) -> dict[str, tuple[int, int]]:
    """The spans of the peers: two halves and three thirds of the model."""
    half, third, two_thirds = (round(num_blocks * share) for share in (1 / 2, 1 / 3, 2 / 3))
    return {
        "a": (0, half),
        "b": (half, num_blocks),
        "c": (0, third),
        "d": (third, two_thirds),
        "e": (two_thirds, num_blocks),
    }


def all_routes(num_blocks: int) -> list[Route]:
    """Every order of peers that can run all blocks."""
    spans = spans_of(num_blocks)
    orders = [order for count in range(1, len(spans) + 1) for order in itertools.permutations(spans, count)]
    return [route for order in orders if (route := shared_evenly(order, spans, num_blocks)) is not None]


def shared_evenly(order: Sequence[str], spans: Mapping[str, tuple[int, int]], num_blocks: int) -> Route | None:
    """The route through peers in this order, each with at least one block; None if they cannot run all blocks."""
    if spans[order[0]][0] > 0 or spans[order[-1]][1] < num_blocks:
        return None
    pairs = list(itertools.pairwise(order))
    first, last = [0], [num_blocks]
    for _, following in pairs:
        first.append(max(spans[following][0], first[-1] + 1))
    for before, _ in reversed(pairs):
        last.insert(0, min(spans[before][1], last[0] - 1))
    edges = [0, *((low + high) // 2 for low, high in zip(first[1:], last[:-1], strict=True)), num_blocks]
    if any(low > high for low, high in zip(first[1:], last[:-1], strict=True)):
        return None
    return tuple((host, start, end) for host, (start, end) in zip(order, itertools.pairwise(edges), strict=True))


def order_of(route: Route) -> tuple[str, ...]:
    return tuple(host for host, _, _ in route)


def show(route: Route) -> str:
    return " → ".join(f"{host} {start}:{end}" for host, start, end in route)


def number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f}"


def report_routes(figures: Figures) -> None:
    clients = sum(figures.chosen.values())
    print(f"\nAll routes, {figures.name}:\n")
    print("| | route | links, ms | predicted, ms | ms per token, median of rounds (range) | chosen |")
    print("|---|---|---|---|---|---|")
    for rank, route in enumerate(figures.ranking, 1):
        seen = figures.measured[route]
        chosen = f"by {figures.chosen[route]} of {clients}" if figures.chosen[route] else ""
        print(
            f"| {rank} | {show(route)} | {figures.delays_ms[route]:g} | {figures.predicted[route]:.0f} "
            f"| {figures.ms(route):.1f} ({min(seen):.1f}-{max(seen):.1f}) | {chosen} |"
        )
    sys.stdout.flush()


def report_choices(states: Sequence[Figures]) -> None:
    print("\nWhat new clients choose:\n")
    print("| network | chosen | by clients | place among all | ms per token | ms of the fastest | slower by |")
    print("|---|---|---|---|---|---|---|")
    for figures in states:
        ranking = figures.ranking
        best_ms = figures.ms(ranking[0])
        for route, count in figures.chosen.most_common():
            ms = figures.ms(route)
            print(
                f"| {figures.name} | {show(route)} | {count} of {sum(figures.chosen.values())} "
                f"| {ranking.index(route) + 1} of {len(ranking)} | {ms:.1f} | {best_ms:.1f} "
                f"| {100 * (ms / best_ms - 1):.1f} % |"
            )
    sys.stdout.flush()


def report_followed(sessions: Sequence[Followed]) -> None:
    print(f"\nHow a session that generates meanwhile reacts (others: {PROMPT_POSITIONS} positions of prompt and")
    print(f"{ANSWER_TOKENS} tokens, one answer after the other):\n")
    columns = ["change", "route before", "ms per token", "after the change", "moved after, s", "pause, ms"]
    columns += ["route then", "ms per token then", "same tokens"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for seen in sessions:
        moved = f"{seen.moved_s:.1f}" if seen.moved_s is not None else "did not"
        same = "yes" if seen.same else "NO"
        print(
            f"| {seen.name} | {show(seen.before)} | {seen.before_ms:.1f} | {number(seen.changed_ms)} | {moved} "
            f"| {number(seen.pause_ms)} | {show(seen.after)} | {number(seen.after_ms)} | {same} |"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
