"""Compares a simulated swarm with the same swarm of real daemons and clients.

Daemons of `splitnet peer` and clients run in hosts of an emulated network (see docs/netlab.md; needs root on Linux)
with unequal delays and rates. All of them join through one additional daemon, which is too slow for any route, instead
of through DHT nodes, which would keep the cores busy. Each daemon has a few blocks of a tiny random model, and is
slowed to the speed of its simulated device (`netlab/slowed.py`). The simulator draws the prompts, the lengths of the
answers and the times of the requests. By a seeded schedule, daemons are killed, are lost together with their hosts, or
leave, and later return. Then the simulator runs with the same devices, links, blocks, requests and losses. The report
compares the times to the first token and per token, and the load of each peer.

    sudo .venv/bin/python -m benchmarks.reality [--minutes 10] [--peers 24] [--clients 10] [--output reality.json]

The comparison is refused if the cores of this machine were busy for more than 60% of the time, because passes of
the daemons were late then. The time of niced programs does not count as busy, because these programs yield to daemons
and clients, which run at a raised priority. Linux counts the time of programs under SCHED_IDLE as busy unless they are
also niced, so run such programs as `chrt --idle 0 nice -n 19 PROGRAM`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, median_low
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.asking import Answer, Question, ask
from benchmarks.netlab.slowed import Nursery, SlowedPeers
from benchmarks.random_shapes import Shape, random_model
from peers.peer_links import MEASURED_AT_ONCE
from scheduler.facts import Coordinate, Peer, Speed
from scheduler.placement import choose_span
from simulator.geography import Floats, Geography
from simulator.node import Node
from simulator.policies import POLICIES
from simulator.session import FINISHED
from simulator.simulated_directory import DirectoryView
from simulator.simulation import Simulation
from simulator.world import (
    BYTES_PER_MS,
    KINDS,
    SimulatedDevice,
    SimulatedRequest,
    SimulationSettings,
    World,
    device_id,
    draw_requests,
)

SHAPE = Shape(hidden=128, middle=256, blocks=24, heads=4, kv_heads=2, vocabulary=512)
SPAN_BLOCKS = (5, 12)
DECODE_MS = (3.0, 18.0)
"""The range of the time that a device takes for one position through one block in a decode step, in ms; a position of
a prefill takes the share `PREFILL_SHARE` of this time."""
PREFILL_SHARE = 1 / 15
EXTENT_MS = 40.0
"""The side of the square in which hosts lie, as the time that a message takes to cross it, in ms."""
ACCESS_MS = (0.5, 6.0)
RATE_MBIT = (20.0, 200.0)
SHARE_OF_PROMPT, SHARE_OF_OUTPUT = 0.5, 0.4
MOST_PROMPT, MOST_OUTPUT = 1200, 300
"""Maximum tokens of a prompt and of an answer: those of the simulator, scaled down to the context of the model."""
REQUEST_EVERY_S = 4.0
LONG_REQUEST_EVERY_S = 18.0
FIRST = "first"
"""The host of the daemon through which all others join; this daemon is too slow for any route."""
FIRST_SPAN, FIRST_SPEED = (0, 1), Speed.of(1000.0, 100.0)
CHANGE_EVERY_S, CHANGED_S = 60.0, 40.0
LINK_FACTOR, DEVICE_FACTOR = 10.0, 6.0
LOSS_EVERY_S = 40.0
AWAY_S = (20.0, 60.0)
DRAIN_S = 15.0
PATIENCE_S = 30.0
SETTLE_S = 50.0
"""Seconds until all peers have measured each other and published the results."""
LAST_S = 60.0
"""Seconds that answers which are running at the end may still take."""
OPTIONS = ("minutes", "peers", "clients", "seed", "no_losses", "changes", "no_replans")
PRIORITY = -10
MOST_BUSY = 0.6
SEEDS = 5
"""Number of runs of the simulator, each with another seed: the choice among nearly equal routes is random."""


@dataclass(frozen=True)
class Loss:
    """The end of a daemon's service. how: "kill" (its program dies), "lost" (its host is lost), "leave" (it leaves)."""

    host: str
    at_s: float
    how: str
    back_s: float


