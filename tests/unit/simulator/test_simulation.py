from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from scheduler.batching import PASS_POSITIONS
from scheduler.candidates import CandidateIndex
from scheduler.cost import route_ms
from scheduler.facts import CLIENT, Coordinate, Hop, Link, Network, Speed
from scheduler.route import NoRoute, best_route
from simulator.clients import RouteTask, SimulatedPlan
from simulator.command import chart
from simulator.geography import Access, Geography, MeasuredGeography, TrueNetwork, read_latencies
from simulator.membership import Placing
from simulator.outcome import Outcome, coordinate_error, differences, outcome_of, plan_qualities, pooled, simulate
from simulator.policies import ABLATIONS, AGAINST, BASELINES, POLICIES
from simulator.session import FAILED, FINISHED, RUNNING
from simulator.simulation import Simulation
from simulator.traffic import Stream
from simulator.world import (
    KINDS,
    LIE,
    Events,
    SimulatedDevice,
    SimulatedRequest,
    SimulationSettings,
    World,
    device_id,
    measured_to,
)
from splitnet.errors import SplitnetError
from splitnet.session.events import Cause, Phase

SMALL = SimulationSettings(
    peers=40, clients=50, sessions_per_peer_hour=20.0, num_blocks=16, hidden=1024, uptime=0.03, load_s=0.1
)
"""A world in which peers join and leave all the time."""
FEW = replace(SMALL, clients=10)


@pytest.fixture(scope="module")
def small_world() -> World:
    return World(SMALL)


@cache
def ran(world: World, policy: str) -> Simulation:
    """A finished simulation, which several tests share. Do not change it."""
    chosen = POLICIES[policy]
    world = world.with_rules(**chosen.rules)
    simulation = Simulation(world, chosen.routing(world), chosen.placing(world))
    for _ in simulation.run():
        pass
    return simulation


def test_liars_live_in_the_same_world_and_say_that_they_are_fast_and_idle() -> None:
    honest, world = (World(replace(FEW, liars=part)) for part in (0.0, 0.5))
    assert [replace(device, lies=False) for device in world.devices] == honest.devices
    nodes = ran(world, "own").nodes.values()
    assert {node.device.lies for node in nodes} == {False, True}
    for node in nodes:
        told = node.record(1e6).peer
        usual_ms = node.slower * node.device.speed.block_ms[0]
        assert told.speed.block_ms[0] == pytest.approx(usual_ms / LIE if node.device.lies else usual_ms)
        assert not node.device.lies or (told.queue_ms, told.batch) == (0.0, 0.0)


@pytest.mark.default_cases(policy=("own", "petals", "random", "stale"))
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_session_ends_and_frees_its_memory(small_world: World, policy: str) -> None:
    simulation = ran(small_world, policy)
    assert len(simulation.sessions) == SMALL.clients
    for session in simulation.sessions:
        assert session.state in (FINISHED, FAILED)
        if session.state == FINISHED:
            assert session.tokens == session.request.output
            assert session.arrived_ms < session.first_ms <= session.last_ms == session.ended_ms
            starts_and_ends = [0, *(end for _, _, end in session.hops)]
            assert [start for _, start, _ in session.hops] == starts_and_ends[:-1]
            assert starts_and_ends[-1] == SMALL.num_blocks
    for node in simulation.nodes.values():
        assert node.kv_used == 0
        assert not node.sessions
    assert any(session.state == FINISHED for session in simulation.sessions)


def test_leaving_peers_are_replaced_during_a_session(small_world: World) -> None:
    sessions = ran(small_world, "own").sessions
    assert sum(session.repairs for session in sessions if session.state == FINISHED) > 0


@pytest.mark.default_cases(policy=("own",))
@pytest.mark.parametrize("policy", ["own", "random", "petals-push"])
def test_the_same_seed_gives_the_same_result(small_world: World, policy: str) -> None:
    assert simulate(World(SMALL), policy) == outcome_of(ran(small_world, policy))


def test_another_seed_gives_another_result() -> None:
    assert simulate(World(replace(FEW, seed=2)), "random") != simulate(World(FEW), "random")


