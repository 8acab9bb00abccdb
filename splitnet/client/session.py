"""A session: rows of positions whose KV caches live along a route of peers."""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from scheduler.codec_choice import choose_codec
from splitnet.client.swarm import PlannedHop, Swarm
from splitnet.errors import (
    ContextTooLong,
    CoverageError,
    NotAuthorized,
    PeerBusy,
    PeerFailed,
    PeerLost,
    SplitnetError,
    WrongSwarm,
)
from splitnet.net.codecs import CODECS, DEFAULT_INT8, Codec, codec_by_code, codec_by_name
from splitnet.net.messages import (
    MAX_PAYLOAD_BYTES,
    SESSION_BYTES,
    Close,
    Failure,
    FailureCode,
    Fork,
    Message,
    Open,
    Opened,
    Part,
    Payload,
    Replay,
    Result,
    Step,
    encode,
)
from splitnet.net.sent_log import SentLog
from splitnet.net.transport import Endpoint, LinkState

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
REOPEN_TIMEOUT_S = 2.0
"""For peers whose link was lost: time to come back, if they only restarted."""
STEP_TIMEOUT_S = 120.0
STEP_POSITIONS = 512
"""A longer prefill is cut into steps that flow through the hops one after the other."""


@dataclass(slots=True)
class Hop:
    """A hop of an open session."""

    planned: PlannedHop
    codec: Codec
    """What this hop encodes its output with."""
    carried: bool = False
    """Its next hop cannot be reached from it, so the client carries its output there."""
    compute_ms: float = 0.0
    """Device time of its last step that ended at the client."""

    @property
    def endpoint(self) -> Endpoint:
        return self.planned.endpoint

    @property
    def name(self) -> str:
        return self.planned.record.key.text


@dataclass(slots=True)
class Traffic:
    """What a session has moved so far."""

    steps: int = 0
    positions: int = 0
    bytes_sent: int = 0
    """By the client, headers included."""
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class LinkUse:
    """A link of a route and what one decode token costs on it."""

    sender: str
    receiver: str
    codec: str
    bytes_per_token: int
    """Of the message, without the framing and encryption of ZeroMQ."""


@dataclass(slots=True)
class _Pending:
    """A step or replay whose result is awaited."""

    step: Step | None
    """None for a replay."""
    kept: int
    result: Payload | None = None
    codec: int = 0