@dataclass(frozen=True)
class Swarm:
    """The swarm to emulate and to simulate. one_way_ms, mbit: by index in `hosts`, which are peers and then clients."""

    peers: list[str]
    clients: list[str]
    spans: Mapping[str, tuple[int, int]]
    speeds: Mapping[str, Speed]
    one_way_ms: np.ndarray[Any, Any]
    mbit: np.ndarray[Any, Any]
    questions: Mapping[str, list[Question]]
    losses: list[Loss]
    seconds: float
    replans: bool
    changes: bool

    @property
    def hosts(self) -> list[str]:
        return [*self.peers, *self.clients]


@dataclass(frozen=True)
class Life:
    """A daemon from its first to its last service; busy_s: busy seconds of its device."""

    host: str
    from_s: float
    until_s: float
    how: str
    busy_s: float


@dataclass(frozen=True)
class Seen:
    """Observations of a session. Times are in ms; 0: the session had no such tokens."""

    ttft_ms: float
    token_ms: float
    tokens: int
    failed: bool
    hops: int
    moves: int
    repairs: int
    route: list[tuple[str, int, int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--peers", type=int, default=24)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-losses", action="store_true", help="no daemon ends")
    parser.add_argument("--changes", action="store_true", help="links and devices become slow for a while instead")
    parser.add_argument("--no-replans", action="store_true", help="sessions do not look for better routes")
    parser.add_argument("--busy", action="store_true", help="compare even if the cores were busy")
    parser.add_argument("--output", type=Path, default=Path("reality.json"))
    parser.add_argument("--again", type=Path, help="simulate the swarm of an earlier measurement in this file")
    arguments = parser.parse_args()
    try:
        if arguments.again:
            measured = json.loads(arguments.again.read_text())
            options = measured["options"]
        else:
            options = {key: getattr(arguments, key) for key in OPTIONS}
            swarm = draw(**options)
            measured = measure(swarm, options, arguments.output)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    swarm = draw(**options)
    busy = measured["busy"]
    print(
        f"{measured['own_busy']:.0%} of the cores were busy with this, {busy:.0%} in all; {measured['late']:.2%} of "
        "the passes took more than 10% longer than they should"
    )
    if busy > MOST_BUSY and not arguments.busy:
        print(f"error: the cores were busy for more than {MOST_BUSY:.0%}, so this is not valid", file=sys.stderr)
        return 1
    if swarm.changes:
        report_changes(measured)
        return 0
    real = [Seen(**each) for each in measured["sessions"]]
    lives = [Life(**each) for each in measured["lives"]]
    simulated = [simulate(swarm, lives, seed) for seed in range(SEEDS)]
    report(swarm, real, lives, simulated)
    return 0


# The swarm.


def draw(
    minutes: float,
    peers: int,
    clients: int,
    seed: int,
    no_losses: bool,
    changes: bool = False,
    no_replans: bool = False,
) -> Swarm:
    rng = np.random.default_rng(seed)
    names = [f"peer{number}" for number in range(peers)]
    askers = [f"client{number}" for number in range(clients)]
    count = peers + clients
    places = rng.uniform(0.0, EXTENT_MS, (count, 2))
    access = rng.uniform(*ACCESS_MS, count)
    between = np.linalg.norm(places[:, None] - places[None], axis=2)
    one_way = np.round(between + access[:, None] + access[None], 2)
    decode_ms = log_uniform(rng, DECODE_MS, peers)
    speeds = {name: Speed.of(float(ms), float(ms) * PREFILL_SHARE) for name, ms in zip(names, decode_ms, strict=True)}
    spans: dict[str, tuple[int, int]] = {}
    for name in names:
        present = [Peer(other, *span, speeds[other]) for other, span in spans.items()]
        spans[name] = choose_span(present, SHAPE.blocks, int(rng.integers(*SPAN_BLOCKS)))
    seconds = minutes * 60
    questions = draw_questions(rng, seconds, askers, long=changes)
    losses = [] if no_losses or changes else draw_losses(rng, seconds, spans)
    mbit = np.round(log_uniform(rng, RATE_MBIT, count), 1)
    return Swarm(names, askers, spans, speeds, one_way, mbit, questions, losses, seconds, not no_replans, changes)


def log_uniform(rng: np.random.Generator, bounds: tuple[float, float], count: int) -> np.ndarray[Any, Any]:
    return np.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1]), count))


