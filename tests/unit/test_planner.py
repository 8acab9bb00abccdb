"""Routes for a client's sessions."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.encoding import Encoding
from scheduler.network import Link
from scheduler.replan import DISAPPOINTING, RECENT_STEPS
from splitnet.client import planner as planner_module
from splitnet.client.options import CausalOptions
from splitnet.client.planner import CLIENT_ENDS, Needs, PlannedHop, Planner
from splitnet.client.routes import Routes
from splitnet.client.survey import STEPS, Survey
from splitnet.errors import SplitnetError
from splitnet.net.identity import Identity
from splitnet.net.records import PeerRecord
from tests.unit.test_client_swarm import RECORD

SLOW = tuple(1000 * ms for ms in RECORD.block_ms)
NEEDS = Needs(kv_positions=10, encodings=(Encoding("int8", 66),), blocks=(0, 6))


def record(start: int, end: int, **facts: Any) -> PeerRecord:
    return replace(RECORD, key=Identity.generate().public, start=start, end=end, **facts)


def plan(records: list[PeerRecord], needs: Needs = NEEDS, survey: Survey | None = None) -> list[PeerRecord]:
    planner = Planner(survey or Survey(), "a-model")
    route = planner.plan(records, needs, (0, 6), ends=CLIENT_ENDS, holders=(), restricted=False)
    return [hop.record for hop in route]


def test_a_long_prompt_takes_the_route_that_is_good_at_prompts() -> None:
    # The one is a little faster per token, the other ten times faster at many positions.
    decodes = record(0, 6, block_ms=(10.0, 11.0, 40.0, 160.0, 640.0))
    prefills = record(0, 6, block_ms=(12.0, 12.0, 12.5, 16.0, 64.0))
    survey = Survey()
    for peer in (decodes, prefills):
        survey.network_coordinates.measured(peer, Link(1.0, 10_000.0))
    assert plan([decodes, prefills], survey=survey) == [decodes]
    long = replace(NEEDS, prompt=500)
    assert plan([decodes, prefills], long, survey) == [prefills]


def test_energy_of_a_route_is_that_of_its_hops_as_they_are_seen() -> None:
    told, silent = record(0, 2, watts=15.0), record(2, 6)
    survey = Survey()
    planner = Planner(survey, "a-model")
    hops = [PlannedHop(told, 0, 2), PlannedHop(silent, 2, 6)]
    assert planner.token_joules(hops) == [pytest.approx(2 * 0.001 * 15.0), None]
    for _ in range(STEPS):
        survey.hop_seen(told.key.text, 1, 4.0, 0.0)  # it takes four times as long as it says
    assert planner.token_joules(hops) == [pytest.approx(2 * 0.004 * 15.0), None]


def test_a_claim_of_little_energy_draws_no_route_that_is_too_slow() -> None:
    honest = record(0, 6, watts=100.0)
    liars = [record(0, 6, watts=1e-300, block_ms=tuple(2 * ms for ms in RECORD.block_ms)) for _ in range(5)]
    survey = Survey()
    for peer in (honest, *liars):
        survey.network_coordinates.measured(peer, Link(0.1, 10_000.0))
    assert plan([honest, *liars], replace(NEEDS, energy_slowdown=1.5), survey) == [honest]
    assert plan([honest, *liars], replace(NEEDS, energy_slowdown=3.0), survey)[0] in liars


def test_among_very_many_peers_the_likeliest_are_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
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
        ({"energy_slowdown": 2.0}, "goes with the preference energy, not with latency"),
        ({"prefer": "energy", "energy_slowdown": 0.9}, "slowdown of 0.9 is none: give 1 or more"),
        ({"prefer": "energy", "energy_slowdown": float("nan")}, "give 1 or more"),
    ],
)
def test_what_cannot_be_preferred_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SplitnetError, match=said):
        CausalOptions.of(options)


def test_while_a_route_is_as_fast_as_predicted_no_other_is_planned() -> None:
    planned: list[Needs] = []
    probed: list[bool] = []
    known: Any = SimpleNamespace(
        fresh_facts=SimpleNamespace(news=0, look_again=lambda suspects, probe: probed.append(probe)),
        survey=SimpleNamespace(prediction_error=1.0, forecast_came=lambda _: None),
        planner=SimpleNamespace(cost_ms=lambda needs, hops: 10.0, move_ms=lambda *_: 0.0),
        plan=lambda needs, holders: planned.append(needs) or list(hops),
    )
    codecs: Any = None
    hops, routes = [PlannedHop(record(0, 6), 0, 6)], Routes(known, codecs, (0, 6))
    for news, step_ms, count in ((1, 10.0, 0), (2, 10.0 * DISAPPOINTING - 0.1, 0), (3, 10.0 * DISAPPOINTING + 0.1, 1)):
        known.fresh_facts.news, routes._looked_at = news, 0.0
        routes.better(hops, lambda: NEEDS, 10, 0)
        for _ in range(RECENT_STEPS):
            routes.step_took(step_ms, 1)
        known.fresh_facts.news, routes._looked_at = 10 * news, 0.0
        assert routes.better(hops, lambda: NEEDS, 10, 100) is None
        assert len(planned) == count
    assert probed == [True], "no fact says why the last steps are slow"
