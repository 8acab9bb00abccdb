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
class FromHops:
    """What several hops send, each in one or several messages."""

    parts: dict[Endpoint, list[Payload]] = field(default_factory=dict)
    _whole: set[Endpoint] = field(default_factory=set)
    _expected: set[Endpoint] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether all that is expected has come."""
        return self._expected <= self._whole

    def begin(self, expected: set[Endpoint]) -> None:
        """Forgets what came before; these hops will send something."""
        self.parts, self._whole, self._expected = {}, set(), expected

    def take(self, source: Endpoint, message: AdapterGradient | Recalled) -> None:
        self.parts.setdefault(source, []).append(message.payload)
        if not message.remaining:
            self._whole.add(source)


@dataclass(slots=True)
class AwaitedPass(Awaited):
    """A pass over whole sequences: its output, and once it goes back the gradients of its batch."""

    forward: Forward
    result: Result | None = None
    back: WayBack | None = None
    gradient: Gradient | None = None

    @property
    def done(self) -> bool:
        return self.result is not None if self.back is None else self.back.batch.done

    @property
    def message(self) -> Forward:
        return self.forward

    def send(self, route: Route) -> None:
        """Sends it through the blocks, in the route's epoch."""
        self.result, self.gradient = None, None
        if self.back is not None:
            self.back.batch.rewind()
        self.forward = replace(self.forward, epoch=route.epoch)
        route.send(route.first, self.forward)

    def take(self, source: Endpoint, message: Message, route: Route) -> None:
        match message:
            case Result() if source == route.tail:
                self.result = message
                if self.back is not None:
                    self.back.batch.send_ready(route)
            case Gradient() if source == route.first:
                self.gradient = message
            case AdapterGradient() if self.back is not None:
                self.back.batch.sums.take(source, message)
            case _:
                pass

    def send_again(self, route: Route) -> None:
        if not self.done:
            self.send(route)


@dataclass(slots=True)
class WayBack:
    """What a pass goes back with."""

    batch: AwaitedBatch
    codec: int
    payload: Payload
    """The encoded gradient by the output."""


@dataclass(slots=True)
class AwaitedBatch:
    """Passes that go back together.

    Hops add up their gradients by the adapter in the order of the passes, so all are done, or repeated, as one.
    """

    passes: list[AwaitedPass]
    sums: FromHops = field(default_factory=FromHops)
    """The gradients by the adapter."""
    _sent: int = 0
    """How many passes have been sent back, the first ones."""

    @property
    def done(self) -> bool:
        return all(each.gradient is not None for each in self.passes) and self.sums.whole

    @property
    def by_adapter(self) -> dict[Endpoint, list[Payload]]:
        return self.sums.parts

    def go_back(self, adapter: int, route: Route) -> None:
        """Sends the gradients by the output up the route.

        The passes themselves are done again if the route is another by now, or the blocks ran with another adapter
        meanwhile.
        """
        if all(each.forward.epoch == route.epoch and each.forward.adapter == adapter for each in self.passes):
            self.send_ready(route)
            return
        for each in self.passes:
            each.forward = replace(each.forward, adapter=adapter)
            each.send(route)

    def rewind(self) -> None:
        """The passes are done again."""
        self._sent = 0

    def send_ready(self, route: Route) -> None:
        """Sends back what can go back, in order."""
        while self._sent < len(self.passes) and self.passes[self._sent].result is not None:
            if not self._sent:
                self.sums.begin(route.adapted_hops() if self.passes[0].forward.adapter else set())
            self._send(self.passes[self._sent], route)
            self._sent += 1

    def _send(self, which: AwaitedPass, route: Route) -> None:
        forward, result, back = which.forward, which.result, which.back
        assert result is not None and back is not None
        since, held = self.passes[0].forward.number, which is not self.passes[-1]
        route.send(
            route.tail,
            Gradient(forward.session, forward.epoch, forward.number, result.end, since, held, back.codec, back.payload),
        )


@dataclass(slots=True)
class AwaitedRecall(Awaited):
    """Keys and values of a row, from every hop."""

    recall: Recall
    found: FromHops = field(default_factory=FromHops)

    @property
    def done(self) -> bool:
        return self.found.whole

    def send(self, route: Route) -> None:
        """Asks all hops, in the route's epoch."""
        self.recall = replace(self.recall, epoch=route.epoch)
        self.found.begin(set(route.endpoints()))
        for endpoint in route.endpoints():
            route.send(endpoint, self.recall)

    def take(self, source: Endpoint, message: Message, route: Route) -> None:
        if isinstance(message, Recalled):
            self.found.take(source, message)

    def send_again(self, route: Route) -> None:
        if not self.done:
            self.send(route)