def settings_of(seconds: float, count: int, peers: int, seed: int) -> SimulationSettings:
    """Settings like those of real peers and clients, without effects that the emulated network lacks."""
    return SimulationSettings(
        peers=peers,
        clients=count,
        sessions_per_peer_hour=count / peers / (seconds / 3600),
        seed=seed,
        num_blocks=SHAPE.blocks,
        hidden=SHAPE.hidden,
        refresh_s=15.0,
        look_s=15.0,
        record_ttl_s=60.0,
        view_s=10.0,
        own_use=False,
        moves=False,
        jitter=0.0,
        loss=0.0,
    )


def draw_questions(
    rng: np.random.Generator, seconds: float, clients: Sequence[str], *, long: bool
) -> dict[str, list[Question]]:
    """The questions of each client. long: all answers have the maximum length."""
    count = round(seconds / (LONG_REQUEST_EVERY_S if long else REQUEST_EVERY_S))
    questions: dict[str, list[Question]] = {client: [] for client in clients}
    for number, request in enumerate(draw_requests(rng, settings_of(seconds, count, 1, 0), 0)):
        prompt = min(MOST_PROMPT, max(4, round(request.prompt * SHARE_OF_PROMPT)))
        output = min(MOST_OUTPUT, max(4, round(request.output * SHARE_OF_OUTPUT)))
        output = MOST_OUTPUT if long else output
        client = clients[int(rng.integers(len(clients)))]
        questions[client].append(Question(number, request.at_s, prompt, output))
    return questions


def draw_losses(rng: np.random.Generator, seconds: float, spans: Mapping[str, tuple[int, int]]) -> list[Loss]:
    """Draws losses of peers, only while each of their blocks still has two other peers."""
    losses: list[Loss] = []
    for at_s in np.arange(LOSS_EVERY_S / 2, seconds, LOSS_EVERY_S):
        away = {loss.host for loss in losses if loss.at_s - 5 <= at_s < loss.back_s + 20}
        there = [host for host in spans if host not in away]
        replicas = np.zeros(SHAPE.blocks, dtype=int)
        for host in there:
            replicas[slice(*spans[host])] += 1
        spare = [host for host in there if replicas[slice(*spans[host])].min() > 2]
        if spare:
            host = spare[int(rng.integers(len(spare)))]
            how = ("kill", "lost", "leave")[len(losses) % 3]
            losses.append(Loss(host, float(at_s), how, float(at_s + rng.uniform(*AWAY_S))))
    return losses


# The real swarm.