def test_all_policies_run_in_the_same_world(small_world: World) -> None:
    simulations = [ran(small_world, policy) for policy in ("own", "stale", "petals", "random")]
    asked = [[session.request for session in simulation.sessions] for simulation in simulations]
    assert all(requests == asked[0] == small_world.requests for requests in asked)
    joined = [[node.device for node in simulation.nodes.values()] for simulation in simulations]
    for devices in joined:  # The end of the last session decides how many devices join.
        assert devices == small_world.devices[: len(devices)]
        assert len(devices) > SMALL.peers
    with pytest.raises(ValueError, match="seed"):
        small_world.with_rules(seed=2)


def test_progress_increases_until_the_end() -> None:
    told: list[float] = []
    simulate(World(FEW), "own", told.append)
    assert told == sorted(told)
    assert all(0 < share <= 1 for share in told)


class Fixed:
    """Fixed routes and placement."""

    through_client = False
    replans = False
    has_coordinates = False
    check_s = 1e9
    announces_joining = False

    def __init__(self, spans: Sequence[tuple[int, int]], hops: Sequence[Hop], predicted_ms: float = 0.0) -> None:
        self._predicted_ms = predicted_ms
        self._spans = list(spans)
        self._hops = list(hops)

    def founders(self, devices: Sequence[SimulatedDevice]) -> list[tuple[int, int]]:
        return self._spans[: len(devices)]

    def join(self, device: SimulatedDevice, place: object, view: object) -> tuple[int, int]:
        raise AssertionError("nobody joins")

    def move(self, node: object, view: object) -> None:
        return None

    def route(self, plan: RouteTask, view: object, rng: random.Random) -> SimulatedPlan:
        if any(hop.peer in plan.exclude for hop in self._hops):
            raise NoRoute([plan.blocks], [])
        return SimulatedPlan(self._hops, self._predicted_ms)


def tiny_world(*requests: tuple[float, int, int], loss: float = 0.0) -> World:
    """Five peers that stay, each with 2 ms per block and token; (at_s, prompt, output) of each request."""
    settings = SimulationSettings(
        peers=5, clients=len(requests), num_blocks=5, hidden=100, uptime=float("inf"), own_use=False, moves=False,
        jitter=0.0, loss=loss, window_bytes=math.inf, sessions_per_peer_hour=len(requests) * 3600 / 5 / 100,
    )  # fmt: skip
    world = World(settings)
    world.devices = [
        replace(device, speed=Speed.of(2.0, 0.01), max_blocks=5, kv_positions=1000) for device in world.devices
    ]
    world.requests = [
        SimulatedRequest(5 + number, at_s, prompt, output) for number, (at_s, prompt, output) in enumerate(requests)
    ]
    return world


def outcome_in(
    world: World, spans: Sequence[tuple[int, int]], hops: Sequence[Hop], *, through_client: bool = False
) -> tuple[Simulation, Outcome]:
    fixed = Fixed(spans, hops)
    fixed.through_client = through_client
    placing: Placing = fixed
    simulation = Simulation(world, fixed, placing)
    for _ in simulation.run():
        pass
    return simulation, outcome_of(simulation)


THREE_HOPS = (Hop("p000000", 0, 2), Hop("p000002", 2, 3), Hop("p000004", 3, 5))
SPANS = ((0, 2), (0, 2), (2, 3), (3, 5), (3, 5))


def test_the_times_of_five_peers_equal_a_calculation_by_hand() -> None:
    world = tiny_world((0.0, 16, 11))
    _, outcome = outcome_in(world, SPANS, THREE_HOPS)
    stations = [5, 0, 2, 4, 5]
    links = [world.geography.link(here, there) for here, there in pairwise(stations)]
    # For n positions, int8 takes 0.24 + 0.0029 n + 103 n / rate ms, and none takes 0.0001 n + 400 n / rate ms. A link
    # uses the codec that is faster for two positions.
    codecs = [(0.24, 0.0029, 103) if link.bytes_per_ms < 2 * 297 / 0.2456 else (0.0, 0.0001, 400) for link in links]

    def sent_ms(positions: int) -> list[float]:
        return [
            once + positions * (each + nbytes / link.bytes_per_ms)
            for link, (once, each, nbytes) in zip(links, codecs, strict=True)
        ]

    wires = sent_ms(1)
    token_ms = sum(link.latency_ms for link in links) + sum(wires) + 5 * 2.0
    assert outcome.token_ms == [pytest.approx(token_ms)]
    prompt = sent_ms(16)[:-1]
    # Each connection takes four round trips: the client connects to each hop, and a hop connects to the next one when
    # it is opened. The answer to `Open` takes one more round trip.
    one_way_ms = world.geography.one_way_ms
    opened_ms = max(
        10 * one_way_ms(5, 0) + 8 * one_way_ms(0, 2),
        10 * one_way_ms(5, 2) + 8 * one_way_ms(2, 4),
        10 * one_way_ms(5, 4),
    )
    first_ms = opened_ms + sum(link.latency_ms for link in links) + sum(prompt) + wires[-1] + 5 * 2.0
    assert outcome.ttft_ms == [pytest.approx(first_ms)]
    assert outcome.hops == [3]
    assert outcome.failed == outcome.repairs == outcome.peer_moves == 0


