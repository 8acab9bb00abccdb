"""What pings tell of links."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from splitnet.net import prober as prober_module
from splitnet.net.endpoints import Endpoint
from splitnet.net.identity import Identity
from splitnet.net.messages import Ping, Pong
from splitnet.net.prober import PROBE_BYTES, PROBES_OF_QUICK_LINKS, Prober

PEER = Endpoint("tcp://127.0.0.1:1", Identity.generate().public)


class Clock:
    """Stands in for the time: every ping takes what `rtt_ms` says, and is answered at once."""

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
    """Latency in ms and bandwidth in bytes/ms that are found, and how many pings it took."""
    clock = Clock(rtt_ms)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    link = clock.prober.measure([PEER])[PEER]
    return link.latency_ms, link.bytes_per_ms, len(clock.pings)


def test_latency_and_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    latency_ms, bytes_per_ms, pings = measured(monkeypatch, lambda _, size: 40.0 + size / 1250)
    assert abs(latency_ms - 20.0) < 1e-6
    assert abs(bytes_per_ms - 1250) < 1e-6
    assert pings == 4


def test_what_disturbs_the_first_probes_of_a_quick_link_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def rtt_ms(index: int, size: int) -> float:
        return 0.2 + size / 100_000 + (8.0 if index < 4 else 0.0)

    latency_ms, bytes_per_ms, pings = measured(monkeypatch, rtt_ms)
    assert abs(latency_ms - 0.1) < 1e-6
    assert abs(bytes_per_ms - 100_000) < 1
    assert pings == 4 + PROBES_OF_QUICK_LINKS + 1, "the second probe leaves no doubt"


def test_a_link_that_is_not_so_quick_is_probed_some_times(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bytes_per_ms, pings = measured(monkeypatch, lambda _, size: 10.0 + size / 8000)
    assert abs(bytes_per_ms - 8000) < 1e-6
    assert pings == 4 + 2 * PROBES_OF_QUICK_LINKS


def test_a_probe_that_takes_no_time_at_all_is_no_infinite_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    _, bytes_per_ms, _ = measured(monkeypatch, lambda *_: 1.0)
    assert bytes_per_ms < PROBE_BYTES * 1000


@pytest.mark.parametrize("taken", [False, True])
def test_a_far_peer_is_waited_for_once_it_has_taken_the_connection(
    monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """The first ping of a link pays for its handshake."""
    monkeypatch.setattr(prober_module, "PING_TIMEOUT_S", 0.2)
    timers: list[threading.Timer] = []

    def answer(endpoint: Endpoint, ping: Ping) -> None:
        late_s = 0.0 if timers else 0.3
        timers.append(threading.Timer(late_s, prober.pong, (endpoint, Pong(ping.nonce, 0.0, 0))))
        timers[-1].start()

    prober = Prober(answer, lambda _: taken and bool(timers))
    assert list(prober.round_trips([PEER], timeout_s=0.2)) == [PEER] * taken
    for timer in timers:
        timer.join()


def test_nobody_answers_for_another() -> None:
    pings: list[Ping] = []
    prober = Prober(lambda _, ping: pings.append(ping))
    answer = prober.ping(PEER)
    prober.pong(Endpoint("tcp://127.0.0.1:2", Identity.generate().public), Pong(pings[0].nonce, 0.0, 0))
    assert not answer.done() and not prober.rtt_ms(PEER)
    assert prober.answered(PEER) == 0
    prober.pong(PEER, Pong(pings[0].nonce, 0.0, 0))
    assert answer.done()


def test_an_answer_tells_what_was_sent_before_it() -> None:
    pings: list[Ping] = []
    prober = Prober(lambda _, ping: pings.append(ping))
    first, second, third = (prober.probe(PEER) for _ in range(3))
    for index, latest in ((1, second), (0, second), (2, third)):
        prober.pong(PEER, Pong(pings[index].nonce, 0.0, 0))
        assert prober.answered(PEER) == latest > first
