"""Pings, and their measurements of links."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from splitnet.security.identity import Identity
from splitnet.transport import prober as prober_module
from splitnet.transport.prober import (
    ANSWER_S,
    ANSWER_TRIPS,
    MAX_ANSWER_S,
    PROBE_BYTES,
    PROBES_OF_QUICK_LINKS,
    Prober,
)
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Ping, Pong

PEER, OTHER, THIRD = (Endpoint(f"tcp://127.0.0.1:{port}", Identity.generate().public) for port in (1, 2, 3))


class Clock:
    """A simulated clock: every ping takes the time that `rtt_ms` gives, and is answered without a real delay."""

    def __init__(self, rtt_ms: Callable[[int, int], float]) -> None:
        self.now = 0.0
        self.pings: list[int] = []
        self._rtt_ms = rtt_ms
        self.prober = Prober(self._answer)

    def _answer(self, endpoint: Endpoint, ping: Ping) -> None:
        index = len(self.pings)
        self.pings.append(len(ping.payload))
        self.now += self._rtt_ms(index, len(ping.payload)) / 1000
        self.prober.pong(endpoint, Pong(ping.nonce, 0.0, 0))


def measured(monkeypatch: pytest.MonkeyPatch, rtt_ms: Callable[[int, int], float]) -> tuple[float, float, int]:
    """The measured latency in ms and bandwidth in bytes/ms, and the number of pings."""
    clock = Clock(rtt_ms)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    link = clock.prober.measure_links([PEER])[PEER]
    return link.latency_ms, link.bytes_per_ms, len(clock.pings)


def test_latency_and_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    latency_ms, bytes_per_ms, pings = measured(monkeypatch, lambda _, size: 40.0 + size / 1250)
    assert abs(latency_ms - 20.0) < 1e-6
    assert abs(bytes_per_ms - 1250) < 1e-6
    assert pings == 4


def test_delays_of_the_first_probes_of_a_quick_link_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def rtt_ms(index: int, size: int) -> float:
        return 0.2 + size / 100_000 + (8.0 if index < 4 else 0.0)

    latency_ms, bytes_per_ms, pings = measured(monkeypatch, rtt_ms)
    assert abs(latency_ms - 0.1) < 1e-6
    assert abs(bytes_per_ms - 100_000) < 1
    assert pings == 4 + PROBES_OF_QUICK_LINKS + 1, "the second probe leaves no doubt"


def test_a_less_quick_link_is_probed_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bytes_per_ms, pings = measured(monkeypatch, lambda _, size: 10.0 + size / 8000)
    assert abs(bytes_per_ms - 8000) < 1e-6
    assert pings == 4 + 2 * PROBES_OF_QUICK_LINKS


def test_a_probe_that_takes_no_time_gives_a_finite_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bytes_per_ms, _ = measured(monkeypatch, lambda *_: 1.0)
    assert bytes_per_ms < PROBE_BYTES * 1000


@pytest.mark.parametrize("taken", [False, True])
def test_the_wait_for_a_far_peer_is_longer_after_it_has_accepted_the_connection(
    monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """The first ping of a link includes its handshake."""
    monkeypatch.setattr(prober_module, "ANSWER_S", 0.2)
    with answering([0.0, 0.3, 0.0], lambda asked: taken and asked > 1) as prober:
        assert prober.answering([OTHER]) == {OTHER}, "who is near tells how long it takes here"
        assert list(prober.round_trips([PEER], timeout_s=0.2)) == [PEER] * taken


@contextmanager
def answering(late_s: list[float], is_taken: Callable[[int], bool]) -> Iterator[Prober]:
    """A prober whose pings are answered after `late_s`, in order. is_taken: whether a connection is accepted, by the
    number of pings sent."""
    timers: list[threading.Timer] = []

    def answer(endpoint: Endpoint, ping: Ping) -> None:
        late, pong = late_s[len(timers)], Pong(ping.nonce, 0.0, 0)
        timers.append(threading.Timer(late, prober.pong, (endpoint, pong)))
        if late:
            timers[-1].start()
        else:  # an exact round trip even on a busy machine, because it decides how long other peers are waited for
            prober.pong(endpoint, pong)

    prober = Prober(answer, lambda _: is_taken(len(timers)))
    yield prober
    for late, timer in zip(late_s, timers, strict=False):
        if late:
            timer.join()


@pytest.mark.parametrize("somebody_is_near", [False, True])
def test_the_first_wait_is_longer_if_all_peers_are_far(monkeypatch: pytest.MonkeyPatch, somebody_is_near: bool) -> None:
    """Over a satellite a connection takes more than a second, and the rest of the handshake may take as long again."""
    for name, value in {"ANSWER_S": 0.1, "FIRST_ANSWER_S": 0.4}.items():
        monkeypatch.setattr(prober_module, name, value)
    began = time.monotonic()
    with answering([0.0] * somebody_is_near + [0.8, 0.2], lambda _: time.monotonic() - began > 0.2) as prober:
        if somebody_is_near:
            assert prober.answering([OTHER]) == {OTHER}
        began = time.monotonic()
        assert (PEER in prober.round_trips([PEER], timeout_s=0.1)) is not somebody_is_near


def test_the_wait_for_an_answer_follows_from_round_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    pings: list[Ping] = []
    prober = Prober(lambda _, ping: pings.append(ping))

    def answers(endpoint: Endpoint, seconds: float) -> None:
        nonlocal now
        prober.ping(endpoint)
        now += seconds
        prober.pong(endpoint, Pong(pings[-1].nonce, 0.0, 0))

    assert prober.answer_limit_s(PEER) == ANSWER_S
    for _ in range(3):
        answers(PEER, 0.1)
    assert prober.answer_limit_s(PEER) == prober.answer_limit_s(OTHER) == ANSWER_S
    answers(PEER, 1.2)
    assert prober.answer_limit_s(PEER) == pytest.approx(ANSWER_TRIPS * 1.2), "the latest counts, as it came late"
    assert prober.answer_limit_s(OTHER) == ANSWER_S, "one that is far says nothing of others"
    answers(PEER, 1.3)
    answers(THIRD, 1.1)
    assert prober.answer_limit_s(OTHER) == pytest.approx(ANSWER_TRIPS * 1.1), "if all are, the way from here is long"
    answers(OTHER, 0.1)
    assert prober.answer_limit_s(OTHER) == ANSWER_S
    answers(PEER, 50.0)
    assert prober.answer_limit_s(PEER) == MAX_ANSWER_S, "who answers as late as it likes is not waited for so long"


def test_an_answer_of_another_peer_is_ignored() -> None:
    pings: list[Ping] = []
    prober = Prober(lambda _, ping: pings.append(ping))
    answer = prober.ping(PEER)
    prober.pong(Endpoint("tcp://127.0.0.1:2", Identity.generate().public), Pong(pings[0].nonce, 0.0, 0))
    assert not answer.done() and not prober.rtt_ms(PEER)
    assert prober.last_answered(PEER) == 0
    prober.pong(PEER, Pong(pings[0].nonce, 0.0, 0))
    assert answer.done()


def test_an_answer_shows_which_messages_have_arrived() -> None:
    pings: list[Ping] = []
    prober = Prober(lambda _, ping: pings.append(ping))
    first, second, third = (prober.probe(PEER) for _ in range(3))
    for index, latest in ((1, second), (0, second), (2, third)):
        prober.pong(PEER, Pong(pings[index].nonce, 0.0, 0))
        assert prober.last_answered(PEER) == latest > first
