"""Who is at fault when a request fails: an honest hop is replaced at most once for another's fault."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.liveness import PingVerdict, Verdict
from splitnet.errors import ContextTooLong, NotFinite, PeerBusy, PeerFailed, PeerLost
from splitnet.security.identity import Identity
from splitnet.session.blame import Faults, OpenAgain, Replace, RequestsFault, error_of
from splitnet.session.events import Cause
from splitnet.session.failover import RouteHop
from splitnet.swarm.plan import PlannedHop
from splitnet.wire.codecs import codec_by_name
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Failure, FailureCode

KEYS = [Identity.generate().public for _ in range(4)]


def hop_of(index: int, start: int) -> RouteHop:
    endpoint = Endpoint(f"tcp://127.0.0.1:{index + 1}", KEYS[index])
    record: Any = SimpleNamespace(key=KEYS[index], endpoint=endpoint, dtype="float32")
    return RouteHop(PlannedHop(record, start, start + 1), codec_by_name("none"))


HOPS = [hop_of(0, 0), hop_of(1, 1), hop_of(2, 2)]
OTHER = hop_of(3, 1)
"""A peer that may take the place of the middle hop."""


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(FailureCode)), min_size=1, max_size=30))
def test_each_failure_has_one_decision(failures: list[tuple[int, FailureCode]]) -> None:
    faults = Faults(HOPS)
    for index, code in failures:
        hop = HOPS[index]
        match faults.request_failed(hop, code, PeerFailed(code.name), None):
            case Replace(lost, _):
                assert len(lost) == 1 and lost.keys() <= {each.endpoint for each in HOPS}
            case OpenAgain(cause, _, wrong):
                assert cause is Cause.SESSION_LOST and faults.strikes[hop.name] == 1 and set(wrong) <= {hop}
            case RequestsFault(error):
                assert isinstance(error, PeerFailed | NotFinite)


def test_two_peers_that_report_the_same_are_believed() -> None:
    faults = Faults(HOPS)
    first = faults.blame(HOPS[1], FailureCode.NOT_FINITE, PeerFailed("no"))
    assert isinstance(first, Replace) and first.lost.keys() == {HOPS[1].endpoint}
    second = faults.blame(OTHER, FailureCode.NOT_FINITE, PeerFailed("no"))
    assert isinstance(second, RequestsFault) and isinstance(second.error, NotFinite)


def test_unusable_answers_are_never_the_fault_of_the_request() -> None:
    faults = Faults(HOPS)
    for hop in (HOPS[1], OTHER, HOPS[1]):
        assert isinstance(faults.answered_nonsense(hop, ValueError("size")), Replace)


def test_a_feeder_is_replaced_once_two_peers_refuse_its_output() -> None:
    faults, error = Faults(HOPS), PeerFailed("bad")
    first = faults.request_failed(HOPS[1], FailureCode.BAD_MESSAGE, error, None)
    faults.hops = [HOPS[0], OTHER, HOPS[2]]
    second = faults.request_failed(OTHER, FailureCode.BAD_MESSAGE, error, None)
    assert isinstance(first, Replace) and first.lost.keys() == {HOPS[1].endpoint}
    assert isinstance(second, Replace) and second.lost.keys() == {HOPS[0].endpoint}
    assert set(second.cleared) == {HOPS[1].name, OTHER.name}


def test_a_hop_that_forgets_is_opened_again_then_its_next_hop_is_replaced_then_the_hop() -> None:
    faults, error = Faults(HOPS), PeerFailed("forgot")
    found = [faults.request_failed(HOPS[1], FailureCode.UNKNOWN_SESSION, error, None) for _ in range(3)]
    assert found[0] == OpenAgain(Cause.SESSION_LOST, "forgot")
    lost = [[*each.lost] for each in found[1:] if isinstance(each, Replace)]
    assert lost == [[HOPS[2].endpoint], [HOPS[1].endpoint]]


def test_a_busy_hop_is_replaced_at_once() -> None:
    error = PeerBusy("full")
    assert Faults(HOPS).request_failed(HOPS[0], FailureCode.BUSY, error, None) == Replace({HOPS[0].endpoint: error})


def test_silent_hops_are_replaced_together() -> None:
    silent = tuple(hop.endpoint for hop in HOPS[:2])
    found = Faults(HOPS).judge(Verdict(PingVerdict.SILENT, silent), [], [])
    assert isinstance(found, Replace) and tuple(found.lost) == silent


@pytest.mark.parametrize("finding", [PingVerdict.STUCK, PingVerdict.IDLE])
def test_suspects_are_replaced_one_after_the_other(finding: PingVerdict) -> None:
    faults, verdict = Faults(HOPS), Verdict(finding, tuple(hop.endpoint for hop in HOPS))
    if finding is PingVerdict.IDLE:
        assert isinstance(faults.judge(verdict, [], []), OpenAgain)
    found = [faults.judge(verdict, [], []) for _ in HOPS]
    lost = list(itertools.chain(*(each.lost.items() for each in found if isinstance(each, Replace))))
    assert [where for where, _ in lost] == [hop.endpoint for hop in HOPS]
    assert all(type(error) is PeerLost for _, error in lost)


def test_codes_have_exceptions() -> None:
    failure = Failure(b"s" * 16, 1, 1, FailureCode.TOO_LONG, "long")
    assert isinstance(error_of(failure, HOPS[0].endpoint), ContextTooLong)
    assert type(error_of(Failure(b"s" * 16, 1, 1, 99, "?"), HOPS[0].endpoint)) is PeerFailed
