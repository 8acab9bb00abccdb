"""The hops of a session as the client sees them: opening them, sending steps into them, and what comes back."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduler.cost import positions_with_prompt
from splitnet.client.link_codecs import LinkCodecs
from splitnet.client.planner import Needs, PlannedHop
from splitnet.client.swarm import Swarm, not_authorized
from splitnet.errors import (
    ContextTooLong,
    PeerBusy,
    PeerFailed,
    PeerLeaving,
    PeerLost,
    ProtocolError,
    SessionLost,
    SplitnetError,
    WrongSwarm,
)
from splitnet.net.codecs import Codec, codec_by_name
from splitnet.net.endpoints import Endpoint, LinkState
from splitnet.net.messages import (
    Close,
    Failure,
    FailureCode,
    Message,
    Open,
    Opened,
    Replay,
    Result,
    Step,
    Timing,
)
from splitnet.net.sent_log import SentLog

USUAL_POSITIONS = 64
"""Of a step, where many are under way: a micro-batch, or a chunk of a prefill. Otherwise it is a token."""

OPEN_TIMEOUT_S = 10.0
REOPEN_TIMEOUT_S = 2.0
"""For peers whose link was lost: time to come back, if they only restarted."""


@dataclass(slots=True)
class Hop:
    """A hop of an open route."""

    planned: PlannedHop
    codec: Codec
    """What this hop encodes its output with."""
    carried: bool = False
    """Its next hop cannot be reached from it, so the client carries its output there."""
    carried_log: SentLog | None = None
    """What the client has carried on for it."""
    cached_positions: int = 0
    """What it held of the session when it was opened."""

    @property
    def endpoint(self) -> Endpoint:
        return self.planned.endpoint

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def blocks(self) -> tuple[int, int]:
        return self.planned.start, self.planned.end


@dataclass(slots=True)
class Traffic:
    """What a session has moved so far."""

    steps: int = 0
    positions: int = 0
    bytes_sent: int = 0
    """By the client, headers included."""
    bytes_received: int = 0


@dataclass(slots=True)
class Pending:
    """A step or replay whose result is awaited."""

    step: Step | None
    """None for a replay of a hop's log."""
    kept: int
    result: Result | None = None

    @property
    def is_replay(self) -> bool:
        return self.step is None or self.step.replay_until > 0