class Session:
    """KV caches of some rows along a route. One thread uses a session at a time.

    Args:
        swarm: the peers.
        budget: positions to reserve over all rows; grows when needed.
        codec: name of a codec for every link, or "auto" to choose by cost for each link.
        step_timeout_s: how long a step may take before its route counts as lost.
    """

    def __init__(
        self, swarm: Swarm, *, budget: int, codec: str = "auto", step_timeout_s: float = STEP_TIMEOUT_S
    ) -> None:
        if codec != "auto":
            codec_by_name(codec)
        self.id = secrets.token_bytes(SESSION_BYTES)
        self.hops: list[Hop] = []
        self.traffic = Traffic()
        self._swarm = swarm
        self._budget = max(1, budget)
        self._codec_name = codec
        self._step_timeout_s = step_timeout_s
        self._epoch = 0
        self._number = 0
        self._pending: dict[int, _Pending] = {}
        self._inbox: queue.SimpleQueue[tuple[Endpoint, Message | SplitnetError]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._log: SentLog | None = None
        self._first_codec = codec_by_name(DEFAULT_INT8)
        self._closed = False
        swarm.register(self)

    @property
    def is_open(self) -> bool:
        return bool(self.hops) and not self._closed

    def open(self) -> None:
        """Plans a route and reserves memory on it; called by the first step at the latest.

        Raises:
            CoverageError: blocks are served by nobody.
            PeerBusy: no peer of some blocks has memory for the budget.
            NotAuthorized: the peers do not accept this client's key.
            PeerLost: peers do not answer.
        """
        if self.is_open:
            return
        refused: dict[str, SplitnetError] = {}
        while True:
            try:
                route = self._swarm.plan(
                    positions=self._budget,
                    bytes_per_position=self._planned_bytes(),
                    exclude=refused,
                    fresh=bool(refused),
                )
            except (CoverageError, PeerBusy):
                present = {record.key.text for record in self._swarm.peers()}
                for name in reversed(refused):
                    if name in present:
                        # Why a peer that is there refused says more than that nobody else is.
                        raise refused[name] from None
                raise
            failed = self._open_route(route)
            if not failed:
                return
            for name, error in failed.items():
                log.info("peer %s is left out: %s", name, error)
            refused.update(failed)

    def reserve(self, positions: int) -> None:
        """Makes room for `positions` positions over all rows, on every hop.

        Raises:
            PeerBusy: a hop has no memory for so many.
        """
        if positions <= self._budget:
            return
        self._budget = positions
        if self.is_open:
            for error in self._exchange_open([self._open_message(index) for index in range(len(self.hops))]).values():
                if isinstance(error, SplitnetError):
                    raise error

    def step(self, hidden: torch.Tensor, parts: Sequence[Part], forks: Sequence[Fork] | None = None) -> torch.Tensor:
        """Sends new positions through the route.

        Args:
            hidden: `[positions, hidden]`, the positions of all parts in order.
            parts: which rows they belong to, and how many of each row's outputs to return.
            forks: rows to fork before, see `splitnet.net.messages.Step`.

        Returns:
            `[kept, hidden]` float32: the outputs that the parts keep, in order.

        Raises:
            PeerLost: a hop died or did not answer in time.
            PeerFailed: a hop answered with an error.
            ContextTooLong: the rows are longer than the model or the hops allow.
        """
        self.open()
        numbers: list[int] = []
        offset = 0
        for chunk in self._chunks(parts):
            positions = sum(part.length for part in chunk)
            payload = self._first_codec.encode(hidden[offset : offset + positions])
            offset += positions
            numbers.append(self._send_step(tuple(chunk), tuple(forks) if forks is not None else None, payload))
            forks = None
        self.traffic.positions += offset
        return self._collect(numbers)

    def replay(self, index: int, until: int | None = None) -> None:
        """Has the hop at `index` send its log to the next hop again, and waits until that is done.

        Args:
            index: of the hop that sends.
            until: the boundary where the replay ends; None: the end of the next hop.

        Raises:
            PeerLost, PeerFailed: as in `step`.
        """
        until = self.hops[index + 1].planned.end if until is None else until
        self._number += 1
        with self._lock:
            self._pending[self._number] = _Pending(None, 0)
        self._swarm.send(self.hops[index].endpoint, Replay(self.id, self._epoch, self._number, until))
        self._collect([self._number])

    def links(self) -> list[LinkUse]:
        """The links of the open route in order, with the bytes that one decode token takes on each."""
        if not self.hops:
            return []
        hidden = self._swarm.facts.hidden_size
        part = (Part(1, 1000, 1, 1),)
        codec = self._first_codec
        sender = "client"
        uses: list[LinkUse] = []
        for hop in self.hops:
            payload = bytes(codec.bytes_per_position(hidden))
            message = Step(self.id, self._epoch, 1000, part, None, 0, codec.code, payload)
            blocks = f"blocks {hop.planned.start}..{hop.planned.end - 1}"
            uses.append(LinkUse(sender, blocks, codec.name, sum(map(len, encode(message)))))
            sender = f"{blocks} via client" if hop.carried else blocks
            codec = hop.codec
        answer = Result(self.id, self._epoch, 1000, 0, codec.code, 1.0, bytes(codec.bytes_per_position(hidden)))
        uses.append(LinkUse(sender, "client", codec.name, sum(map(len, encode(answer)))))
        return uses

    def close(self) -> None:
        """Frees the memory on all hops."""
        if self._closed:
            return
        self._closed = True
        self._swarm.unregister(self)
        for hop in self.hops:
            self._swarm.send(hop.endpoint, Close(self.id))

    def deliver(self, source: Endpoint, message: Message) -> None:
        """Takes a message from the transport's thread; what only has to be carried on is sent at once."""
        if isinstance(message, Result) and message.end != self._swarm.facts.num_blocks:
            self._carry(source, message)
        else:
            self._inbox.put((source, message))

    def link_changed(self, endpoint: Endpoint, state: LinkState) -> None:
        """A link of the client was lost or refused."""
        if state is LinkState.REFUSED:
            self.link_failed(endpoint, _not_authorized(endpoint))
        else:
            self.link_failed(endpoint, PeerLost(f"the peer at {endpoint.address} is gone"))

    def link_failed(self, endpoint: Endpoint, error: SplitnetError) -> None:
        if any(hop.endpoint == endpoint for hop in self.hops):
            self._inbox.put((endpoint, error))

    def _open_route(self, route: Sequence[PlannedHop]) -> dict[str, SplitnetError]:
        """Opens all hops in parallel; returns why which of them failed."""
        self._epoch += 1
        self.hops = [Hop(planned, self._codec_after(route, index)) for index, planned in enumerate(route)]
        self._first_codec = self._client_codec(route[0])
        self._log = SentLog(self._first_codec.code, self._first_codec.bytes_per_position(self._swarm.facts.hidden_size))
        answers = self._exchange_open([self._open_message(index) for index in range(len(route))])
        failed = {name: answer for name, answer in answers.items() if isinstance(answer, SplitnetError)}
        if not failed:
            unreachable = [
                index
                for index, hop in enumerate(self.hops)
                if isinstance(answer := answers[hop.name], Opened) and not answer.next_reachable
            ]
            for index in unreachable:
                self.hops[index].carried = True
            if unreachable:
                answers = self._exchange_open([self._open_message(index) for index in unreachable])
                failed = {name: answer for name, answer in answers.items() if isinstance(answer, SplitnetError)}
        if failed:
            for hop in self.hops:
                self._swarm.send(hop.endpoint, Close(self.id))
            self.hops = []
            # Sessions are never opened twice under one id with other blocks.
            self._swarm.unregister(self)
            self.id = secrets.token_bytes(SESSION_BYTES)
            self._swarm.register(self)
        return failed

    def _open_message(self, index: int) -> tuple[Hop, Open]:
        hop = self.hops[index]
        previous = self.hops[index - 1] if index else None
        following = self.hops[index + 1] if index + 1 < len(self.hops) and not hop.carried else None
        return hop, Open(
            session=self.id,
            epoch=self._epoch,
            model=self._swarm.facts.fingerprint,
            start=hop.planned.start,
            end=hop.planned.end,
            budget=self._budget,
            codec=hop.codec.code,
            previous=previous.planned.record.key.raw if previous is not None and not previous.carried else b"",
            next_key=following.planned.record.key.raw if following else b"",
            next_address=following.planned.record.address if following else "",
        )

    def _exchange_open(self, requests: Sequence[tuple[Hop, Open]]) -> dict[str, Opened | SplitnetError]:
        """Sends `Open` messages and waits for the answer to each, by the name of the peer."""
        waiting = {hop.endpoint: hop.name for hop, _ in requests}
        deadlines: dict[Endpoint, float] = {}
        answers: dict[str, Opened | SplitnetError] = {}
        for hop, message in requests:
            state = self._swarm.link_state(hop.endpoint)
            if state is LinkState.REFUSED:
                answers[waiting.pop(hop.endpoint)] = _not_authorized(hop.endpoint)
            else:
                patience = REOPEN_TIMEOUT_S if state is LinkState.DOWN else OPEN_TIMEOUT_S
                deadlines[hop.endpoint] = time.monotonic() + patience
                self._swarm.send(hop.endpoint, message)
        while waiting:
            late = min(waiting, key=lambda endpoint: deadlines[endpoint])
            try:
                source, item = self._inbox.get(timeout=max(0.0, deadlines[late] - time.monotonic()))
            except queue.Empty:
                answers[waiting.pop(late)] = PeerLost(
                    f"the peer at {late.address} does not answer: check its network and firewall"
                )
                continue
            if source not in waiting:
                continue
            if isinstance(item, SplitnetError) or (isinstance(item, Opened) and item.epoch == self._epoch):
                answers[waiting.pop(source)] = item
            elif isinstance(item, Failure) and item.epoch == self._epoch:
                answers[waiting.pop(source)] = _error_of(item, source)
        return answers

    def _send_step(self, parts: tuple[Part, ...], forks: tuple[Fork, ...] | None, payload: Payload) -> int:
        assert self._log is not None
        self._number += 1
        step = Step(self.id, self._epoch, self._number, parts, forks, 0, self._first_codec.code, payload)
        self._log.record(parts, forks, payload)
        with self._lock:
            self._pending[self._number] = _Pending(step, sum(part.keep for part in parts))
        self.traffic.steps += 1
        self.traffic.bytes_sent += self._swarm.send(self.hops[0].endpoint, step)
        return self._number

    def _carry(self, source: Endpoint, result: Result) -> None:
        """The client between two hops that cannot reach each other."""
        with self._lock:
            pending = self._pending.get(result.number)
        index = next((i for i, hop in enumerate(self.hops) if hop.endpoint == source), None)
        if (
            pending is None
            or pending.step is None
            or index is None
            or result.epoch != self._epoch
            or index + 1 >= len(self.hops)
        ):
            return
        hop = self.hops[index]
        if hop.carried and hop.planned.end == result.end:
            hop.compute_ms = result.compute_ms
            carried = replace(pending.step, codec=result.codec, payload=result.payload)
            self.traffic.bytes_received += len(result.payload)
            self.traffic.bytes_sent += self._swarm.send(self.hops[index + 1].endpoint, carried)

    def _collect(self, numbers: Sequence[int]) -> torch.Tensor:
        """Waits for the results of steps and puts them together in order."""
        outputs: list[torch.Tensor] = []
        deadline = time.monotonic() + self._step_timeout_s
        try:
            for number in numbers:
                pending = self._pending[number]
                while pending.result is None:
                    self._await_result(deadline)
                hidden = self._swarm.facts.hidden_size
                outputs.append(codec_by_code(pending.codec).decode(pending.result, pending.kept, hidden))
        finally:
            with self._lock:
                for number in numbers:
                    self._pending.pop(number, None)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _await_result(self, deadline: float) -> None:
        try:
            source, item = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            names = " -> ".join(f"{hop.planned.start}:{hop.planned.end}" for hop in self.hops)
            raise PeerLost(f"no answer from the route {names} in {self._step_timeout_s:.0f} s: try again") from None
        if isinstance(item, SplitnetError):
            if self.hops and any(hop.endpoint == source for hop in self.hops):
                raise item
        elif isinstance(item, Result):
            pending = self._pending.get(item.number)
            if pending is not None and item.epoch == self._epoch and source == self.hops[-1].endpoint:
                self.hops[-1].compute_ms = item.compute_ms
                self.traffic.bytes_received += len(item.payload)
                pending.result, pending.codec = item.payload, item.codec
        elif isinstance(item, Failure) and item.epoch == self._epoch and item.number in self._pending:
            raise _error_of(item, source)

    def _chunks(self, parts: Sequence[Part]) -> list[list[Part]]:
        """Parts in steps of a bounded number of positions."""
        limit = min(STEP_POSITIONS, MAX_PAYLOAD_BYTES // (4 * self._swarm.facts.hidden_size))
        chunks: list[list[Part]] = [[]]
        room = limit
        for row, start, length, keep in parts:
            begun = 0
            while begun < length:
                if not room:
                    chunks.append([])
                    room = limit
                taken = min(room, length - begun)
                # What is kept are the last `keep` positions of the whole part.
                kept = max(0, min(taken, begun + taken - (length - keep)))
                chunks[-1].append(Part(row, start + begun, taken, kept))
                begun += taken
                room -= taken
        return chunks

    def _planned_bytes(self) -> int:
        name = DEFAULT_INT8 if self._codec_name == "auto" else self._codec_name
        return codec_by_name(name).bytes_per_position(self._swarm.facts.hidden_size)

    def _client_codec(self, first: PlannedHop) -> Codec:
        if self._codec_name != "auto":
            return codec_by_name(self._codec_name)
        return self._cheapest(self._swarm.link(first.record).bytes_per_ms, first.record.codecs)

    def _codec_after(self, route: Sequence[PlannedHop], index: int) -> Codec:
        """Codec of the link behind a hop: to the next one, or from the tail to the client."""
        if self._codec_name != "auto":
            return codec_by_name(self._codec_name)
        record = route[index].record
        if index + 1 == len(route):
            return self._cheapest(self._swarm.link(record).bytes_per_ms, record.codecs)
        following = route[index + 1].record
        shared = [name for name in record.codecs if name in following.codecs]
        return self._cheapest(self._swarm.link_between(record, following).bytes_per_ms, shared)

    def _cheapest(self, bytes_per_ms: float, spoken: Sequence[str]) -> Codec:
        known = [CODECS[name] for name in spoken if name in CODECS]
        name = choose_codec(
            {codec.name: codec.bytes_per_position(self._swarm.facts.hidden_size) for codec in known}, bytes_per_ms
        )
        return codec_by_name(name)


def _not_authorized(endpoint: Endpoint) -> NotAuthorized:
    return NotAuthorized(
        f"the peer at {endpoint.address} does not accept this client's key (or has another key than its record says): "
        "ask its owner to add the output of `splitnet key` to the peer's --authorized-keys file"
    )


_ERROR_OF_CODE: dict[int, type[SplitnetError]] = {
    FailureCode.BUSY: PeerBusy,
    FailureCode.WRONG_MODEL: WrongSwarm,
    FailureCode.TOO_LONG: ContextTooLong,
    FailureCode.UNKNOWN_SESSION: PeerLost,
}


def _error_of(failure: Failure, source: Endpoint) -> SplitnetError:
    kind = _ERROR_OF_CODE.get(failure.code, PeerFailed)
    return kind(f"the peer at {source.address} answered: {failure.text}")
