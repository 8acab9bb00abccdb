"""`splitnet bench`: its measurements, figures and tables, without a model."""

from __future__ import annotations

import json
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import ContextTooLong, PeerLost, SplitnetError
from splitnet.session.inference import LinkUse
from splitnet.tools.bench.backends import StartGate, run_together
from splitnet.tools.bench.report import (
    LOCAL,
    SWARM,
    Case,
    Measured,
    MeasuredTraffic,
    Report,
    ReportedHop,
    ReportedRoute,
    Round,
    Spread,
    TokenTimes,
    cases_of,
    check_room,
    drawn,
    figures_of,
    measure,
    number,
    turns,
    with_range,
)

SECONDS = st.floats(1e-6, 1e3)
PREFILL = Case(100)
DECODE = Case(2, decodes=True, context=7, clients=2)
ROUTE = ReportedRoute(
    (
        ReportedHop(0, 2, "sn1a", "tcp://a:1", "cpu", "float32"),
        ReportedHop(2, 6, "sn1b", "tcp://b:1", "cpu", "float32"),
    ),
    (
        LinkUse("client", "blocks 0..1", "none", 2402),
        LinkUse("blocks 0..1 via client", "blocks 2..5", "int8", 700),
        LinkUse("blocks 2..5", "client", "int8", 720),
    ),
)


def traffic(case: Case, route: ReportedRoute = ROUTE, repairs: int = 0, joules: float | None = None) -> MeasuredTraffic:
    return MeasuredTraffic(40 * case.tokens, 60 * case.tokens, case.positions, repairs, route, joules)


def test_prefill_cases_come_first_and_zero_omits_a_case() -> None:
    assert cases_of([0, 8], 0, [0], [1]) == [Case(8)]
    assert cases_of([0], 4, [0, 9], [1, 2]) == [Case(4, True, c, n) for c in (0, 9) for n in (1, 2)]
    assert cases_of([8, 8], 4, [0], [1, 1]) == [Case(8), Case(4, True)]
    assert cases_of([0], 0, [0], [1]) == []


@given(tokens=st.integers(1, 50), context=st.integers(0, 50), decodes=st.booleans())
def test_a_case_needs_exactly_its_own_number_of_positions(tokens: int, context: int, decodes: bool) -> None:
    case = Case(tokens, decodes, context if decodes else 0)
    # All tokens of a prompt are fed, and all but the last token of an answer.
    assert case.positions == case.prompt + case.new_tokens - 1 >= tokens
    check_room([case], case.positions)
    check_room([case], None)
    with pytest.raises(ContextTooLong, match=f"model's context of {case.positions - 1}: lower --"):
        check_room([case], case.positions - 1)


@given(
    cases=st.lists(st.builds(Case, st.integers(1, 5)), min_size=1, max_size=4, unique=True),
    arms=st.lists(st.text(max_size=2), min_size=1, max_size=3, unique=True),
    rounds=st.integers(1, 5),
    warm_up=st.integers(0, 2),
)
def test_arms_alternate(cases: list[Case], arms: list[str], rounds: int, warm_up: int) -> None:
    order = list(turns(cases, arms, rounds, warm_up))
    assert [number for number, _, _ in order] == sorted(number for number, _, _ in order)
    counted = Counter((case, arm) for number, case, arm in order if number > 0)
    assert counted == {(case, arm): rounds for case in cases for arm in arms}
    assert len(order) == (rounds + warm_up) * len(cases) * len(arms)
    # The arms of a case follow each other directly.
    for begin in range(0, len(order), len(arms)):
        of_one = order[begin : begin + len(arms)]
        assert len({(number, case) for number, case, _ in of_one}) == 1
        assert [arm for _, _, arm in of_one] == (arms if of_one[0][0] % 2 else arms[::-1])


