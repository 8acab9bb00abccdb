"""The requests of a session, with their answers; a request can be sent again on another route."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from scheduler.batching import DECODE_POSITIONS
from splitnet.blocks.adapters import DTYPES, read_tensors
from splitnet.errors import ProtocolError, SplitnetError
from splitnet.wire.codecs import are_finite, check_size, check_values
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import (
    MAX_POSITIONS,
    AdapterGradient,
    FetchedKV,
    FetchKV,
    Forward,
    Gradient,
    Message,
    Payload,
    Replay,
    Result,
    Step,
    Tapped,
)


class OpenRoute(Protocol):
    """The part of an open route that requests use; see `splitnet.session.machine.SessionState`."""

    epoch: int
    hidden_size: int
    blocks: tuple[int, int]

    @property
    def first_hop(self) -> Endpoint: ...

    @property
    def tail(self) -> Endpoint: ...

    def send_message(self, endpoint: Endpoint, message: Message) -> None: ...

    def endpoints(self) -> list[Endpoint]: ...

    def maker_of(self, boundary: int) -> Endpoint: ...

    def adapted_hops(self) -> dict[Endpoint, dict[str, Tensor]]: ...


Sent = TypeVar("Sent", Step, Forward, Step | Replay, FetchKV)


@dataclass(slots=True, eq=False)
class Request(ABC, Generic[Sent]):
    """A request of the caller, or a replay.

    Attributes:
        message: the message that makes the request.
        error: why the request has failed; None: it has not failed.
        predicted_ms: predicted time; 0: unknown.
    """

    message: Sent
    _: KW_ONLY
    error: SplitnetError | None = None
    predicted_ms: float = 0.0

    @property
    def number(self) -> int:
        """The number that answers refer to."""
        return self.message.number

    @property
    @abstractmethod
    def is_done(self) -> bool: ...

    @property
    def decodes(self) -> bool:
        """Whether the request is a decode step, whose answer is due soon."""
        return False

    @abstractmethod
    def send(self, route: OpenRoute) -> None:
        """Sends the request in the route's epoch, and drops earlier answers."""

    @abstractmethod
    def take_answer(self, source: Endpoint, message: Message, route: OpenRoute) -> bool:
        """Handles a message; returns whether the message was an answer. Raises ProtocolError, AdapterError: the answer
        cannot be used."""


@dataclass(slots=True, eq=False)
class StepRequest(Request[Step]):
    """New positions; the tail returns `kept` outputs.

    Attributes:
        taps: boundaries at which hops return hidden states, in rising order.
        tapped: received hidden states, by boundary.
        makers: names of the route's hops at the first unusable answer; empty: all answers were usable.
        useless: number of unusable answers after the first.
        replaces: the step overwrites positions that were sent before.
    """

    kept: int
    taps: tuple[int, ...] = ()
    result: Result | None = None
    tapped: dict[int, Tapped] = field(default_factory=dict[int, Tapped])
    makers: list[str] = field(default_factory=list)
    useless: int = 0
    replaces: bool = False

    @property
    def is_done(self) -> bool:
        return self.result is not None and len(self.tapped) == len(self.taps)

    @property
    def decodes(self) -> bool:
        return self.message.positions <= DECODE_POSITIONS

    def send(self, route: OpenRoute) -> None:
        self.result, self.tapped = None, {}
        self.message = replace(self.message, epoch=route.epoch)
        route.send_message(route.first_hop, self.message)

    def take_answer(self, source: Endpoint, message: Message, route: OpenRoute) -> bool:
        match message:
            case Result() if source == route.tail and message.end == route.blocks[1]:
                check_size(message.codec, message.payload, self.kept, route.hidden_size)
                self.result = message
            case Tapped(boundary=boundary) if boundary in self.taps and source == route.maker_of(boundary):
                check_size(message.codec, message.payload, self.kept, route.hidden_size)
                self.tapped.setdefault(boundary, message)
            case _:
                return False
        return True


def check_beside(step: Step, in_flight: Collection[StepRequest]) -> None:
    """Raises SplitnetError for a step that must not be sent while these requests are under way."""
    if step.forks and in_flight:
        # A hop does not fork rows twice, so a step that was lost before the fork could not be repeated.
        raise SplitnetError("rows cannot be forked while steps are under way: wait for the steps first")
    starts = {part.row: part.start for part in step.parts}
    for request in in_flight:
        parts = request.message.parts
        if any(part.start < starts.get(part.row, 0) < part.start + part.length for part in parts):
            # If the older step were lost, its first positions, which the new step needs, would not be sent again.
            raise SplitnetError(
                "a step cannot begin inside a step under way: wait for that step, or begin where it begins"
            )
        if len({starts.get(part.row, MAX_POSITIONS) < part.start + part.length for part in parts}) > 1:
            # The older step would be dropped, and with it positions of other rows that later steps need.
            raise SplitnetError(
                "a step cannot undo only some rows of a step under way: wait for that step, or undo all its rows"
            )