def test_the_simulated_time_per_token_equals_the_cost_model() -> None:
    world = tiny_world((0.0, 16, 11))
    simulation, outcome = outcome_in(world, SPANS, THREE_HOPS)
    peers = {record.peer.id: record.peer for record in simulation.membership.view.records.values()}
    idle = {name: replace(peer, queue_ms=0.0, batch=0.0) for name, peer in peers.items()}
    network = TrueNetwork(world.geography, world.names_for(5))
    cost = route_ms(THREE_HOPS, idle, network, positions=1, encodings=world.settings.encodings)
    # A link keeps the codec that is faster for two positions; the cost model takes the faster one for one position.
    assert outcome.token_ms == [pytest.approx(cost, rel=0.001)]


def test_a_connection_has_a_slow_start_again_after_silence() -> None:
    link = Link(50.0, 1000.0)  # 100 KB are in flight on this link.
    stream = Stream(10_000.0)
    # 10, 20, 40 and 80 KB are sent in successive round trips of 100 ms; the rest is sent without a wait.
    waits_ms = (100 - 10) + (100 - 20) + (100 - 40) + (100 - 80)
    assert stream.sent(0.0, 200.0, 200_000.0, link) == pytest.approx(200 + waits_ms)
    assert stream.sent(450.0, 200.0, 200_000.0, link) == pytest.approx(200 + waits_ms + 200), "it has come to speed"
    assert stream.sent(2000.0, 5.0, 5_000.0, link) == pytest.approx(2005)
    assert stream.sent(2010.0, 20.0, 20_000.0, link) == pytest.approx(2010 + 20 + 100 - 15)
    assert stream.sent(3000.0, 200.0, 200_000.0, link) == pytest.approx(3000 + 200 + waits_ms)


def test_steps_relayed_through_the_client_stay_in_order() -> None:
    # The second step of each prompt is short and its latency varies, but it never arrives before the first step.
    world = tiny_world(*[(20.0 * number, PASS_POSITIONS + 1 + number % 7, 2) for number in range(12)])
    world.settings = replace(world.settings, jitter=2.0)
    simulation, _ = outcome_in(world, SPANS, THREE_HOPS, through_client=True)
    assert all(session.state == FINISHED for session in simulation.sessions)
    assert not any(session.machine.recoveries for session in simulation.sessions)


@pytest.mark.parametrize("through_client", [False, True])
def test_prompts_share_the_uplink_of_a_peer(through_client: bool) -> None:
    ttft_ms: list[float] = []
    for later_s in (0.0, 40.0):
        world = tiny_world((0.0, 100, 2), (later_s, 100, 2))
        world.geography.up[:] = world.geography.down[:] = 1e6
        world.geography.up[0] = 10.0
        simulation, _ = outcome_in(world, SPANS, THREE_HOPS, through_client=through_client)
        ttft_ms.append(sum(session.first_ms - session.arrived_ms for session in simulation.sessions))
    assert 0.3 * 1030 < ttft_ms[0] - ttft_ms[1] < 1.1 * 1030, "one prompt takes 1030 ms there, and one waits for it"


def test_a_lost_message_costs_time_and_no_token() -> None:
    _, without = outcome_in(tiny_world((0.0, 16, 50)), SPANS, THREE_HOPS)
    _, with_loss = outcome_in(tiny_world((0.0, 16, 50), loss=0.3), SPANS, THREE_HOPS)
    assert with_loss.tokens == without.tokens == 50
    assert with_loss.token_ms[0] > without.token_ms[0]


def test_a_prompt_ends_with_the_last_of_its_steps() -> None:
    # Decode has priority at a hop, but the steps of a session stay in order, so the last positions overtake nothing.
    _, whole = outcome_in(tiny_world((0.0, PASS_POSITIONS, 2)), SPANS, THREE_HOPS)
    _, longer = outcome_in(tiny_world((0.0, PASS_POSITIONS + 4, 2)), SPANS, THREE_HOPS)
    assert longer.ttft_ms[0] > 0.99 * whole.ttft_ms[0]