@given(gaps=st.lists(st.lists(SECONDS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_the_slowest_client_bounds_the_common_speed(gaps: list[list[float]]) -> None:
    case = Case(3, True, clients=len(gaps))
    figures = figures_of(case, tuple(TokenTimes(1.0, tuple(of_one)) for of_one in gaps))
    speeds = [3 / sum(of_one) for of_one in gaps]
    assert len(gaps) * min(speeds) == pytest.approx(figures["tokens_per_s"])
    assert figures["token_ms_p50"] <= figures["token_ms_p95"] or figures["token_ms_p95"] == pytest.approx(
        figures["token_ms_p50"]
    )
    assert "sent_bytes_per_token" not in figures


def test_figures_of_a_round() -> None:
    assert figures_of(PREFILL, (TokenTimes(0.5, (), traffic(PREFILL)),)) == {
        "first_token_ms": 500,
        "tokens_per_s": 200,
        "sent_bytes_per_token": 40,
        "received_bytes_per_token": 60,
    }
    seen = tuple(TokenTimes(second, (0.1, 0.3), traffic(DECODE)) for second in (1.0, 2.0))
    assert figures_of(DECODE, seen) == pytest.approx(
        {
            "first_token_ms": 1500,
            "tokens_per_s": 10,
            "token_ms_p50": 200,
            "token_ms_p95": 300,
            "sent_bytes_per_token": 40,
            "received_bytes_per_token": 60,
        }
    )


class Scripted:
    """An arm whose answers take the given times in turn."""

    def __init__(self, *seconds: float, remote: bool = False, missing: int = 0) -> None:
        self._seconds = iter(seconds)
        self._remote = remote
        self._missing = missing

    def run_case(self, case: Case) -> Round:
        took = next(self._seconds)
        gaps = (took,) * (case.new_tokens - 1 - self._missing)
        return (TokenTimes(took, gaps, traffic(case) if self._remote else None),) * case.clients


def measured(rounds: int = 3) -> list[Measured]:
    """A warm-up, then rounds of a prefill and a decode; the swarm is half as fast as the process itself."""
    swarm = Scripted(*(99, 99), *(2, 0.2, 4, 0.4, 8, 0.8)[: 2 * rounds], remote=True)
    local = Scripted(*(99, 99), *(1, 0.1, 2, 0.2, 4, 0.4)[: 2 * rounds])
    spans: list[tuple[str, int, int]] = []
    result = measure(
        {SWARM: swarm, LOCAL: local},
        [PREFILL, DECODE],
        rounds=rounds,
        warm_up=1,
        progress=lambda *told: spans.append(told),
    )
    assert [span for span, done, _ in spans if not done] == [
        "warm-up 1 of 1",
        *(f"round {number} of {rounds}" for number in range(1, rounds + 1)),
    ]
    assert [done for _, done, _ in spans] == [0, 1, 2, 3] * (rounds + 1)
    return result


def test_the_warm_up_does_not_count_and_arms_are_compared_by_round() -> None:
    prefill, decode = measured()
    assert prefill.spreads(SWARM)["first_token_ms"] == Spread(4000, 2000, 8000)
    assert decode.spreads(LOCAL)["token_ms_p50"] == Spread(200, 100, 400)
    for each in (prefill, decode):
        assert each.ratio(SWARM, LOCAL) == Spread(0.5, 0.5, 0.5)


def test_an_answer_that_ends_early_is_an_error() -> None:
    with pytest.raises(SplitnetError, match="swarm: an answer of 3 tokens ended after 2: remove what ends"):
        measure({SWARM: Scripted(1, missing=1)}, [DECODE], rounds=1, warm_up=0, progress=lambda *_: None)


ENVIRONMENT = {"threads": 2, "kernels": "avx2"}


def printed(report: Report) -> list[list[str]]:
    """The non-empty cells of the table, line by line."""
    lines = report.table().splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal with room for all columns."""
    monkeypatch.setenv("COLUMNS", "300")


def test_the_table_has_both_arms_and_the_ratio() -> None:
    report = Report("small", {}, ENVIRONMENT, measured())
    title, *head, first, second = printed(report)
    assert title == ["small, 3 rounds: medians (lowest-highest)"]
    assert head == [
        ["first", "local:", "swarm /"],
        ["test", "context", "clients", "tokens/s", "token ms", "ms/token", "p95", "tokens/s", "local"],
    ]
    assert [first, second] == [
        ["prefill 100", "25.0 (12.5-50.0)", "4,000", "50.0 (25.0-100.0)", "0.50"],
        ["decode 2", "7", "2", "5.00 (2.50-10.0)", "400.0", "400.0", "10.0 (5.00-20.0)", "0.50"],
    ]


def test_one_arm_has_fewer_columns() -> None:
    seen = [(TokenTimes(0.5, ()),)]
    report = Report("small", {}, ENVIRONMENT, [Measured(PREFILL, {LOCAL: seen})])
    assert printed(report) == [
        ["small, one round"],
        ["first"],
        ["test", "tokens/s", "token ms", "ms/token", "p95"],
        ["prefill 100", "200.0", "500.0"],
    ]
    assert report.sentence() == "By plain transformers in this process, with 2 threads."


def test_the_sentence_draws_the_route_with_codecs_and_bytes() -> None:
    route = "client -[none, 2,402]-> blocks 0..1 -[int8, 700, via client]-> blocks 2..5 -[int8, 720]-> client"
    assert drawn(ROUTE) == route
    report = Report("small", {}, ENVIRONMENT, measured())
    assert report.sentence() == (
        f"Through 2 peers, with bytes per decoded token: {route}; "
        "local: plain transformers in this process, with 2 threads. The client's kernels: avx2."
    )


def test_the_sentence_names_other_routes_and_repairs() -> None:
    other = ReportedRoute(ROUTE.hops[:1], ROUTE.links[:1])
    answers = (TokenTimes(1, (1.0, 1.0), traffic(DECODE, repairs=1)), TokenTimes(1, (1.0, 1.0), traffic(DECODE, other)))
    rounds = [answers, answers[:1] * 2]
    sentence = Report("small", {}, {**ENVIRONMENT, "kernels": None}, [Measured(DECODE, {SWARM: rounds})]).sentence()
    assert "-> client (3 of 4 answers; 1 other route)." in sentence
    assert sentence.endswith(" 3 times a route was repaired or left for a better one. The client's kernels: torch.")


def test_energy_is_shown_only_if_all_hops_of_all_answers_report_it() -> None:
    def report(*joules: float | None) -> Report:
        rounds = [tuple(TokenTimes(1, (1.0, 1.0), traffic(DECODE, joules=each)) for each in joules)] * 2
        prompts = [(TokenTimes(1, (), traffic(PREFILL, joules=joules[0])),)] * 2
        return Report(
            "small", {}, ENVIRONMENT, [Measured(PREFILL, {SWARM: prompts}), Measured(DECODE, {SWARM: rounds})]
        )

    known = report(0.5, 1.0)
    _, prefill_head, head, prefill, decode = printed(known)
    assert "J/token" in head and decode[-1] == "0.75" and len(prefill) == 3, prefill_head
    test = known.document()["tests"][1]
    assert test["swarm"]["joules_per_token"] == {"median": 0.75, "low": 0.75, "high": 0.75}
    assert test["swarm"]["rounds"][0]["answers"][1]["joules_per_token"] == 1.0
    half = report(0.5, None)
    assert "J/token" not in printed(half)[2]
    assert "joules_per_token" not in half.document()["tests"][1]["swarm"]


def test_the_document_has_all_rounds() -> None:
    report = Report("small", {"rounds": 3}, ENVIRONMENT, measured())
    document = json.loads(json.dumps(report.document()))
    assert (document["model"], document["settings"], document["environment"]) == ("small", {"rounds": 3}, ENVIRONMENT)
    assert [hop["start"] for route in document["routes"] for hop in route["hops"]] == [0, 2]
    prefill, decode = document["tests"]
    assert (prefill["test"], prefill["tokens"], prefill["prompt_tokens"], prefill["clients"]) == (
        "prefill",
        100,
        100,
        1,
    )
    assert (decode["test"], decode["tokens"], decode["context"], decode["clients"]) == ("decode", 2, 7, 2)
    for test in (prefill, decode):
        assert test["swarm_to_local"] == {"median": 0.5, "low": 0.5, "high": 0.5}
        for arm in (SWARM, LOCAL):
            rounds = test[arm]["rounds"]
            assert len(rounds) == 3
            speeds = sorted(each["tokens_per_s"] for each in rounds)
            assert test[arm]["tokens_per_s"] == dict(zip(("low", "median", "high"), speeds, strict=True))
            assert all(len(each["answers"]) == test["clients"] for each in rounds)
    answer = decode[SWARM]["rounds"][0]["answers"][0]
    assert (answer["new_tokens"], answer["positions"], answer["route"]) == (3, 9, 0)
    assert answer["token_ms"] == [200, 200]


@given(value=st.floats(0.01, 1e7))
def test_numbers_have_three_digits(value: float) -> None:
    shown = float(number(value).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.006, abs=0.0051)
    assert with_range(Spread(value, value, value)) == number(value)


def test_clients_start_together() -> None:
    gate = StartGate(3)
    arrived: list[int] = []

    def client(number: int) -> float:
        arrived.append(number)
        gate.wait()
        assert len(arrived) == 3
        return gate.opened_at

    opened = run_together([lambda number=number: client(number) for number in range(3)], gate)
    assert opened == [gate.opened_at] * 3 and gate.opened_at > 0


def test_the_failure_of_one_client_ends_all() -> None:
    gate = StartGate(3)
    passed: list[int] = []

    def fails() -> None:
        raise PeerLost("the peer is gone")

    def waits() -> None:
        gate.wait()
        passed.append(1)

    with pytest.raises(PeerLost, match="the peer is gone"):
        run_together([waits, fails, waits], gate)
    assert not passed
    with pytest.raises(threading.BrokenBarrierError):
        gate.raise_if_broken()