def undone_by(step: Step, in_flight: Iterable[StepRequest]) -> list[StepRequest]:
    """Steps under way that a new step undoes because it begins before their end. They must not be sent again."""
    starts = {part.row: part.start for part in step.parts}
    rows = {fork.row for fork in step.forks} if step.forks is not None else None
    return [
        request
        for request in in_flight
        if any(
            (rows is not None and part.row not in rows)
            or starts.get(part.row, MAX_POSITIONS) < part.start + part.length
            for part in request.message.parts
        )
    ]


@dataclass(slots=True, eq=False)
class ReplayRequest(Request[Step | Replay]):
    """A part of a log that is replayed by the client, or by a hop that is asked. The hop `last` answers."""

    to: Endpoint
    last: Endpoint
    ended: bool = False

    @property
    def is_done(self) -> bool:
        return self.ended

    def send(self, route: OpenRoute) -> None:
        route.send_message(self.to, self.message)

    def take_answer(self, source: Endpoint, message: Message, route: OpenRoute) -> bool:
        if isinstance(message, Result) and source == self.last:
            self.ended = True
        elif isinstance(message, Result) and source == self.to:
            if not getattr(self.message, "since", 0):
                raise ProtocolError("the hop has nothing to replay")
            self.ended = True  # the next hops hold all positions of the log
        return self.ended


KV_WIDTH = 8  # largest width of a position's keys, and of its values, in hidden sizes
PART_BYTES = 1024  # bytes counted for each message in addition to its payload, and for each tensor to its numbers


def most_bytes(sizes: Iterable[int]) -> int:
    """Largest number of bytes of messages with tensors of these sizes in bytes."""
    return sum(size + 2 * PART_BYTES for size in sizes)