def measure(swarm: Swarm, options: dict[str, Any], output: Path) -> dict[str, Any]:
    """Results of real daemons and clients: sessions, lives, and the load of the machine; also written as JSON."""
    os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    say(f"{len(swarm.peers)} peers, {sum(map(len, swarm.questions.values()))} sessions, {len(swarm.losses)} losses")
    with (
        random_model(SHAPE) as folder,
        Lab([FIRST, *swarm.hosts]) as lab,
        tempfile.TemporaryDirectory() as logs,
        Nursery(lab) as nursery,
    ):
        for (a, here), (b, there) in itertools.combinations(enumerate(swarm.hosts), 2):
            lab.delay(here, there, float(swarm.one_way_ms[a, b]))
        for host, mbit in zip(swarm.hosts, swarm.mbit, strict=True):
            lab.access(host, delay_ms=5.0, rate_mbit=float(mbit))
        daemon = ["--weights", "float32", "--device", "cpu", "--threads", "1", "--kv-memory", "256MiB"]
        daemon += ["--training-memory", "16MiB", "--drain", str(DRAIN_S)]
        spans, speeds = {FIRST: FIRST_SPAN, **swarm.spans}, {FIRST: FIRST_SPEED, **swarm.speeds}
        with SlowedPeers(lab, nursery, str(folder), spans, speeds, daemon) as peers:
            say("all daemons serve")
            measured = {"options": options, **run(swarm, lab, nursery, peers, str(folder), Path(logs))}
            output.write_text(json.dumps(measured, indent=1))
            return measured


def run(swarm: Swarm, lab: Lab, nursery: Nursery, peers: SlowedPeers, folder: str, logs: Path) -> dict[str, Any]:
    told, begins = nursery.queue(), {client: nursery.queue() for client in swarm.clients}
    for client in swarm.clients:
        arguments = (folder, [peers.join], swarm.questions[client], PATIENCE_S, swarm.replans)
        nursery.run(client, logs / client, ask, *arguments, begins[client], told)
    for _ in swarm.clients:
        told.get(timeout=120)
    say("all clients have joined")
    time.sleep(SETTLE_S if len(swarm.peers) > MEASURED_AT_ONCE else SETTLE_S / 2)
    began = time.perf_counter() + 1.0
    before = {host: peers.meters(host)[0].measured for host in swarm.peers}
    for client in swarm.clients:
        begins[client].put(began)
    machine, own = psutil.cpu_times(), own_cpu_s()
    churn = Churn(lab, peers, swarm, began)
    addresses = {lab.address(host): host for host in [FIRST, *swarm.peers]}
    changes = Changes(lab, peers, swarm, began)
    answers: list[Answer] = []
    count = sum(map(len, swarm.questions.values()))
    deadline = began + swarm.seconds + LAST_S
    while len(answers) < count and time.perf_counter() < deadline:
        try:
            kind, what = told.get(timeout=5.0)
            if kind == "route":
                number, hops = what
                changes.routes[number] = [hosts_of(hop, addresses) for hop in hops]
            else:
                changes.routes.pop(what.number, None)
                answers.append(what)
        except Exception:  # queue.Empty of another process
            say(f"{time.perf_counter() - began:.0f} s: {len(answers)} of {count} answers")
    ended_s = time.perf_counter() - began
    churn.end()
    changes.end()
    now = psutil.cpu_times()
    # Niced programs, and programs under SCHED_IDLE, yield to all others at once.
    idle = sum(getattr(now, kind) - getattr(machine, kind) for kind in ("idle", "iowait", "nice"))
    cores = psutil.cpu_count() or 1
    lives = [life for host in swarm.peers for life in churn.lives(host, before[host].busy_s, ended_s)]
    meters = [meter.measured for host in swarm.peers for meter in peers.meters(host)]
    for host in swarm.hosts:
        file = logs / host
        text = peers.log(host) if host in swarm.peers else file.read_text() if file.exists() else ""
        for line in text.splitlines():
            if "Traceback" in line or "rror" in line:
                say(f"{host}: {line}")
    answers.sort(key=lambda answer: answer.number)
    return {
        "busy": 1 - idle / (cores * ended_s),
        "own_busy": (own_cpu_s() - own) / (cores * ended_s),
        "late": sum(each.late for each in meters) / max(1, sum(each.passes for each in meters)),
        "sessions": [asdict(seen_of(answer, addresses)) for answer in answers],
        "lives": [asdict(life) for life in lives],
        "answers": [asdict(answer) for answer in answers],
        "addresses": addresses,
        "changes": changes.happened,
    }