class Chain:
    """An opened route. Its events come from the transport's thread; everything else from the session's.

    Args:
        swarm: the peers.
        session: id of the session.
        codec: name of a codec for every link, or "auto" to choose by cost for each.
    """

    def __init__(self, swarm: Swarm, session: bytes, codec: str) -> None:
        self.session = session
        self.hops: list[Hop] = []
        self.epoch = 0
        self.first_codec = codec_by_name("none")
        """Codec of the client's own link to the first hop."""
        self.traffic = Traffic()
        self.timings: tuple[Timing, ...] = ()
        """Of the last step, hop by hop."""
        self.pending: dict[int, Pending] = {}
        self._swarm = swarm
        self._codecs = LinkCodecs(swarm, codec)
        self._opened: dict[Endpoint, tuple[int, int]] = {}
        self._inbox: queue.SimpleQueue[tuple[Endpoint, Message | SplitnetError]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def needs(self, budget: int, in_flight: int, prompt: int = 0) -> Needs:
        """What a session that reserves `budget` positions, and begins with `prompt` of them, wants of its route."""
        positions = USUAL_POSITIONS if in_flight > 1 else positions_with_prompt(prompt)
        return Needs(budget, self._codecs.encodings, positions, in_flight)

    def open(self, route: Sequence[PlannedHop], budget: int) -> dict[str, SplitnetError]:
        """Opens all hops of `route` in a new epoch; hops that are open already keep their caches.

        Returns:
            Why which peers refused, by name; empty if the route stands.
        """
        self.epoch += 1
        before = {hop.planned: hop for hop in self.hops}
        self.hops = [Hop(planned, self._codecs.after(route, index)) for index, planned in enumerate(route)]
        for hop in self.hops:
            if hop.planned in before:
                # A log is written with one codec, so a hop that stays keeps the codec that it began with.
                hop.codec = before[hop.planned].codec
                hop.carried_log = before[hop.planned].carried_log
        if not self.traffic.steps:
            self.first_codec = self._codecs.to(route[0])
        wanted = {hop.endpoint: hop.blocks for hop in self.hops}
        for endpoint, blocks in list(self._opened.items()):
            if wanted.get(endpoint) != blocks:
                self.drop(endpoint)
        self._opened = wanted
        failed = self._open_hops(range(len(route)), budget)
        if not failed:
            carried = [index for index, hop in enumerate(self.hops) if hop.carried]
            failed = self._open_hops(carried, budget)
        return failed

    def resize(self, budget: int) -> dict[str, SplitnetError]:
        """Reserves `budget` positions on all hops; returns why which refused."""
        return self._open_hops(range(len(self.hops)), budget)

    def dropped_hops(self) -> list[Endpoint]:
        """Hops that were given up and never replaced, as nobody could take their place."""
        return [hop.endpoint for hop in self.hops if hop.endpoint not in self._opened]

    def drop(self, endpoint: Endpoint) -> None:
        """Has a hop forget the session."""
        self._opened.pop(endpoint, None)
        self._swarm.send(endpoint, Close(self.session))

    def close(self) -> None:
        """Has all hops forget the session."""
        for endpoint in list(self._opened):
            self.drop(endpoint)

    def send_step(self, step: Step, kept: int, *, to: int = 0) -> None:
        """Sends a step into the hop at index `to`; its result is awaited under its number."""
        with self._lock:
            self.pending[step.number] = Pending(step, kept)
        self.traffic.steps += 1
        self.traffic.bytes_sent += self._swarm.send(self.hops[to].endpoint, step)

    def send_again(self, pending: Pending) -> None:
        """Sends a step whose result has not come, in the current epoch."""
        assert pending.step is not None
        self.send_step(replace(pending.step, epoch=self.epoch), pending.kept)

    def ask_replay(self, index: int, number: int, until: int) -> None:
        """Has the hop at `index` send its log to the next hop again; the end of it is awaited under `number`."""
        with self._lock:
            self.pending[number] = Pending(None, 0)
        self._swarm.send(self.hops[index].endpoint, Replay(self.session, self.epoch, number, until))

    def tell_survey(self, positions: int) -> None:
        """Tells what the last step, of `positions` positions, met on its way."""
        survey = self._swarm.survey
        for index, (hop, timing) in enumerate(zip(self.hops, self.timings, strict=False)):
            blocks = hop.planned.end - hop.planned.start
            survey.hop_seen(hop.name, positions, timing.compute_us / 1000 / blocks, timing.wait_us / 1000)
            if timing.next_rtt_us and index + 1 < len(self.hops):
                survey.link_seen(hop.name, self.hops[index + 1].name, timing.next_rtt_us / 1000)

    def forget(self, number: int) -> None:
        """Awaits a number no longer."""
        with self._lock:
            self.pending.pop(number, None)

    def receive(self, timeout_s: float) -> tuple[Endpoint, SplitnetError] | None:
        """Waits for the next event and takes in results.

        Returns:
            A peer and what went wrong there, or None if a result came or nothing that matters now.

        Raises:
            queue.Empty: nothing came in `timeout_s` seconds.
        """
        source, item = self._inbox.get(timeout=max(0.0, timeout_s))
        if isinstance(item, SplitnetError):
            return (source, item) if source in self._opened else None
        if getattr(item, "epoch", None) != self.epoch:
            return None
        if isinstance(item, Failure) and (item.number in self.pending or not item.number):
            return source, error_of(item, source)
        if isinstance(item, Result) and item.number in self.pending:
            pending = self.pending[item.number]
            # Only the tail has the output of a step; the end of a replay may come from any hop.
            if pending.is_replay or source == self.hops[-1].endpoint:
                if not pending.is_replay:
                    self.timings = item.timings
                self.traffic.bytes_received += len(item.payload)
                pending.result = item
        return None

    def deliver(self, source: Endpoint, message: Message) -> None:
        """Takes a message from the transport's thread; what only has to be carried on is sent at once."""
        if isinstance(message, Result) and message.end != self._swarm.facts.num_blocks and len(message.payload):
            self._carry(source, message)
        else:
            self._inbox.put((source, message))

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        """Takes from the transport's thread that a link of the client is lost or refused."""
        if endpoint in self._opened:
            self._inbox.put((endpoint, error))

    def _carry(self, source: Endpoint, result: Result) -> None:
        """The client between two hops that cannot reach each other."""
        with self._lock:
            pending = self.pending.get(result.number)
        if pending is None or pending.step is None or result.epoch != self.epoch:
            return
        for hop, following in itertools.pairwise(self.hops):
            if hop.endpoint == source and hop.carried and hop.planned.end == result.end:
                step = pending.step
                carried = replace(
                    step,
                    epoch=self.epoch,
                    codec=result.codec,
                    payload=result.payload,
                    boundary=result.end,
                    timings=result.timings,
                )
                self._log_carried(hop, step, result)
                self.traffic.bytes_received += len(result.payload)
                self.traffic.bytes_sent += self._swarm.send(following.endpoint, carried)

    @staticmethod
    def _log_carried(hop: Hop, step: Step, result: Result) -> None:
        """The client is the sender here, so it keeps the log; one that does not begin at the beginning is no use."""
        if hop.carried_log is None and not any(part.start for part in step.parts):
            hop.carried_log = SentLog(result.codec, len(result.payload) // step.positions)
        if hop.carried_log is not None:
            try:
                hop.carried_log.record(step.parts, step.forks, result.payload)
            except ProtocolError:  # its rows were filled by a replay that did not come this way
                hop.carried_log = None

    def _open_hops(self, indexes: Sequence[int], budget: int) -> dict[str, SplitnetError]:
        """Sends `Open` to hops in parallel and waits for each answer; notes where the client has to carry."""
        waiting = {self.hops[index].endpoint: self.hops[index] for index in indexes}
        deadlines: dict[Endpoint, float] = {}
        failed: dict[str, SplitnetError] = {}
        for index in indexes:
            hop = self.hops[index]
            state = self._swarm.link_state(hop.endpoint)
            if state is LinkState.REFUSED:
                failed[waiting.pop(hop.endpoint).name] = not_authorized(hop.endpoint)
            else:
                patience_s = REOPEN_TIMEOUT_S if state is LinkState.DOWN else OPEN_TIMEOUT_S
                deadlines[hop.endpoint] = time.monotonic() + patience_s
                self._swarm.send(hop.endpoint, self._open_message(index, budget))
        while waiting:
            late = min(waiting, key=lambda endpoint: deadlines[endpoint])
            try:
                source, item = self._inbox.get(timeout=max(0.0, deadlines[late] - time.monotonic()))
            except queue.Empty:
                failed[waiting.pop(late).name] = PeerLost(
                    f"the peer at {late.address} does not answer: check its network and firewall"
                )
                continue
            if source not in waiting:
                continue
            if isinstance(item, SplitnetError):
                failed[waiting.pop(source).name] = item
            elif isinstance(item, Failure) and item.epoch == self.epoch and not item.number:
                failed[waiting.pop(source).name] = error_of(item, source)
            elif isinstance(item, Opened) and item.epoch == self.epoch:
                hop = waiting.pop(source)
                hop.carried |= not item.next_reachable
                hop.cached_positions = item.cached_positions
        return failed

    def _open_message(self, index: int, budget: int) -> Open:
        hop = self.hops[index]
        previous = self.hops[index - 1] if index else None
        following = self.hops[index + 1] if index + 1 < len(self.hops) and not hop.carried else None
        return Open(
            session=self.session,
            epoch=self.epoch,
            model=self._swarm.facts.fingerprint,
            start=hop.planned.start,
            end=hop.planned.end,
            budget=budget,
            codec=hop.codec.code,
            previous=previous.planned.record.key.raw if previous is not None and not previous.carried else b"",
            next_key=following.planned.record.key.raw if following else b"",
            next_address=following.planned.record.address if following else "",
        )


_ERROR_OF_CODE: dict[int, type[SplitnetError]] = {
    FailureCode.BUSY: PeerBusy,
    FailureCode.WRONG_MODEL: WrongSwarm,
    FailureCode.TOO_LONG: ContextTooLong,
    FailureCode.UNKNOWN_SESSION: SessionLost,
    FailureCode.OUT_OF_ORDER: SessionLost,
    FailureCode.LEAVING: PeerLeaving,
}


def error_of(failure: Failure, source: Endpoint) -> SplitnetError:
    """The exception that a peer's answer means."""
    kind = _ERROR_OF_CODE.get(failure.code, PeerFailed)
    return kind(f"the peer at {source.address} answered: {failure.text}")