def through_a_slow_uplink(*prompts: int) -> tuple[Simulation, Outcome]:
    """Prompts that arrive together at a first hop that sends 5 bytes per ms, so that 100 positions take 2 s."""
    world = tiny_world(*((0.0, prompt, 2) for prompt in prompts))
    world.devices = [replace(device, kv_positions=10_000) for device in world.devices]
    world.geography.up[0] = 5.0
    return outcome_in(world, SPANS, THREE_HOPS)


def test_a_prompt_waiting_for_an_uplink_does_not_count_as_lost() -> None:
    _, outcome = through_a_slow_uplink(*[100] * 12)
    assert max(outcome.ttft_ms) > 20_000
    assert (outcome.failed, outcome.repairs) == (0, 0)


def test_the_shortest_prompt_waiting_for_an_uplink_is_sent_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulator.node.UNSENT_BYTES", 1000)
    _, outcome = through_a_slow_uplink(1500, 100)
    assert outcome.ttft_ms[1] < 15_000 < 30_000 < outcome.ttft_ms[0]


class InOrder(Fixed):
    """Takes the first peer that serves the next block and is not excluded."""

    def route(self, plan: RouteTask, view: object, rng: random.Random) -> SimulatedPlan:
        block, end = plan.blocks
        hops: list[Hop] = []
        while block < end:
            serving = [number for number, (start, _) in enumerate(self._spans) if start == block]
            names = [name for name in map(device_id, serving) if name not in plan.exclude]
            if not names:
                raise NoRoute([(block, end)], [])
            hops.append(Hop(names[0], block, self._spans[serving[0]][1]))
            block = hops[-1].end
        return SimulatedPlan(hops)


@pytest.mark.parametrize("crashes", [True, False])
@pytest.mark.parametrize(("lost", "instead"), [(0, 1), (3, 4)])
def test_a_lost_hop_is_replaced_and_its_cache_computed_again(lost: int, instead: int, crashes: bool) -> None:
    world = tiny_world((0.0, 600, 40))
    world.devices[lost] = replace(world.devices[lost], leaves_s=5.0, crashes=crashes)
    routing = InOrder(SPANS, ())
    simulation = Simulation(world, routing, routing)
    for _ in simulation.run():
        pass
    (session,) = simulation.sessions
    assert (session.state, session.tokens) == (FINISHED, 40)
    (recovered,) = session.machine.recoveries
    assert recovered.cause is (Cause.LOST if crashes else Cause.LEAVING)
    names = [node.id for node, _, _ in session.hops]
    assert device_id(instead) in names
    assert device_id(lost) not in names
    # The replacement has computed the whole context.
    assert simulation.nodes[device_id(instead)].busy_ms > 600 * 0.01 * 2
    assert session.machine.phase is Phase.CLOSED
    assert not session.machine.in_flight_count


def test_a_crashed_peer_on_a_running_machine_is_noticed_sooner() -> None:
    ended_ms: list[float] = []
    for resets in (False, True):
        world = tiny_world((0.0, 600, 40))
        world.devices[0] = replace(world.devices[0], leaves_s=5.0, crashes=True, resets=resets)
        routing = InOrder(SPANS, ())
        simulation = Simulation(world, routing, routing)
        for _ in simulation.run():
            pass
        (session,) = simulation.sessions
        assert (session.state, [each.cause for each in session.machine.recoveries]) == (FINISHED, [Cause.LOST])
        ended_ms.append(session.ended_ms)
    assert ended_ms[1] < ended_ms[0] - 1000  # The machine refused the connection at once, so that no timeout passed.


def given_world(speed: Speed, *requests: tuple[float, int, int]) -> World:
    """One peer with 5 blocks, and clients with a latency of 10 ms to it."""
    settings = SimulationSettings(
        peers=1, clients=len(requests), num_blocks=5, hidden=100, moves=False, jitter=0.0, loss=0.0,
        sessions_per_peer_hour=len(requests) * 36,
    )  # fmt: skip
    count = 1 + len(requests)
    accesses = [Access(0.0, 1e6, 1e6)] * count
    geography = MeasuredGeography(np.random.default_rng(0), accesses, np.full((count, count), 20.0))
    device = SimulatedDevice(0, device_id(0), KINDS[0], speed, 5, 10_000, 0.0, float("inf"), crashes=False)
    asked = [
        SimulatedRequest(1 + number, at_s, prompt, output) for number, (at_s, prompt, output) in enumerate(requests)
    ]
    return World.from_devices(settings, geography, [device], asked)