class Churn:
    """Ends daemons and starts them again, each in a thread."""

    def __init__(self, lab: Lab, peers: SlowedPeers, swarm: Swarm, began: float) -> None:
        self._lab = lab
        self._peers = peers
        self._began = began
        self._ends = threading.Event()
        self._spans: dict[str, list[list[Any]]] = {host: [[0.0, math.inf, ""]] for host in swarm.peers}
        self._threads = [threading.Thread(target=self._act, args=(loss,)) for loss in swarm.losses]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def lives(self, host: str, before_s: float, ended_s: float) -> list[Life]:
        """Lives of a host's daemons. before_s: seconds that the first daemon was busy before the measurement began."""
        busy = [meter.measured.busy_s for meter in self._peers.meters(host)]
        busy[0] -= before_s
        spans = self._spans[host]
        return [
            Life(host, begin, min(end, ended_s), how, busy_s)
            for (begin, end, how), busy_s in zip(spans, busy, strict=False)
        ]

    def _act(self, loss: Loss) -> None:
        if not self._until(loss.at_s):
            return
        self._spans[loss.host][-1][1:] = [self._now(), loss.how]
        match loss.how:
            case "leave":
                self._peers.stop(loss.host)
            case "kill":
                self._peers.kill(loss.host)
            case _:
                self._lab.down(loss.host)
                self._peers.kill(loss.host)
        if self._until(loss.back_s):
            self._lab.up(loss.host)
            self._peers.begin(loss.host)
            while not self._serves(loss.host):
                self._peers.begin(loss.host, again=True)
            self._spans[loss.host].append([self._now(), math.inf, ""])

    def _serves(self, host: str) -> bool:
        try:
            self._peers.await_start(host)
        except LabError as error:
            if self._ends.is_set():
                raise
            say(str(error).splitlines()[-1])
            self._peers.kill(host)
            return False
        return True

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def _until(self, at_s: float) -> bool:
        return not self._ends.wait(max(0.0, at_s - self._now()))


