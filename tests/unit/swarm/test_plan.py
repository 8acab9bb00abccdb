"""Routes for a client's sessions."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.cost import Encoding
from scheduler.facts import Link
from scheduler.replan import DISAPPOINTING, RECENT_STEPS, PredictionErrors
from splitnet.directory.record import PeerRecord
from splitnet.errors import CoverageError, OtherWeights, SplitnetError
from splitnet.security.identity import Identity
from splitnet.session.driver import Routes
from splitnet.session.events import AskRoute, MoveRoute, RouteFailed, RoutePlanned
from splitnet.session.options import ConnectionOptions
from splitnet.swarm import plan as planner_module
from splitnet.swarm.measure import STEPS, Measurements
from splitnet.swarm.plan import CLIENT_ENDS, HeldBlocks, Needs, PlannedHop, Planner
from tests.unit.swarm.test_swarm import RECORD

SLOW = tuple(1000 * ms for ms in RECORD.block_ms)
NEEDS = Needs(kv_positions=10, encodings=(Encoding("int8", 66),), blocks=(0, 6))


def record(start: int, end: int, **facts: Any) -> PeerRecord:
    return replace(RECORD, key=Identity.generate().public, start=start, end=end, **facts)


def plan(records: list[PeerRecord], needs: Needs = NEEDS, measurements: Measurements | None = None) -> list[PeerRecord]:
    planner = Planner(measurements or Measurements(), "a-model")
    route = planner.plan_route(records, needs, (0, 6), neighbours=CLIENT_ENDS, holders=(), restricted=False)
    return [hop.record for hop in route]


def test_a_long_prompt_takes_the_route_with_the_fastest_prefill() -> None:
    # The first peer is slightly faster per token, the second ten times faster for many positions.
    decodes = record(0, 6, block_ms=(10.0, 11.0, 40.0, 160.0, 640.0))
    prefills = record(0, 6, block_ms=(12.0, 12.0, 12.5, 16.0, 64.0))
    measurements = Measurements()
    for peer in (decodes, prefills):
        measurements.network_coordinates.measured(peer, Link(1.0, 10_000.0))
    assert plan([decodes, prefills], measurements=measurements) == [decodes]
    long = replace(NEEDS, prompt=500)
    assert plan([decodes, prefills], long, measurements) == [prefills]


def test_a_long_context_takes_the_route_that_reads_contexts_fastest() -> None:
    decodes = record(0, 6, block_ms=(10.0,) * 5, past_ms=((1.0, 9.0), (8.0, 70.0)))
    reads = record(0, 6, block_ms=(12.0,) * 5, past_ms=((0.1, 1.0), (0.8, 7.0)))
    measurements = Measurements()
    for peer in (decodes, reads):
        measurements.network_coordinates.measured(peer, Link(1.0, 10_000.0))
    assert plan([decodes, reads], replace(NEEDS, context=1024), measurements) == [decodes]
    assert plan([decodes, reads], replace(NEEDS, context=16384), measurements) == [reads]
    planner = Planner(measurements, "a-model")
    step_ms = [
        planner.predictions(replace(NEEDS, context=context), [PlannedHop(decodes, 0, 6)])(1).latency_ms
        for context in (0, 8192)
    ]
    assert step_ms[1] - step_ms[0] == pytest.approx(6 * 8.0)


def held(*blocks: tuple[int, int, str]) -> Needs:
    return replace(NEEDS, held=tuple(HeldBlocks(*each) for each in blocks))


@pytest.mark.parametrize("crowd", [planner_module.EXACT_PEERS, 1])
def test_a_route_holds_blocks_in_the_required_weight_format(monkeypatch: pytest.MonkeyPatch, crowd: int) -> None:
    monkeypatch.setattr(planner_module, "EXACT_PEERS", crowd)
    exact, fast, half = record(0, 6, block_ms=SLOW), record(0, 6, dtype="int4"), record(0, 2, dtype="float16/float32")
    everybody = [exact, fast, half]
    assert plan(everybody) == [fast]
    assert plan(everybody, held((0, 6, "float32"))) == [exact]
    assert plan(everybody, held((0, 2, "float32"), (2, 6, "int4"))) == [exact, fast], "as far as they hold them so"
    assert plan(everybody, held((0, 2, "float16/float32"))) == [half, fast], "of the others nothing was said"


def test_the_error_for_a_missing_weight_format_names_the_formats_present() -> None:
    others = [record(0, 6, dtype="int4"), record(2, 6, dtype="int8/float32"), record(0, 2)]
    with pytest.raises(OtherWeights) as raised:
        plan(others, held((0, 6, "float32")))
    assert "blocks 2..5 of a-model are held as int4 or int8/float32 by all peers that serve them" in str(raised.value)
    assert "were held as float32 in this session" in str(raised.value) and "--any-weights" in str(raised.value)
    with pytest.raises(CoverageError, match="served by nobody"):
        plan(others[2:], held((0, 6, "float32")))


@pytest.mark.parametrize("crowd", [planner_module.EXACT_PEERS, 1])
def test_peers_with_coarser_keys_and_values_than_asked_for_are_not_used(
    monkeypatch: pytest.MonkeyPatch, crowd: int
) -> None:
    monkeypatch.setattr(planner_module, "EXACT_PEERS", crowd)
    exact, eight, four = record(0, 6, block_ms=SLOW), record(0, 3, kv="int8"), record(3, 6, kv="int4")
    everybody = [exact, eight, four, record(0, 6, kv="unknown")]
    assert plan(everybody) == [eight, four]
    assert plan(everybody, replace(NEEDS, kv_at_least="int8")) == [eight, exact]
    assert plan(everybody, replace(NEEDS, kv_at_least="float16")) == [exact]
    with pytest.raises(CoverageError, match=r"3\.\.5 .* held as int4 only.*--kv int8.*--kv-at-least int4"):
        plan([eight, four], replace(NEEDS, kv_at_least="int8"))
    with pytest.raises(CoverageError, match="served by nobody"):
        plan([eight], replace(NEEDS, kv_at_least="int8"))


def test_the_energy_of_a_route_uses_measured_times_of_its_hops() -> None:
    told, silent = record(0, 2, watts=15.0), record(2, 6)
    measurements = Measurements()
    planner = Planner(measurements, "a-model")
    hops = [PlannedHop(told, 0, 2), PlannedHop(silent, 2, 6)]
    assert planner.token_joules(hops) == [pytest.approx(2 * 0.001 * 15.0), None]
    for _ in range(STEPS):
        measurements.hop_seen(told.key.text, 1, 4.0, 0.0)  # The hop takes four times as long as it publishes.
    assert planner.token_joules(hops) == [pytest.approx(2 * 0.004 * 15.0), None]


def test_a_claim_of_low_energy_attracts_no_slow_route() -> None:
    honest = record(0, 6, watts=100.0)
    liars = [record(0, 6, watts=1e-300, block_ms=tuple(2 * ms for ms in RECORD.block_ms)) for _ in range(5)]
    measurements = Measurements()
    for peer in (honest, *liars):
        measurements.network_coordinates.measured(peer, Link(0.1, 10_000.0))
    assert plan([honest, *liars], replace(NEEDS, energy_slowdown=1.5), measurements) == [honest]
    assert plan([honest, *liars], replace(NEEDS, energy_slowdown=3.0), measurements)[0] in liars


def test_among_very_many_peers_routes_use_the_likely_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "EXACT_PEERS", 50)
    choices = random.Random(1)
    records = [
        record(start, start + 3, coordinate=(choices.gauss(0, 40), 0.0, 0.0, 5.0), coordinate_error=0.2, block_ms=SLOW)
        for start in (0, 3)
        for _ in range(500)
    ]
    fast = [replace(peer, block_ms=RECORD.block_ms) for peer in (records[7], records[707])]
    records[7], records[707] = fast
    assert plan(records) == fast


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefer": "speed"}, "prefers latency, throughput or energy, not 'speed'"),
        ({"energy_slowdown": 2.0}, "needs the preference energy, not latency"),
        ({"prefer": "energy", "energy_slowdown": 0.9}, "slowdown is a number from 1, not 0.9"),
        ({"prefer": "energy", "energy_slowdown": float("nan")}, "slowdown is a number from 1, not nan"),
        ({"prefer": "energy", "energy_slowdown": "2"}, "slowdown is a number from 1, not .2."),
        ({"prefer": "energy", "energy_slowdown": True}, "slowdown is a number from 1, not True"),
    ],
)
def test_invalid_preferences_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SplitnetError, match=said):
        ConnectionOptions.of(options)


class Facts:
    """A swarm with given costs of routes, where `best` is the best route."""

    def __init__(self, best: list[PlannedHop]) -> None:
        self.best = best
        self.costs: dict[str, float] = {}
        """Ms per step of the route with this first hop; 10 if missing."""
        self.planned = 0
        self.holds = {"float32"}
        """Weight formats that peers hold."""
        self.wished: list[tuple[HeldBlocks, ...]] = []
        self.was_covered = True
        self.peers = list[PeerRecord]
        self.probed: list[bool] = []
        self.measurer = SimpleNamespace(news=0, look_again=lambda suspects, probe: self.probed.append(probe))
        self.measurements = SimpleNamespace(prediction_error=1.0, add_prediction=lambda *_: None, silent_peers=set)
        self.planner = SimpleNamespace(
            cost_ms=lambda needs, hops: self.costs.get(hops[0].name, 10.0), move_ms=lambda *_: 0.0
        )

    def plan_route(self, needs: Needs, **_: Any) -> list[PlannedHop]:
        self.planned += 1
        self.wished.append(needs.held)
        if any(blocks.weights not in self.holds for blocks in needs.held):
            raise OtherWeights("others")
        return self.best

    def routes(self, *, any_weights: bool = False) -> Routes:
        codecs: Any = SimpleNamespace(along=lambda route: ())
        return Routes(self, codecs, (0, 6), any_weights=any_weights)  # pyright: ignore[reportArgumentType]

    def look(self, routes: Routes, hops: list[PlannedHop], news: int = 1, needs: Needs = NEEDS) -> MoveRoute | None:
        """Asks for a better route after some time, with `news` new facts."""
        self.measurer.news += news
        routes.watch._looked_s = 0.0
        return routes.better_route(hops, lambda: needs, 10, 100)


def steps(routes: Routes, step_ms: float) -> None:
    for _ in range(RECENT_STEPS):
        routes.step_took(step_ms, 1)


def test_while_a_route_is_as_fast_as_predicted_no_other_is_planned() -> None:
    hops = [PlannedHop(record(0, 6), 0, 6)]
    facts = Facts(hops)
    routes = facts.routes()
    facts.look(routes, hops)
    for step_ms in (10.0, 10.0 * DISAPPOINTING - 0.1):
        steps(routes, step_ms)
        assert facts.look(routes, hops) is None and not facts.planned
    steps(routes, 10.0 * DISAPPOINTING + 0.1)
    assert routes.watch.surprised, "which is a reason to look before there is news"
    assert facts.look(routes, hops) is None and not facts.planned
    assert facts.probed == [True], "no fact says why the last steps are slow"
    assert facts.look(routes, hops) is None and facts.planned == 1


@pytest.mark.parametrize("any_weights", [False, True])
def test_other_weights_are_used_only_if_allowed_and_the_same_are_missing(any_weights: bool) -> None:
    hops = [PlannedHop(record(0, 6), 0, 6)]
    facts = Facts(hops)
    routes = facts.routes(any_weights=any_weights)
    asked = AskRoute(1, (), frozenset(), fresh=False, unban=False)
    needs = held((0, 6, "float32"))
    assert isinstance(routes.answer_query(asked, needs), RoutePlanned) and facts.wished == [needs.held]
    facts.holds = {"int4"}
    answer = routes.answer_query(asked, needs)
    assert isinstance(answer, RoutePlanned) if any_weights else isinstance(answer, RouteFailed)
    assert not isinstance(answer, RouteFailed) or isinstance(answer.error, OtherWeights)


def test_a_re_plan_never_changes_the_weight_format() -> None:
    hops = [PlannedHop(record(0, 6), 0, 6)]
    facts = Facts([PlannedHop(record(0, 6), 0, 6)])
    facts.costs = {hops[0].name: 100.0}
    routes = facts.routes()
    needs = held((0, 6, "float32"))
    facts.look(routes, hops, needs=needs)
    steps(routes, 1000.0)
    facts.look(routes, hops, needs=needs)
    facts.look(routes, hops, needs=needs)
    assert set(facts.wished) == {needs.held}


def test_a_route_is_compared_with_its_prediction_at_planning_time() -> None:
    """New facts may show before the first step that the route has become slow."""
    hops = [PlannedHop(record(0, 6), 0, 6)]
    facts = Facts(hops)
    routes = facts.routes()
    routes.answer_query(AskRoute(1, (), frozenset(), fresh=False, unban=False), NEEDS)
    facts.costs = {hops[0].name: 30.0}
    routes.better_route(hops, lambda: NEEDS, 10, 100)
    assert routes.watch.expected_ms == 10.0


def test_an_unexplained_slow_route_is_left_only_for_a_route_without_common_links() -> None:
    first, twin, middle, last, other = (record(*span) for span in ((0, 2), (0, 2), (2, 4), (4, 6), (4, 6)))

    def route(*records: PeerRecord) -> list[PlannedHop]:
        return [PlannedHop(each, each.start, each.end) for each in records]

    hops, shares, avoids = route(first, middle, last), route(twin, middle, last), route(twin, middle, other)
    for explained, best in ((False, shares), (True, shares), (False, avoids)):
        facts = Facts(best)
        routes = facts.routes()
        facts.look(routes, hops)
        steps(routes, 20.0)
        facts.look(routes, hops)
        facts.costs = {first.key.text: 20.0} if explained else {}
        move = facts.look(routes, hops)
        assert facts.planned
        assert (move is not None) == (explained or best == avoids)


def test_an_unexplained_slow_route_is_checked_until_explained() -> None:
    hops, other = ([PlannedHop(record(0, 6), 0, 6)] for _ in range(2))
    facts = Facts(hops)
    routes = facts.routes()
    facts.look(routes, hops)
    steps(routes, 20.0)
    facts.look(routes, hops)
    facts.best = other
    for cost_ms, moves in ((10.0, False), (20.0, True)):
        facts.costs = {hops[0].name: cost_ms}
        assert (facts.look(routes, hops, news=0) is not None) == moves


def test_a_session_stops_changing_routes_after_few_moves() -> None:
    """This happens when all devices are on one machine, and steps are so slow that a session takes only few steps on a
    route."""
    hops, other = ([PlannedHop(record(0, 6), 0, 6)] for _ in range(2))
    facts = Facts(other)
    predictions = PredictionErrors()
    facts.measurements.add_prediction = predictions.add_ratio
    routes = facts.routes()
    moves = 0
    for _ in range(40):
        facts.look(routes, hops)
        steps(routes, 100.0)
        facts.measurements.prediction_error = predictions.error
        facts.best = other
        if facts.look(routes, hops) is not None:
            moves += 1
            hops, other = other, hops
    assert moves <= 3


def test_a_replacement_route_is_left_only_for_one_as_fast_as_the_lost_route() -> None:
    good, slow, middling, again = ([PlannedHop(record(0, 6), 0, 6)] for _ in range(4))
    facts = Facts(good)
    facts.costs = {slow[0].name: 40.0, middling[0].name: 22.0}
    routes = facts.routes()
    routes.answer_query(AskRoute(1, (), frozenset(), fresh=False, unban=False), NEEDS)
    facts.look(routes, good)
    steps(routes, 14.0)  # For the lost route, the measured time of a step counts if it exceeds the predicted time.
    facts.costs[again[0].name] = 18.0
    facts.best = slow
    routes.answer_query(AskRoute(2, (), frozenset(), fresh=True, unban=False), NEEDS)
    facts.look(routes, slow)
    steps(routes, 40.0)
    for best, moves in ((slow, False), (middling, False), (again, True)):
        facts.best = best
        move = facts.look(routes, slow)
        assert (move is not None) == moves, "a route that is as slow as it was to be expected is left for no other"
    assert list(move.route if move else ()) == again
    facts.look(routes, again)
    steps(routes, 18.0)
    before, facts.costs[again[0].name] = facts.planned, 20.0
    assert facts.look(routes, again) is None and facts.planned == before, "it has come to rest"