@dataclass(slots=True)
class HopParts:
    """Data of several hops, each in one or several messages."""

    parts: dict[Endpoint, list[Payload]] = field(default_factory=dict)
    _left: dict[Endpoint, int] = field(default_factory=dict)  # bytes that each unfinished hop may still send
    _remaining: dict[Endpoint, int] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether all expected data have arrived."""
        return not self._left

    def expect_parts(self, expected: Mapping[Endpoint, int]) -> None:
        """Drops earlier parts. expected: hops that will send data, with their largest number of bytes."""
        self.parts, self._left, self._remaining = {}, dict(expected), {}

    def take_part(self, source: Endpoint, message: AdapterGradient | FetchedKV) -> bool:
        """Adds a part; False if no part of this hop is missing. Raises ProtocolError: the part is not due."""
        if source not in self._left:
            return False
        if message.remaining != self._remaining.get(source, message.remaining + 1) - 1:
            raise ProtocolError("its parts are not in order")
        self._left[source] -= len(message.payload) + PART_BYTES
        if self._left[source] < 0:
            raise ProtocolError("it sends more than was asked for")
        self._remaining[source] = message.remaining
        self.parts.setdefault(source, []).append(message.payload)
        if not message.remaining:
            del self._left[source]
        return True


@dataclass(slots=True, eq=False)
class PassRequest(Request[Forward]):
    """A pass over whole sequences: its output, and after `Backward` its gradients."""

    result: Result | None = None
    back: BackwardState | None = None
    gradient: Gradient | None = None

    @property
    def is_done(self) -> bool:
        return self.result is not None if self.back is None else self.back.batch.is_done

    @property
    def is_on_way_back(self) -> bool:
        """Whether the forward pass is done and a gradient may be under way."""
        return self.back is not None and self.result is not None

    def send(self, route: OpenRoute) -> None:
        self.result, self.gradient = None, None
        if self.back is not None:
            self.back.batch.sent = 0
        self.message = replace(self.message, epoch=route.epoch)
        route.send_message(route.first_hop, self.message)

    def take_answer(self, source: Endpoint, message: Message, route: OpenRoute) -> bool:
        match message:
            case Result() if self.result is None and source == route.tail and message.end == route.blocks[1]:
                check_values(message.codec, message.payload, self.message.positions, route.hidden_size)
                self.result = message
                if self.back is not None:
                    self.back.batch.send_ready(route)
            case Gradient() if (
                self.gradient is None and source == route.first_hop and message.boundary == route.blocks[0]
            ):
                check_values(message.codec, message.payload, self.message.positions, route.hidden_size)
                self.gradient = message
            case AdapterGradient() if self.back is not None:
                return self.back.batch.take_part(source, message)
            case _:
                return False
        return True


@dataclass(slots=True)
class BackwardState:
    """The batch of a backward pass, and the encoded gradient by the output."""

    batch: Batch
    codec: int
    payload: Payload


@dataclass(slots=True)
class Batch:
    """Passes that go back together.

    Hops sum the gradients by the adapter in the order of the passes, so all passes are done, or repeated, together.

    Attributes:
        sums: parts of the gradients by the adapter, until all parts of a hop have arrived and are valid.
        by_adapter: the gradients by the adapter, by the name of the tensor.
        sent: number of passes that were sent back, in order; 0 again when they are repeated.
    """

    passes: list[PassRequest]
    sums: HopParts = field(default_factory=HopParts)
    by_adapter: dict[str, Tensor] = field(default_factory=dict)
    sent: int = 0
    _adapted: dict[Endpoint, dict[str, Tensor]] = field(default_factory=dict)  # the adapter's tensors by hop

    @property
    def is_done(self) -> bool:
        came = all(each.gradient is not None for each in self.passes) and self.sums.is_complete
        return came and not self.sums.parts

    def take_part(self, source: Endpoint, message: AdapterGradient) -> bool:
        """As `Request.take_answer`, for a part of the gradients by the adapter."""
        if not self.sums.take_part(source, message):
            return False
        if not message.remaining:
            found: dict[str, Tensor] = {}
            for payload in self.sums.parts[source]:
                found.update(read_tensors(payload))
            own, given = ({name: each.shape for name, each in part.items()} for part in (self._adapted[source], found))
            if given != own or any(each.dtype not in DTYPES for each in found.values()):
                raise ProtocolError("its gradients are of other parameters than the adapter has")
            if not are_finite(found.values()):
                raise ProtocolError("its gradients are not finite")
            self.by_adapter.update(found)
            del self.sums.parts[source]
        return True

    def go_back(self, adapter: int, route: OpenRoute) -> None:
        """Sends the gradients by the output back. After a change of route or adapter, the passes first run
        forward again.
        """
        if all(each.message.epoch == route.epoch and each.message.adapter == adapter for each in self.passes):
            self.send_ready(route)
            return
        for each in self.passes:
            each.message = replace(each.message, adapter=adapter)
            each.send(route)

    def send_ready(self, route: OpenRoute) -> None:
        """Sends back the passes with outputs, in order."""
        last = self.passes[-1]
        while self.sent < len(self.passes) and (result := self.passes[self.sent].result) is not None:
            forward, back, since = self.passes[self.sent].message, self.passes[self.sent].back, self.passes[0].number
            if not self.sent:
                self._adapted, self.by_adapter = route.adapted_hops() if forward.adapter else {}, {}
                sizes = {hop: (each.nbytes for each in part.values()) for hop, part in self._adapted.items()}
                self.sums.expect_parts({hop: most_bytes(nbytes) for hop, nbytes in sizes.items()})
            assert back is not None
            ids, held = (forward.session, forward.epoch, forward.number), forward.number != last.number
            route.send_message(route.tail, Gradient(*ids, result.end, since, held, back.codec, back.payload))
            self.sent += 1


@dataclass(slots=True, eq=False)
class FetchRequest(Request[FetchKV]):
    """Fetches the keys and values of a row from every hop."""

    found: HopParts = field(default_factory=HopParts)
    sent: bool = False

    @property
    def is_done(self) -> bool:
        return self.sent and self.found.is_complete

    def send(self, route: OpenRoute) -> None:
        self.sent = True
        self.message = replace(self.message, epoch=route.epoch)
        count, position_bytes = route.blocks[1] - route.blocks[0], 4 * KV_WIDTH * route.hidden_size
        most = most_bytes([self.message.length * position_bytes] * 2 * count)
        self.found.expect_parts(dict.fromkeys(route.endpoints(), most))
        for endpoint in route.endpoints():
            route.send_message(endpoint, self.message)

    def take_answer(self, source: Endpoint, message: Message, route: OpenRoute) -> bool:
        return isinstance(message, FetchedKV) and self.found.take_part(source, message)
