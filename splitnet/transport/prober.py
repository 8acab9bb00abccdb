"""Pings, and the round trips, bandwidths and loads that they measure."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import count

from scheduler.facts import Link
from scheduler.liveness import ANSWER_S, ANSWER_TRIPS, FIRST_ANSWER_S, FIRST_TRIPS, MAX_ANSWER_S, TAKEN_TRIPS
from splitnet.limits import keep_latest
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import LoadReport, Ping, Pong, Timing

LOOK_S = 0.05  # between two checks of whether connections were accepted
QUICK_MS = 500.0  # an answer in this time shows that the ping met no long queue on the uplink

PROBE_BYTES = 64 * 1024  # padding of a ping that measures bandwidth
FASTEST_PROBE_MS = 0.05  # lower bound of a measured transfer time, which timing noise may reduce to zero

QUICK_PROBE_MS = 20.0  # a probe with a shorter transfer time is repeated, because waits for a processor distort it
PROBES_OF_QUICK_LINKS = 3  # largest number of repetitions of such a probe
SURE_MS = 4.0  # a transfer time of at most this is not measured again

FORGET_S = 60.0  # time after which an unanswered ping is forgotten
KEPT_ENDPOINTS = 1024  # peers whose measurements are kept
KEPT_ROUND_TRIPS = 3  # round trips of a peer; the shortest counts, as it met the least traffic and computation


@dataclass(frozen=True, slots=True)
class PingReply:
    """The answer to a ping."""

    rtt_ms: float
    queue_ms: float  # how long a new step would wait for the peer's device
    kv_free_positions: int  # positions that new sessions may take
    holds: bool = False  # the peer holds the session asked about
    waiting: int = 0  # about this session, like the next two fields: see `Pong`
    done: int = 0
    last: int = 0
    timing: Timing | None = None
    """Times of the session's last decode step at the peer; None: there was none, or the peer does not report it."""


@dataclass(frozen=True, slots=True)
class _SentPing:
    endpoint: Endpoint
    at: float
    padding: int
    future: Future[PingReply]