def test_a_world_may_be_built_from_given_devices_and_requests() -> None:
    _, outcome = outcome_in(given_world(Speed.of(2.0, 0.01), (0.0, 10, 21)), [(0, 5)], [Hop(device_id(0), 0, 5)])
    assert outcome.token_ms == [pytest.approx(2 * 10 + 5 * 2, rel=0.01)]
    # Connecting takes four round trips and opening takes one; then the prompt is sent.
    assert outcome.ttft_ms == [pytest.approx(5 * 20 + 20 + 5 * 2, rel=0.01)]


def test_a_table_of_measured_latencies_replaces_random_ones(tmp_path: Path) -> None:
    table = tmp_path / "rtt"
    table.write_text("0 10 0\n14 0 30\n-1 20 0\n")  # The round trip between the first and the third node is missing.
    rtt_ms = read_latencies(table)
    assert rtt_ms.tolist() == [[0, 12, 37], [12, 0, 25], [37, 25, 0]]
    world = World(replace(FEW, latencies=table))
    geography, count = world.geography, len(world.devices)
    everyone = np.arange(count)
    assert geography.latencies(everyone, everyone) == pytest.approx(
        np.array([[geography.one_way_ms(here, there) for there in range(count)] for here in range(count)])
    )
    delays = geography.delay[0] + geography.delay
    ways = {round(2 * (geography.one_way_ms(0, other) - delays[other])) for other in range(count)}
    assert ways in ({0, 12, 37}, {0, 12, 25}, {0, 25, 37})
    assert simulate(world, "own").tokens > 0


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1 2\n", "1 lines, one of them with 2 numbers"),
        ("0 x\n1 0\n", "table"),
        ("0 nan\n1 0\n", "no number"),
        ("0 1 2\n1 0 2\n2 1\n", "3 lines, one of them with 2 numbers"),
        ("0 0\n0 0\n", "nodes 1 and 2"),
        ("5\n", "1 lines"),
        ("# a remark\n", "empty"),
    ],
)
def test_a_malformed_table_of_latencies_is_refused(tmp_path: Path, text: str, error: str) -> None:
    table = tmp_path / "rtt"
    table.write_text(text)
    with pytest.raises(SplitnetError, match=error):
        read_latencies(table)
    with pytest.raises(SplitnetError, match="no square table"):
        read_latencies(tmp_path / "missing")


@pytest.mark.parametrize(("pause_s", "trips"), [(50.0, 1), (70.0, 5)])
def test_connections_stay_open_for_a_minute(pause_s: float, trips: int) -> None:
    world = given_world(Speed.of(2.0, 0.01), (0.0, 10, 21), (1.0 + pause_s, 10, 21))
    world.requests[1] = replace(world.requests[1], number=world.requests[0].number)
    _, outcome = outcome_in(world, [(0, 5)], [Hop(device_id(0), 0, 5)])
    assert outcome.ttft_ms[1] == pytest.approx(trips * 20 + 20 + 5 * 2, rel=0.01)


def test_peers_wait_a_tenth_of_a_pass_for_other_sessions() -> None:
    alone, both = (
        outcome_in(given_world(Speed.of(2.0, 0.01), *requests), [(0, 5)], [Hop(device_id(0), 0, 5)])[1].token_ms[0]
        for requests in ([(0.0, 4, 41)], [(0.0, 4, 41), (0.015, 4, 41)])
    )
    assert both == pytest.approx(alone + 0.1 * 10, rel=0.01)


def test_tokens_of_a_client_do_not_wait_for_the_whole_prompt_of_another() -> None:
    speed = Speed.of(2.0, 1.0)  # 64 positions take 320 ms.
    alone, both = (
        outcome_in(given_world(speed, *requests), [(0, 5)], [Hop(device_id(0), 0, 5)])[1].token_ms[0]
        for requests in ([(0.0, 4, 21)], [(0.0, 4, 21), (0.3, 400, 2)])
    )
    assert alone == pytest.approx(30, rel=0.01)
    assert both < alone + 80