class Changes:
    """Slows the link, or the device, that most sessions use, for a while, in a thread.

    Attributes:
        routes: the hosts of the present route of each session.
        happened: each change: the slow link or device, the begin and the end.
    """

    def __init__(self, lab: Lab, peers: SlowedPeers, swarm: Swarm, began: float) -> None:
        self.routes: dict[int, list[str]] = {}
        self.happened: list[tuple[list[str], float, float]] = []
        self._lab = lab
        self._peers = peers
        self._swarm = swarm
        self._began = began
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        count = int(self._swarm.seconds // CHANGE_EVERY_S) if self._swarm.changes else 0
        for number in range(count):
            at_s = (number + 0.5) * CHANGE_EVERY_S
            if self._ends.wait(max(0.0, self._began + at_s - time.perf_counter())):
                return
            used = [
                used
                for route in list(self.routes.values())
                for used in (itertools.pairwise(route) if number % 2 == 0 else [(host,) for host in route])
            ]
            if not used:
                continue
            slow = list(max(set(used), key=used.count))
            self._slow(slow, LINK_FACTOR if len(slow) == 2 else DEVICE_FACTOR)
            since_s = time.perf_counter() - self._began
            self._ends.wait(CHANGED_S)
            self._slow(slow, 1.0)
            self.happened.append((slow, since_s, time.perf_counter() - self._began))
            say(f"{' - '.join(slow)} was slow from {since_s:.0f} s on, for {CHANGED_S:.0f} s")

    def _slow(self, slow: Sequence[str], factor: float) -> None:
        if len(slow) == 2:
            a, b = (self._swarm.hosts.index(host) for host in slow)
            self._lab.delay(slow[0], slow[1], float(self._swarm.one_way_ms[a, b]) * factor)
        else:
            self._peers.meters(slow[0])[-1].slower = factor


def seen_of(answer: Answer, hosts: Mapping[str, str]) -> Seen:
    times = answer.times_s
    route = answer.routes[-1][1] if answer.routes else []
    moves = sum("better" in cause for cause in answer.causes)
    return Seen(
        ttft_ms=(times[0] - answer.asked_s) * 1000 if times else 0.0,
        token_ms=(times[-1] - times[0]) * 1000 / (len(times) - 1) if len(times) > 1 else 0.0,
        tokens=len(times),
        failed=bool(answer.error),
        hops=len(route),
        moves=moves,
        repairs=len(answer.causes) - moves,
        route=[(hosts_of(hop, hosts), *hop[1:]) for hop in route],
    )


def hosts_of(hop: Sequence[Any], hosts: Mapping[str, str]) -> str:
    """The host of a hop, whose address is `tcp://HOST:PORT`."""
    return hosts[hop[0].split("/")[2].split(":")[0]]


def own_cpu_s() -> float:
    """CPU seconds of this process and all its descendants."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


# The simulation.


class GivenPlacing:
    """Gives each device, by its id, fixed blocks."""

    check_s = 1e9
    announces_joining = False

    def __init__(self, spans: Mapping[str, tuple[int, int]]) -> None:
        self._spans = spans

    def founders(self, devices: Sequence[SimulatedDevice]) -> list[tuple[int, int]]:
        return [self._spans[device.id] for device in devices]

    def join(self, device: SimulatedDevice, place: Coordinate, view: DirectoryView) -> tuple[int, int]:
        return self._spans[device.id]

    def move(self, node: Node, view: DirectoryView) -> tuple[int, int] | None:
        return None


class GivenGeography(Geography):
    """Given latencies and bandwidths.

    Args:
        one_way_ms: latency between all devices, `[devices, devices]`, symmetric.
        bytes_per_ms: bandwidth of each device's link, in each direction.
    """

    def __init__(self, one_way_ms: Floats, bytes_per_ms: Floats) -> None:
        self.up = self.down = bytes_per_ms
        self._table = one_way_ms

    def one_way_ms(self, sender: int, receiver: int) -> float:
        return float(self._table[sender, receiver])

    def latencies(self, senders: NDArray[np.int64], receivers: NDArray[np.int64]) -> Floats:
        return self._table[np.ix_(senders, receivers)]


def simulate(swarm: Swarm, lives: Sequence[Life], seed: int) -> tuple[list[Seen], list[float]]:
    """The observations of sessions in the simulator, and the busy seconds of the lives."""
    order = sorted(range(len(lives)), key=lambda index: lives[index].from_s)
    ordered = [lives[index] for index in order]
    index_of = {host: index for index, host in enumerate(swarm.hosts)}
    rows = [index_of[life.host] for life in ordered] + [index_of[client] for client in swarm.clients]
    geography = GivenGeography(swarm.one_way_ms[np.ix_(rows, rows)], swarm.mbit[rows] * BYTES_PER_MS)
    devices = [
        SimulatedDevice(
            number=number,
            id=device_id(number),
            kind=KINDS[0],
            speed=swarm.speeds[life.host],
            max_blocks=SHAPE.blocks,
            kv_positions=1_000_000,
            joins_s=life.from_s,
            leaves_s=life.until_s if life.how else math.inf,
            crashes=life.how != "leave",
            resets=life.how == "kill",
        )
        for number, life in enumerate(ordered)
    ]
    asked = sorted(
        (question.number, question, len(devices) + index)
        for index, client in enumerate(swarm.clients)
        for question in swarm.questions[client]
    )
    requests = [
        SimulatedRequest(client, question.at_s, question.prompt, question.output) for _, question, client in asked
    ]
    settings = settings_of(swarm.seconds, len(requests), len(swarm.peers), seed)
    world = World.from_devices(settings, geography, devices, requests).with_rules(load_s=0.0)
    spans = {device.id: swarm.spans[life.host] for device, life in zip(devices, ordered, strict=True)}
    simulation = Simulation(world, POLICIES["own"].routing(world), GivenPlacing(spans))
    for _ in simulation.run():
        pass
    host_of = {device.id: life.host for device, life in zip(devices, ordered, strict=True)}
    seen = [
        Seen(
            ttft_ms=session.first_ms - session.arrived_ms if session.tokens else 0.0,
            token_ms=(session.last_ms - session.first_ms) / (session.tokens - 1) if session.tokens > 1 else 0.0,
            tokens=session.tokens,
            failed=session.state != FINISHED,
            hops=len(session.hops),
            moves=session.moves,
            repairs=session.repairs,
            route=[(host_of[node.id], start, end) for node, start, end in session.hops],
        )
        for session in simulation.sessions
    ]
    busy = [0.0] * len(lives)
    for device, index in zip(devices, order, strict=True):
        node = simulation.nodes.get(device.id)
        busy[index] = node.busy_ms / 1000 if node is not None else 0.0
    return seen, busy


# The comparison.


def figures_of(seen: Sequence[Seen]) -> dict[str, float]:
    ttft = [each.ttft_ms for each in seen if each.tokens]
    token = [each.token_ms for each in seen if each.tokens > 1]
    return {
        "time to the first token, median, ms": median(ttft),
        "time to the first token, p95, ms": float(np.percentile(ttft, 95)),
        "ms per token, median": median(token),
        "ms per token, p95": float(np.percentile(token, 95)),
        "hops, mean": fmean(each.hops for each in seen),
        "moves to better routes": sum(each.moves for each in seen),
        "repairs": sum(each.repairs for each in seen),
        "failed": sum(each.failed for each in seen),
        "tokens": sum(each.tokens for each in seen),
    }


def report(
    swarm: Swarm, real: Sequence[Seen], lives: Sequence[Life], simulated: Sequence[tuple[list[Seen], list[float]]]
) -> None:
    print("\n| figure | real | simulated, median of seeds (range) | real / simulated |")
    print("|---|---|---|---|")
    busy_s = sum(life.busy_s for life in lives)
    figures = [{**figures_of(seen), "busy seconds of all peers": sum(busy)} for seen, busy in simulated]
    for name, value in {**figures_of(real), "busy seconds of all peers": busy_s}.items():
        drawn = [each[name] for each in figures]
        middle = median(drawn)
        ratio = f"{value / middle:.2f}" if middle else ""
        print(f"| {name} | {value:.4g} | {middle:.4g} ({min(drawn):.4g}-{max(drawn):.4g}) | {ratio} |")
    if all(len(seen) == len(real) for seen, _ in simulated):
        for name in ("ttft_ms", "token_ms"):
            ratios = [
                getattr(each, name) / fmean(getattr(seen[index], name) for seen, _ in simulated)
                for index, each in enumerate(real)
                if getattr(each, name) and all(getattr(seen[index], name) for seen, _ in simulated)
            ]
            print(f"| {name} of each session | | | median {median(ratios):.2f}, p90 {np.percentile(ratios, 90):.2f} |")
    print("\n| peer | blocks | ms per block | load, real | simulated (range) | real / simulated |")
    print("|---|---|---|---|---|---|")
    of_peer = {host: [index for index, life in enumerate(lives) if life.host == host] for host in swarm.peers}
    loads: list[tuple[float, float]] = []
    for host, indices in of_peer.items():
        served_s = sum(lives[index].until_s - lives[index].from_s for index in indices)
        load = sum(lives[index].busy_s for index in indices) / served_s
        drawn = [sum(busy[index] for index in indices) / served_s for _, busy in simulated]
        middle = fmean(drawn)
        loads.append((load, middle))
        ratio = f"{load / middle:.2f}" if middle > 0.005 else ""
        start, end = swarm.spans[host]
        print(
            f"| {host} | {start}:{end} | {swarm.speeds[host].block_ms_at(1):.2f} | {load:.1%} "
            f"| {middle:.1%} ({min(drawn):.1%}-{max(drawn):.1%}) | {ratio} |"
        )
    pairs = np.array(loads)
    print(f"\ncorrelation of the loads: {np.corrcoef(pairs.T)[0, 1]:.3f}")
    sys.stdout.flush()


def report_changes(measured: Mapping[str, Any]) -> None:
    """How soon sessions leave a link or a device that has become slow, and their speed."""
    hosts, answers = measured["addresses"], [answer for answer in measured["answers"] if len(answer["times_s"]) > 1]
    print("\n| slow for 40 s | used it then | left it | half had left after, s | began on it | left it |")
    print("|---|---|---|---|---|---|")
    all_left_s: list[float] = []
    slow_gaps: list[float] = []
    for slow, since_s, until_s in measured["changes"]:
        left_s: list[float] = []
        began_left: list[bool] = []
        for answer in answers:
            used = [at_s for at_s, hops in answer["routes"] if at_s < until_s and uses(hops, slow, hosts)]
            before = [hops for at_s, hops in answer["routes"] if at_s <= since_s]
            if not used or answer["times_s"][-1] <= since_s or (before and not uses(before[-1], slow, hosts)):
                continue
            from_s = max(since_s, used[0])
            left_at_s = min(
                (at_s for at_s, hops in answer["routes"] if from_s < at_s < until_s and not uses(hops, slow, hosts)),
                default=math.inf,
            )
            if before:
                left_s.append(left_at_s - since_s)
                slow_gaps += gaps(answer, since_s, until_s)
            else:
                began_left.append(left_at_s < until_s)
        all_left_s += left_s
        counts = f"{len(left_s)} | {sum(map(math.isfinite, left_s))} | {median_low(left_s) if left_s else math.inf:.1f}"
        print(f"| {' - '.join(slow)} | {counts} | {len(began_left)} | {sum(began_left)} |")
    tokens = sum(len(answer["times_s"]) for answer in answers)
    last_s = max(answer["times_s"][-1] for answer in answers)
    each = [fmean(gaps(answer, 0.0, math.inf)) for answer in answers]
    routes = [[[tuple(hop) for hop in hops] for _, hops in answer["routes"]] for answer in answers]
    returns = sum(route in of_one[:index] for of_one in routes for index, route in enumerate(of_one))
    print(
        f"\nall together: {sum(map(math.isfinite, all_left_s))} of {len(all_left_s)} left, half after "
        f"{median_low(all_left_s):.1f} s; ms from token to token of these while it was slow: mean "
        f"{fmean(slow_gaps):.0f}, median {median(slow_gaps):.0f}\n{tokens} tokens in {last_s:.0f} s: "
        f"{tokens / last_s:.1f} tokens/s; ms per token of a session: median {median(each):.0f}, p90 "
        f"{np.percentile(each, 90):.0f}, maximum {max(each):.0f}\n{sum(map(len, routes)) - len(routes)} moves, of "
        f"which {returns} back to a route that the session had before"
    )


def gaps(answer: Mapping[str, Any], since_s: float, until_s: float) -> list[float]:
    """The times between the tokens that arrived in an interval, in ms."""
    return [(b - a) * 1000 for a, b in itertools.pairwise(answer["times_s"]) if since_s < b <= until_s]


def uses(hops: Sequence[Sequence[Any]], slow: Sequence[str], hosts: Mapping[str, str]) -> bool:
    """Whether a route uses what is slow: the link between two hosts, or one host."""
    names = [hosts_of(hop, hosts) for hop in hops]
    return (slow[0], slow[-1]) in list(itertools.pairwise(names)) if len(slow) == 2 else slow[0] in names


def say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