class Prober:
    """Sends pings and records the answers. Thread-safe.

    is_taken: whether the other side has accepted the TCP connection to an endpoint. quick_at: when the latest ping
    that a peer has answered within `QUICK_MS` was sent, in seconds of `time.perf_counter`. loads: the last load reports
    of peers.
    """

    def __init__(
        self, send: Callable[[Endpoint, Ping], object], is_taken: Callable[[Endpoint], bool] = lambda _: False
    ) -> None:
        self.quick_at = 0.0
        self._send = send
        self._is_taken = is_taken
        self._nonces = count(1)
        self._sent: dict[int, _SentPing] = {}
        self._round_trips: dict[Endpoint, deque[float]] = {}
        self._latest: deque[float] = deque(maxlen=KEPT_ROUND_TRIPS)
        """The latest round trips to any peers, in ms. If all are long, the access line of this machine is slow."""
        self._answered: dict[Endpoint, int] = {}
        self.loads: dict[Endpoint, LoadReport] = {}
        self._lock = threading.Lock()

    def ping(
        self, endpoint: Endpoint, padding: int = 0, session: bytes = b"", *, load: bool = False
    ) -> Future[PingReply]:
        """Sends a ping; the future stays undone if there is no answer.

        padding: bytes to send with the ping. session: id of a session to ask about, 16 bytes. load: asks for a load
        report, see `loads`.
        """
        return self._ping(endpoint, padding, session, load)[1]

    def probe(self, endpoint: Endpoint) -> int:
        """Sends a ping, and returns its number. Later pings have higher numbers."""
        return self._ping(endpoint, 0, b"", load=False)[0]

    def _ping(self, endpoint: Endpoint, padding: int, session: bytes, load: bool) -> tuple[int, Future[PingReply]]:
        nonce = next(self._nonces)
        future: Future[PingReply] = Future()
        now = time.perf_counter()
        with self._lock:
            while self._sent and now - next(iter(self._sent.values())).at > FORGET_S:
                del self._sent[next(iter(self._sent))]
            self._sent[nonce] = _SentPing(endpoint, now, padding, future)
        self._send(endpoint, Ping(nonce, bytes(padding), session, load))
        return nonce, future

    def pong(self, source: Endpoint, message: Pong) -> None:
        """Records an answer. An answer from another peer than the one asked is ignored."""
        with self._lock:
            sent = self._sent.get(message.nonce)
            if sent is None or sent.endpoint != source:
                return
            del self._sent[message.nonce]
            rtt_ms = (time.perf_counter() - sent.at) * 1000
            if rtt_ms < QUICK_MS:
                self.quick_at = max(self.quick_at, sent.at)
            latest = max(message.nonce, self._answered.get(source, 0))
            keep_latest(self._answered, source, latest, KEPT_ENDPOINTS)
            for load in message.load:
                keep_latest(self.loads, source, load, KEPT_ENDPOINTS)
            if not sent.padding:
                self._latest.append(rtt_ms)
                round_trips = self._round_trips.get(source, deque[float](maxlen=KEPT_ROUND_TRIPS))
                round_trips.append(rtt_ms)
                keep_latest(self._round_trips, source, round_trips, KEPT_ENDPOINTS)
        said = message.queue_ms, message.kv_free_positions, message.holds, message.waiting, message.done, message.last
        sent.future.set_result(PingReply(rtt_ms, *said, message.timing[0] if message.timing else None))

    def rtt_ms(self, endpoint: Endpoint) -> float:
        """The shortest of the last round trips to a peer; 0: not measured."""
        with self._lock:
            return min(self._round_trips.get(endpoint, (0.0,)))

    def answer_limit_s(
        self, endpoint: Endpoint, least_s: float = ANSWER_S, trips: float = ANSWER_TRIPS, taken_s: float = 0.0
    ) -> float:
        """How long to wait for a peer's answer: `trips` times its latest round trip, or times the shortest of the
        latest round trips to all peers if that is longer; at least `least_s`. taken_s: the time in which a connection
        was accepted, which replaces the round trip while no peer has answered."""
        with self._lock:
            own_ms = self._round_trips.get(endpoint, (0.0,))[-1]
            anybody_ms = min(self._latest, default=1000 * taken_s)
        return max(least_s, min(trips * max(own_ms, anybody_ms) / 1000, MAX_ANSWER_S))

    def last_answered(self, endpoint: Endpoint) -> int:
        """Number of the latest ping that a peer has answered. All messages that were sent to the peer before this ping
        have arrived."""
        return self._answered.get(endpoint, 0)

    def round_trips(
        self, endpoints: Iterable[Endpoint], timeout_s: float = ANSWER_S, *, loads: Collection[Endpoint] = ()
    ) -> dict[Endpoint, float]:
        """Round trips to peers in ms, by two small pings to each. Peers that do not answer in time are omitted. loads:
        peers that are also asked for a load report, see `ping`."""
        # The first ping of a link is not measured, because it includes the handshake.
        answered = self._answers(endpoints, 0, timeout_s, FIRST_ANSWER_S if timeout_s >= ANSWER_S else 0.0)
        answers = self._answers(answered, 0, timeout_s, loads=loads)
        return {endpoint: answer.rtt_ms for endpoint, answer in answers.items()}

    def measure_links(
        self,
        endpoints: Iterable[Endpoint],
        timeout_s: float = ANSWER_S,
        *,
        probed: Collection[Endpoint] | None = None,
        loads: Collection[Endpoint] = (),
    ) -> dict[Endpoint, Link]:
        """Latency and bandwidth of the links to peers. Peers that do not answer in time are omitted. probed: peers
        whose bandwidth is measured; other links have a bandwidth of 0; None: all peers. loads: see `round_trips`."""
        small = self.round_trips(endpoints, timeout_s, loads=loads)
        others = {} if probed is None else {each: Link(ms / 2, 0.0) for each, ms in small.items() if each not in probed}
        # The first probe is not measured, because TCP's congestion window is still too small for it.
        answered = self._answers([endpoint for endpoint in small if endpoint not in others], PROBE_BYTES, timeout_s)
        answered = self._answers(answered, PROBE_BYTES, timeout_s)
        rtt_ms = {endpoint: small[endpoint] for endpoint in answered}
        probe_ms = {endpoint: answer.rtt_ms for endpoint, answer in answered.items()}
        # Most of a short transfer time may be a wait for a processor, so the shortest of several counts.
        quick = [endpoint for endpoint in answered if probe_ms[endpoint] - rtt_ms[endpoint] < QUICK_PROBE_MS]
        for _ in range(PROBES_OF_QUICK_LINKS if quick else 0):
            for endpoint, answer in self._answers(quick, 0, timeout_s).items():
                rtt_ms[endpoint] = min(rtt_ms[endpoint], answer.rtt_ms)
            unsure = [endpoint for endpoint in quick if probe_ms[endpoint] - rtt_ms[endpoint] > SURE_MS]
            for endpoint, answer in self._answers(unsure, PROBE_BYTES, timeout_s).items():
                probe_ms[endpoint] = min(probe_ms[endpoint], answer.rtt_ms)
        return others | {
            endpoint: Link(
                rtt_ms[endpoint] / 2, PROBE_BYTES / max(probe_ms[endpoint] - rtt_ms[endpoint], FASTEST_PROBE_MS)
            )
            for endpoint in answered
        }

    def answering(self, endpoints: Iterable[Endpoint], timeout_s: float = ANSWER_S) -> set[Endpoint]:
        """The peers that answer one small ping in time."""
        return set(self._answers(endpoints, 0, timeout_s, FIRST_ANSWER_S))

    def _answers(
        self,
        endpoints: Iterable[Endpoint],
        padding: int,
        timeout_s: float,
        taken_s: float = 0.0,
        loads: Collection[Endpoint] = (),
    ) -> dict[Endpoint, PingReply]:
        """Pings all endpoints and waits for answers. taken_s: smallest wait for a peer that accepts the connection
        during the wait."""
        endpoints = list(endpoints)
        new = {endpoint for endpoint in endpoints if timeout_s < taken_s and not self._is_taken(endpoint)}
        pings = {endpoint: self.ping(endpoint, padding, load=endpoint in loads) for endpoint in endpoints}
        began, taken = time.perf_counter(), dict[Endpoint, float]()
        while waiting := [endpoint for endpoint, ping in pings.items() if not ping.done()]:
            waited_s = time.perf_counter() - began
            taken |= {endpoint: waited_s for endpoint in new - taken.keys() if self._is_taken(endpoint)}
            soonest_s = min(taken.values(), default=0.0)
            left_s = -waited_s
            for endpoint in waiting:
                if endpoint not in new:
                    limit_s = self.answer_limit_s(endpoint, timeout_s)
                elif endpoint in taken:
                    limit_s = self.answer_limit_s(endpoint, taken_s, FIRST_TRIPS, soonest_s)
                elif taken or self._latest:
                    limit_s = self.answer_limit_s(endpoint, timeout_s, TAKEN_TRIPS, soonest_s)
                else:  # there is neither a round trip nor an accepted connection to judge the distance by
                    limit_s = taken_s
                left_s = max(left_s, limit_s - waited_s)
            if left_s <= 0:
                break
            wait([pings[endpoint] for endpoint in waiting], timeout=min(left_s, LOOK_S) if new else left_s)
        return {endpoint: future.result() for endpoint, future in pings.items() if future.done()}