def test_sessions_without_kv_memory_fail() -> None:
    simulation, outcome = outcome_in(tiny_world((0.0, 700, 300), (0.0, 700, 300)), SPANS, THREE_HOPS)
    assert outcome.failed == 1
    assert [session.state for session in simulation.sessions] == [FINISHED, FAILED]


def test_a_session_without_an_end_counts_as_failed() -> None:
    world = tiny_world((0.0, 16, 500))
    world.geography.delay[:] = 5000.0
    world.geography._delay = [5000.0] * 6  # pyright: ignore[reportPrivateUsage]
    simulation, outcome = outcome_in(world, SPANS, THREE_HOPS)
    assert outcome.failed == 1
    assert simulation.sessions[0].state != RUNNING
    assert all(node.kv_used == 0 for node in simulation.nodes.values())


def test_a_session_learns_the_error_of_its_predictions() -> None:
    world = tiny_world((0.0, 16, 30))
    simulation, outcome = outcome_in(world, SPANS, THREE_HOPS)
    predictions = simulation.sessions[0].predictions
    predictions.add_ratio("another route", 5.0)
    assert predictions.error == 1.0  # No prediction was given.
    fixed = Fixed(SPANS, THREE_HOPS, predicted_ms=outcome.token_ms[0] / 3)
    doubting = Simulation(world, fixed, fixed)
    for _ in doubting.run():
        pass
    predictions = doubting.sessions[0].predictions
    predictions.add_ratio("another route", 5.0)
    assert predictions.error == pytest.approx(3.0)
    assert outcome_of(doubting).predicted == [pytest.approx(1 / 3)]


def test_events_run_in_order_of_time_and_then_of_planning() -> None:
    events, seen = Events(), list[str]()
    for ms, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (9.0, "late")):
        events.schedule(ms, seen.append, name)
    while events.next_before(5.0):
        pass
    assert seen == ["a", "b", "c"]
    assert events.now == 2.0


def test_the_gini_coefficient_of_utilisations() -> None:
    def gini(*busy: float) -> float:
        return replace(EMPTY, utilisation=busy).gini

    assert gini(0.3, 0.3, 0.3, 0.3) == pytest.approx(0.0)
    assert gini(0.0, 0.0, 0.0, 0.8) == pytest.approx(0.75)
    assert gini(0.1, 0.3) == pytest.approx(0.25)
    assert gini() == gini(0.0, 0.0) == 0.0


EMPTY = Outcome(0, 0, [], [], [], [], [], 0, 1.0, 0, 0, 0, 0)


def test_worlds_are_pooled_by_their_sessions() -> None:
    one = replace(EMPTY, sessions=1, ttft_ms=[1.0], tokens=10, time_s=5.0, record_bytes=7)
    other = replace(EMPTY, sessions=3, failed=2, ttft_ms=[2.0, 3.0], tokens=10, time_s=15.0, record_bytes=9)
    both = pooled([one, other])
    assert (both.sessions, both.failed, both.ttft_ms, both.record_bytes) == (4, 2, [1.0, 2.0, 3.0], 9)
    assert both.goodput == 1.0


def test_policies_are_compared_world_by_world() -> None:
    def tokens(*counts: int) -> list[Outcome]:
        return [replace(EMPTY, tokens=count) for count in counts]

    mean, low, high = differences(tokens(20, 200), tokens(10, 100), "goodput_tokens_per_s")
    assert (mean, low, high) == pytest.approx((1.0, 1.0, 1.0))
    mean, low, high = differences(tokens(10, 40), tokens(10, 10), "goodput_tokens_per_s")
    assert mean == pytest.approx(1.0)
    assert low < 0 < high
    assert np.isnan(differences(tokens(0), tokens(5), "goodput_tokens_per_s")[0])


def test_all_requests_of_a_burst_arrive_within_a_second() -> None:
    arrivals = [request.at_s for request in World(replace(SMALL, burst=True)).requests]
    assert arrivals == sorted(arrivals)
    assert 0 < arrivals[-1] - arrivals[0] <= 1.0


def test_all_peers_of_a_region_fail_at_half_time(small_world: World) -> None:
    settings = replace(SMALL, dark=True)
    world, at_s = World(settings), settings.duration_s / 2
    assert world.requests == small_world.requests
    for device, before in zip(world.devices, small_world.devices, strict=True):
        if world.geography.is_european(device.number) and device.joins_s < at_s < before.leaves_s:
            assert device.leaves_s == at_s and device.crashes
        else:
            assert device == before
    assert world.devices != small_world.devices


