"""What a session waits for, and what has come of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Protocol

from splitnet.net.endpoints import Endpoint
from splitnet.net.messages import (
    AdapterGradient,
    Forward,
    Gradient,
    Message,
    Payload,
    Recall,
    Recalled,
    Result,
    Step,
)


class Route(Protocol):
    """The open route, as far as what travels on it needs it."""

    @property
    def epoch(self) -> int: ...

    @property
    def first(self) -> Endpoint: ...

    @property
    def tail(self) -> Endpoint: ...

    def send(self, endpoint: Endpoint, message: Message) -> None:
        """Sends and counts the bytes."""
        ...

    def endpoints(self) -> list[Endpoint]:
        """All hops in order."""
        ...

    def adapted_hops(self) -> set[Endpoint]:
        """Hops with a part of the session's adapter."""
        ...


class Awaited(ABC):
    """Something that was asked for."""

    @property
    @abstractmethod
    def done(self) -> bool: ...

    @property
    def message(self) -> Step | Forward | None:
        """What travels along the route, if the client sent it."""
        return None

    @abstractmethod
    def take(self, source: Endpoint, message: Message, route: Route) -> None:
        """Takes an answer in."""

    @abstractmethod
    def send_again(self, route: Route) -> None:
        """After the route was repaired; what answers came before count no more."""


@dataclass(slots=True)
class AwaitedStep(Awaited):
    """The result of a step that the client sent."""

    step: Step
    kept: int
    """Positions that come back."""
    result: Result | None = None

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def message(self) -> Step:
        return self.step

    def take(self, source: Endpoint, message: Message, route: Route) -> None:
        # Only the tail has the output of a step; the end of a replay may come from any hop.
        if isinstance(message, Result) and (self.step.replay_until or source == route.tail):
            self.result = message

    def send_again(self, route: Route) -> None:
        if not self.done:
            self.step = replace(self.step, epoch=route.epoch)
            route.send(route.first, self.step)


@dataclass(slots=True)
class AwaitedReplay(Awaited):
    """The end of the replay of a hop's log."""

    result: Result | None = None

    @property
    def done(self) -> bool:
        return self.result is not None

    def take(self, source: Endpoint, message: Message, route: Route) -> None:
        if isinstance(message, Result):
            self.result = message

    def send_again(self, route: Route) -> None:
        pass  # who asked for it does so again


@dataclass(slots=True)
class AwaitedPass(Awaited):
    """A pass over whole sequences: its output, and then the gradients, if `back` is set."""

    forward: Forward
    result: Result | None = None
    back: tuple[int, Payload] | None = None
    """Codec and bytes of the gradient by the output, once the client has it."""
    gradient: Gradient | None = None
    by_adapter: dict[Endpoint, list[Payload]] = field(default_factory=dict)
    _whole: set[Endpoint] = field(default_factory=set)
    _expected: set[Endpoint] = field(default_factory=set)
    """Hops whose gradients have come, and those that will send some."""

    @property
    def done(self) -> bool:
        if self.back is None:
            return self.result is not None
        return self.gradient is not None and self._expected <= self._whole

    @property
    def message(self) -> Forward:
        return self.forward

    def send(self, route: Route) -> None:
        """Sends it through the blocks, in the route's epoch."""
        self.result, self.gradient = None, None
        self.by_adapter, self._whole = {}, set()
        self.forward = replace(self.forward, epoch=route.epoch)
        route.send(route.first, self.forward)

    def go_back(self, codec: int, payload: Payload, adapter: int, route: Route) -> None:
        """Sends the gradient by the output up the route.

        The pass itself is done again if the route is another by now, or the blocks ran with another adapter meanwhile.
        """
        self.back = codec, payload
        if self.forward.epoch == route.epoch and self.forward.adapter == adapter:
            self._send_gradient(route)
        else:
            self.forward = replace(self.forward, adapter=adapter)
            self.send(route)

    def take(self, source: Endpoint, message: Message, route: Route) -> None:
        match message:
            case Result() if source == route.tail:
                again, self.result = self.result is None, message
                if again and self.back is not None:
                    self._send_gradient(route)
            case Gradient() if source == route.first:
                self.gradient = message
            case AdapterGradient():
                self.by_adapter.setdefault(source, []).append(message.payload)
                if not message.remaining:
                    self._whole.add(source)
            case _:
                pass

    def send_again(self, route: Route) -> None:
        if not self.done:
            self.send(route)

    def _send_gradient(self, route: Route) -> None:
        assert self.back is not None and self.result is not None
        forward, end = self.forward, self.result.end
        self._expected = route.adapted_hops() if forward.adapter else set()
        route.send(route.tail, Gradient(forward.session, forward.epoch, forward.number, end, *self.back))


@dataclass(slots=True)
class AwaitedRecall(Awaited):
    """Keys and values of a row, from every hop."""

    recall: Recall
    parts: dict[Endpoint, list[Payload]] = field(default_factory=dict)
    _whole: set[Endpoint] = field(default_factory=set)
    _expected: set[Endpoint] = field(default_factory=set)

    @property
    def done(self) -> bool:
        return bool(self._expected) and self._expected <= self._whole

    def send(self, route: Route) -> None:
        """Asks all hops, in the route's epoch."""
        self.recall = replace(self.recall, epoch=route.epoch)
        self.parts, self._whole, self._expected = {}, set(), set(route.endpoints())
        for endpoint in route.endpoints():
            route.send(endpoint, self.recall)

    def take(self, source: Endpoint, message: Message, route: Route) -> None:
        if isinstance(message, Recalled):
            self.parts.setdefault(source, []).append(message.payload)
            if not message.remaining:
                self._whole.add(source)

    def send_again(self, route: Route) -> None:
        if not self.done:
            self.send(route)
