"""The hops of a session as the client sees them: opening them, sending steps into them, and what comes back."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from scheduler.cost import positions_with_prompt
from splitnet.client.awaited import Awaited, AwaitedReplay, AwaitedStep
from splitnet.client.link_codecs import LinkCodecs
from splitnet.client.planner import Needs, PlannedHop
from splitnet.client.swarm import Swarm, refusal
from splitnet.errors import (
    ContextTooLong,
    PeerBusy,
    PeerFailed,
    PeerLeaving,
    PeerLost,
    ProtocolError,
    SessionClosed,
    SessionLost,
    SplitnetError,
    WrongSwarm,
)
from splitnet.model.adapters import Adapter, counted_down, write_groups
from splitnet.net.codecs import Codec, codec_by_name
from splitnet.net.endpoints import Endpoint, LinkState
from splitnet.net.messages import Adapter as AdapterMessage
from splitnet.net.messages import (
    AdapterGradient,
    Adopted,
    Close,
    Failure,
    FailureCode,
    Gradient,
    Message,
    Open,
    Opened,
    Recalled,
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


class Chain:
    """An opened route. Its events come from the transport's thread; everything else from the session's.

    Args:
        swarm: the peers.
        session: id of the session.
        codecs: chooses the codec of each link.
        blocks: what the hops run, `[start, end)`.
    """

    def __init__(self, swarm: Swarm, session: bytes, codecs: LinkCodecs, blocks: tuple[int, int]) -> None:
        self.session = session
        self.blocks = blocks
        self.hops: list[Hop] = []
        self.epoch = 0
        self.first_codec = codec_by_name("none")
        """Codec of the client's own link to the first hop."""
        self.traffic = Traffic()
        self.timings: tuple[Timing, ...] = ()
        """Of the last step, hop by hop."""
        self.awaited: dict[int, Awaited] = {}
        """By number."""
        self.adapter: Adapter | None = None
        self.adapter_version = 0
        self._swarm = swarm
        self._codecs = codecs
        self._opened: dict[Endpoint, tuple[int, int]] = {}
        self._asked: set[Endpoint] = set()  # to open, and not to close since
        self._adopted: dict[Endpoint, int] = {}
        self._closed = False
        self._inbox: queue.SimpleQueue[tuple[Endpoint, Message | SplitnetError] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def needs(self, budget: int, in_flight: int, prompt: int = 0) -> Needs:
        """What a session that reserves `budget` positions, and begins with `prompt` of them, wants of its route."""
        positions = USUAL_POSITIONS if in_flight > 1 else positions_with_prompt(prompt)
        return Needs(budget, self._codecs.encodings, self.blocks, positions, in_flight)

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
        return failed or self._hand_out_adapter()

    def resize(self, budget: int) -> dict[str, SplitnetError]:
        """Reserves `budget` positions on all hops; returns why which refused."""
        return self._open_hops(range(len(self.hops)), budget)

    def dropped_hops(self) -> list[Endpoint]:
        """Hops that were given up and never replaced, as nobody could take their place."""
        return [hop.endpoint for hop in self.hops if hop.endpoint not in self._opened]

    def drop(self, endpoint: Endpoint) -> None:
        """Has a hop forget the session."""
        self._opened.pop(endpoint, None)
        self._adopted.pop(endpoint, None)
        self._asked.discard(endpoint)
        self._swarm.send(endpoint, Close(self.session))

    def close(self) -> None:
        """Has all hops forget the session; from any thread. One that waits for an event gets `SessionClosed`."""
        self._closed = True
        for endpoint in list(self._asked):
            self.drop(endpoint)
        self._inbox.put(None)

    def refuse_if_closed(self) -> None:
        """Raises SessionClosed after `close`."""
        if self._closed:
            raise SessionClosed("the session was closed while it was used: begin with a new one")

    @property
    def first(self) -> Endpoint:
        """The hop that the client sends to."""
        return self.hops[0].endpoint

    @property
    def tail(self) -> Endpoint:
        """The hop that runs the last of the blocks."""
        return self.hops[-1].endpoint

    def send(self, endpoint: Endpoint, message: Message) -> None:
        """Sends a message of the session."""
        self.traffic.bytes_sent += self._swarm.send(endpoint, message)

    def send_step(self, step: Step, kept: int, *, to: int = 0) -> None:
        """Sends a step into the hop at index `to`; its result is awaited under its number."""
        self.expect(step.number, AwaitedStep(step, kept))
        self.traffic.steps += 1
        self.send(self.hops[to].endpoint, step)

    def ask_replay(self, index: int, number: int, until: int) -> None:
        """Has the hop at `index` send its log to the next hop again; the end of it is awaited under `number`."""
        self.expect(number, AwaitedReplay())
        self._swarm.send(self.hops[index].endpoint, Replay(self.session, self.epoch, number, until))

    def expect(self, number: int, awaited: Awaited) -> None:
        """Awaits answers that name `number`."""
        with self._lock:
            self.awaited[number] = awaited

    def send_all_again(self) -> None:
        """Sends what has not been answered, in the current epoch."""
        for number in sorted(self.awaited):
            self.awaited[number].send_again(self)

    def use_adapter(self, adapter: Adapter | None) -> dict[str, SplitnetError]:
        """Has the blocks run with other parameters of the client; returns why which hops refused them."""
        self.adapter = adapter
        self.adapter_version += 1
        return self._hand_out_adapter() if self._opened else {}

    def endpoints(self) -> list[Endpoint]:
        """All hops in order."""
        return [hop.endpoint for hop in self.hops]

    def adapted_hops(self) -> set[Endpoint]:
        """Hops with a part of the adapter."""
        adapter = self.adapter
        return {hop.endpoint for hop in self.hops if adapter is not None and adapter.within(*hop.blocks)}

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
            self.awaited.pop(number, None)

    def receive(self, timeout_s: float) -> tuple[Endpoint, SplitnetError] | None:
        """Waits for the next event and takes in results.

        Returns:
            A peer and what went wrong there, or None if a result came or nothing that matters now.

        Raises:
            queue.Empty: nothing came in `timeout_s` seconds.
            SessionClosed: another thread has closed the session.
        """
        source, item = self._next_event(timeout_s)
        if isinstance(item, SplitnetError):
            return (source, item) if source in self._opened else None
        if getattr(item, "epoch", None) != self.epoch:
            return None
        number: int = getattr(item, "number", 0)
        if isinstance(item, Failure) and (number in self.awaited or not number):
            return source, error_of(item, source)
        awaited = self.awaited.get(number)
        if awaited is not None:
            if isinstance(item, Result) and isinstance(awaited, AwaitedStep) and not awaited.step.replay_until:
                self.timings = item.timings
            if isinstance(item, Result | Gradient | AdapterGradient | Recalled):
                self.traffic.bytes_received += len(item.payload)
            awaited.take(source, item, self)
        return None

    def deliver(self, source: Endpoint, message: Message) -> None:
        """Takes a message from the transport's thread; what only has to be carried on is sent at once."""
        if isinstance(message, Result) and message.end != self.blocks[1] and len(message.payload):
            self._carry(source, message)
        elif isinstance(message, Gradient) and message.boundary != self.blocks[0]:
            self._carry_back(source, message)
        else:
            self._inbox.put((source, message))

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        """Takes from the transport's thread that a link of the client is lost or refused."""
        if endpoint in self._opened:
            self._inbox.put((endpoint, error))

    def _carry(self, source: Endpoint, result: Result) -> None:
        """The client between two hops that cannot reach each other."""
        with self._lock:
            awaited = self.awaited.get(result.number)
        message = awaited.message if awaited is not None else None
        if message is None or result.epoch != self.epoch:
            return
        for hop, following in itertools.pairwise(self.hops):
            if hop.endpoint == source and hop.carried and hop.planned.end == result.end:
                carried = replace(
                    message,
                    epoch=self.epoch,
                    codec=result.codec,
                    payload=result.payload,
                    boundary=result.end,
                    timings=result.timings,
                )
                if isinstance(message, Step):
                    self._log_carried(hop, message, result)
                self.traffic.bytes_received += len(result.payload)
                self.send(following.endpoint, carried)

    def _carry_back(self, source: Endpoint, gradient: Gradient) -> None:
        for hop, following in itertools.pairwise(self.hops):
            if following.endpoint == source and hop.carried and hop.planned.end == gradient.boundary:
                self.traffic.bytes_received += len(gradient.payload)
                self.send(hop.endpoint, gradient)

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
        self.refuse_if_closed()
        asked: list[Hop] = []
        failed: dict[str, SplitnetError] = {}
        for index in indexes:
            hop = self.hops[index]
            state = self._swarm.link_state(hop.endpoint)
            if state.is_final:
                failed[hop.name] = refusal(hop.endpoint, state)
            else:
                asked.append(hop)
                self._swarm.send(hop.endpoint, self._open_message(index, budget))
                self._asked.add(hop.endpoint)  # only now, or a thread that closes the session could miss it

        def opened(hop: Hop, item: Message) -> bool:
            if not isinstance(item, Opened):
                return False
            hop.carried |= not item.next_reachable
            hop.cached_positions = item.cached_positions
            return True

        return failed | self._answers(asked, opened)

    def _hand_out_adapter(self) -> dict[str, SplitnetError]:
        """Sends the hops that lack it their parts of the adapter, and waits until they have taken them over."""
        asked: list[Hop] = []
        for hop in self.hops if self.adapter is not None else ():
            tensors = self.adapter.within(*hop.blocks) if self.adapter is not None else {}
            if tensors and self._adopted.get(hop.endpoint) != self.adapter_version:
                for remaining, payload in counted_down(write_groups(tensors)):
                    self.send(
                        hop.endpoint, AdapterMessage(self.session, self.epoch, self.adapter_version, remaining, payload)
                    )
                asked.append(hop)

        def adopted(hop: Hop, item: Message) -> bool:
            if not isinstance(item, Adopted) or item.version != self.adapter_version:
                return False
            self._adopted[hop.endpoint] = item.version
            return True

        return self._answers(asked, adopted)

    def _answers(self, asked: Sequence[Hop], take: Callable[[Hop, Message], bool]) -> dict[str, SplitnetError]:
        """Waits until all hops have answered; `take` tells whether a message is the answer. Returns who failed, why."""
        waiting = {hop.endpoint: hop for hop in asked}
        deadlines = {endpoint: time.monotonic() + self._patience_s(endpoint) for endpoint in waiting}
        failed: dict[str, SplitnetError] = {}
        while waiting:
            late = min(waiting, key=lambda endpoint: deadlines[endpoint])
            try:
                source, item = self._next_event(deadlines[late] - time.monotonic())
            except queue.Empty:
                failed[waiting.pop(late).name] = PeerLost(
                    f"the peer at {late.address} does not answer: check its network and firewall"
                )
                continue
            if source not in waiting:
                continue
            if isinstance(item, SplitnetError):
                failed[waiting.pop(source).name] = item
            elif getattr(item, "epoch", None) != self.epoch:
                continue
            elif isinstance(item, Failure) and not item.number:
                failed[waiting.pop(source).name] = error_of(item, source)
            elif take(waiting[source], item):
                del waiting[source]
        return failed

    def _next_event(self, timeout_s: float) -> tuple[Endpoint, Message | SplitnetError]:
        self.refuse_if_closed()
        event = self._inbox.get(timeout=max(0.0, timeout_s))
        self.refuse_if_closed()
        assert event is not None
        return event

    def _patience_s(self, endpoint: Endpoint) -> float:
        return REOPEN_TIMEOUT_S if self._swarm.link_state(endpoint) is LinkState.DOWN else OPEN_TIMEOUT_S

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