def test_coordinates_converge(small_world: World) -> None:
    plane = Geography(np.random.default_rng(3), [Access(1.0, 1000.0, 1000.0) for _ in range(60)])
    plane.factor[:], plane.detour[:] = 2.0, 0.0
    plane._factor, plane._detour = plane.factor.tolist(), plane.detour.tolist()  # pyright: ignore[reportPrivateUsage]
    rng = np.random.default_rng(4)
    places = [Coordinate()] * 60

    def errors() -> list[float]:
        pairs = [(here, there) for here in range(60) for there in range(here)]
        true = [2 * plane.one_way_ms(*pair) for pair in pairs]
        return [abs(places[i].rtt_ms(places[j]) - ms) / ms for (i, j), ms in zip(pairs, true, strict=True)]

    before = float(np.median(errors()))
    for _ in range(150):
        for number in range(60):
            other = int((number + rng.integers(1, 60)) % 60)
            places[number] = measured_to(rng, plane, number, places[number], other, places[other])
    assert before > 0.9
    assert float(np.median(errors())) < 0.12  # Every round trip is measured up to 10 % too long.
    assert coordinate_error(small_world).median < 0.5


def test_plan_qualities_are_relative_to_the_best_route(small_world: World) -> None:
    ticks = iter(range(10_000))
    qualities = list(plan_qualities(small_world, 8, lambda: float(next(ticks))))
    assert all(excess >= -1e-9 for quality in qualities for excess in quality.excess)
    by_name = {quality.name: float(np.mean(quality.excess)) for quality in qualities}
    assert by_name["all links known, of 300 candidates"] == pytest.approx(0.0)
    assert by_name["coordinates and measured links, of all peers"] < by_name["random route"]
    assert {quality.plan_ms for quality in qualities} == {1000.0}


def test_candidates_of_a_large_swarm_cost_little() -> None:
    world = World(replace(SMALL, peers=300, clients=5, uptime=1.0))
    simulation = ran(world, "no-replan")
    view = simulation.membership.view
    encodings, blocks = world.settings.encodings, (0, SMALL.num_blocks)
    excess: list[float] = []
    for session in simulation.sessions:
        known = view.network_places
        network = Network(known.measured, known.unmeasured, {**known.places, CLIENT: session.client.place})
        index, outside = CandidateIndex(view.peers, network), [session.client.place] * 2
        chosen = index.near(outside, blocks, encodings=encodings, kv_needed=500, limit=60)
        assert len(chosen) == 60
        found = best_route(chosen, blocks, network, encodings=encodings, kv_needed=500)
        best = best_route(view.peers, blocks, network, encodings=encodings, kv_needed=500)
        assert found.cost_ms >= best.cost_ms - 1e-9
        excess.append(found.cost_ms / best.cost_ms - 1)
    assert float(np.mean(excess)) < 0.05


def test_candidates_keep_every_block_served(small_world: World) -> None:
    view = ran(small_world, "own").membership.view
    index, blocks = CandidateIndex(view.peers, view.network_places), (0, SMALL.num_blocks)
    chosen = index.near([], blocks, encodings=SMALL.encodings, kv_needed=10**9, limit=1)
    served = {block for peer in chosen for block in range(peer.start, peer.end)}
    assert served == {block for peer in view.peers for block in range(peer.start, peer.end)}
    assert len(chosen) == SMALL.num_blocks


def test_a_chart_shows_every_policy(small_world: World) -> None:
    outcomes = {policy: outcome_of(ran(small_world, policy)) for policy in ("own", "random")}
    drawn = ElementTree.fromstring(
        chart({name: outcome.figures() for name, outcome in {**outcomes, "petals": EMPTY}.items()}, "40 peers & more")
    )
    texts = ["".join(text.itertext()) for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"40 peers & more", *(POLICIES[name].label for name in ("own", "random", "petals"))} < set(texts)
    p50_s = np.median(outcomes["own"].ttft_ms) / 1000
    assert any(text.startswith(f"{p50_s:.3g} | ") for text in texts)
    assert texts.count("nobody got one") == 2


def test_groups_of_policies_name_existing_ones() -> None:
    assert {*AGAINST, *BASELINES, *ABLATIONS} <= POLICIES.keys()
    assert sum(kind.share for kind in KINDS) == pytest.approx(1.0)
