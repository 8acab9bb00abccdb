"""A session that generates: rows of positions whose KV caches live along a route of peers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from scheduler.prefill import SIZES, best_step
from splitnet.client.awaited import Awaited, AwaitedRecall, AwaitedReplay, AwaitedStep
from splitnet.client.link_codecs import LinkCodecs
from splitnet.client.link_use import LinkUse, link_uses
from splitnet.client.parts import cut_into_steps
from splitnet.client.planner import Forecast
from splitnet.client.recovery import silence_s
from splitnet.client.replanning import Replanner
from splitnet.client.routed_session import RECOVERY_TIMEOUT_S, RoutedSession
from splitnet.client.swarm import Swarm
from splitnet.errors import PeerLost, SplitnetError
from splitnet.model.adapters import Adapter, read_tensors
from splitnet.net.codecs import codec_by_code
from splitnet.net.messages import MAX_PAYLOAD_BYTES, Fork, Part, Payload, Recall, Step, Timing
from splitnet.net.sent_log import SentLog

log = logging.getLogger(__name__)

Preference = Literal["latency", "throughput"]

DECODE_POSITIONS = 16
"""A step with at most so many positions tells how fast the hops decode."""

STEP_TIMEOUT_S = 120.0
THROUGHPUT_STEPS = 8
"""How many steps a session that asks for throughput has under way."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """New positions that were sent through the route."""

    numbers: tuple[int, ...]
    """Of the steps that carry them."""
    positions: int
    began: float
    """Seconds, as `time.perf_counter` tells."""
    repairs: int
    """Of the route, before."""
    alone: bool
    """Nothing else was under way, so the time that it takes tells about the route."""


class Session(RoutedSession):
    """KV caches of some rows along a route. One thread uses a session at a time.

    When a hop dies, the session replaces it and goes on with the same tokens; see `splitnet.client.recovery`.

    Args:
        swarm: the peers.
        budget: positions to reserve over all rows; grows when needed.
        codec: name of a codec for every link, or "auto" to choose by cost for each link.
        blocks: what the peers run of the model, `[start, end)`; None: all of it.
        prefer: "latency": the result of a step soonest; "throughput": most steps per second, for batches and training.
        step_timeout_s: how long a step may take in all.
        recovery_timeout_s: how long to wait for other peers when blocks of the route are served by nobody any more.

    Attributes:
        recoveries: repairs of the route so far.
    """

    def __init__(
        self,
        swarm: Swarm,
        *,
        budget: int,
        codec: str = "auto",
        blocks: tuple[int, int] | None = None,
        prefer: Preference = "latency",
        step_timeout_s: float = STEP_TIMEOUT_S,
        recovery_timeout_s: float = RECOVERY_TIMEOUT_S,
    ) -> None:
        if prefer not in ("latency", "throughput"):
            raise SplitnetError(f"a session prefers latency or throughput, not {prefer!r}")
        super().__init__(
            swarm,
            budget=budget,
            codecs=LinkCodecs(swarm, codec),
            blocks=blocks,
            in_flight=THROUGHPUT_STEPS if prefer == "throughput" else 1,
            step_timeout_s=step_timeout_s,
            recovery_timeout_s=recovery_timeout_s,
        )
        self._replanner = Replanner(swarm)
        self._under_way: set[UnderWay] = set()

    @property
    def timings(self) -> tuple[Timing, ...]:
        """What the last step met at each hop."""
        return self._chain.timings

    @property
    def compute_ms(self) -> float:
        """Time that the devices of all hops spent on the last step."""
        return sum(timing.compute_us for timing in self.timings) / 1000

    def reserve(self, positions: int) -> None:
        """Makes room for `positions` positions over all rows, on every hop.

        Raises:
            PeerBusy: a hop has no memory for so many.
        """
        if positions > self._budget:
            self._budget = positions
            if self._is_open:
                for error in self._chain.resize(positions).values():
                    if not isinstance(error, PeerLost):  # a lost hop is replaced by the next step
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
            PeerLost: a hop died or did not answer in time, and could not be replaced.
            CoverageError: blocks of a lost hop are served by nobody else.
            PeerFailed: a hop answered with an error.
            ContextTooLong: the rows are longer than the model or the hops allow.
            SessionClosed: another thread has closed the session.
        """
        return self.finish(self.begin(hidden, parts, forks))

    def begin(
        self,
        hidden: torch.Tensor,
        parts: Sequence[Part],
        forks: Sequence[Fork] | None = None,
        *,
        step_positions: int | None = None,
    ) -> UnderWay:
        """Sends new positions on their way; the arguments, and what may go wrong, are those of `step`.

        More may be sent before the first have come back. What the hops are to forget of them is said by where the
        next ones start.

        Args:
            step_positions: of the steps that they are cut into; None: chosen.

        Returns:
            What `finish` or `abandon` is to be called with.
        """
        self.open(len(hidden))
        if not self._under_way:
            self._repair_or_improve_route()
        began = time.perf_counter()
        codec = self._chain.first_codec
        if self._log is None:
            self._log = SentLog(codec.code, codec.bytes_per_position(self._swarm.facts.hidden_size))
        numbers: list[int] = []
        offset = 0
        for chunk in cut_into_steps(parts, step_positions or self.step_positions(len(hidden))):
            positions = sum(part.length for part in chunk)
            payload = codec.encode(hidden[offset : offset + positions])
            offset += positions
            numbers.append(self._send(tuple(chunk), tuple(forks) if forks is not None else None, payload))
            forks = None
        self.traffic.positions += offset
        sent = UnderWay(tuple(numbers), offset, began, len(self.recoveries), alone=not self._under_way)
        self._under_way.add(sent)
        return sent

    def finish(self, sent: UnderWay) -> torch.Tensor:
        """Waits for what was sent; returns and raises what `step` does. In the order of sending."""
        decodes = len(sent.numbers) == 1 and sent.positions <= DECODE_POSITIONS
        try:
            output = self._collect(sent.numbers, silence_s(self._replanner.usual_ms if decodes else 0.0))
        finally:
            self._under_way.discard(sent)
        if decodes and len(self.recoveries) == sent.repairs:
            if sent.alone:
                self._replanner.step_took((time.perf_counter() - sent.began) * 1000)
            self._chain.tell_survey(sent.positions)
        return output

    def abandon(self, sent: UnderWay) -> None:
        """Awaits it no longer: what it has done at the hops, the next positions that are sent undo."""
        self._under_way.discard(sent)
        for number in sent.numbers:
            self._chain.forget(number)

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Has the blocks run with parameters of the client; before the first step.

        Raises:
            PeerFailed: they do not fit the blocks.
        """
        if adapter is self._chain.adapter:
            return
        if self._log is not None:
            raise SplitnetError("the peers hold keys and values of another adapter: begin with a new cache")
        for error in self._chain.use_adapter(adapter).values():
            if not isinstance(error, PeerLost):  # a lost hop is replaced by the next step
                raise error

    def replay(self, index: int, until: int | None = None) -> None:
        """Has the hop at `index` send its log to the next hop again, and waits until that is done.

        Args:
            index: of the hop that sends.
            until: the boundary where the replay ends; None: the end of the next hop.

        Raises:
            PeerLost, PeerFailed: as in `step`.
        """
        number = self._next_number()
        self._chain.ask_replay(index, number, self.hops[index + 1].planned.end if until is None else until)
        self._collect([number], silence_s(0.0))

    def recall(self, row: int, length: int) -> dict[str, torch.Tensor]:
        """The keys and values that the peers hold of the first `length` positions of a row, without its prefix.

        Returns:
            Tensors of all blocks, named and shaped as the prefix of an adapter, see `splitnet.model.adapters`.

        Raises:
            PeerLost, PeerFailed: as in `step`.
        """
        number = self._next_number()
        awaited = AwaitedRecall(Recall(self.id, self._chain.epoch, number, row, length))
        self._chain.expect(number, awaited)
        awaited.send(self._chain)
        self._wait_for([number], silence_s(0.0))
        tensors: dict[str, torch.Tensor] = {}
        for endpoint in self._chain.endpoints():
            for part in awaited.found.parts[endpoint]:
                tensors.update(read_tensors(part))
        return tensors

    def forecast(self, positions: int) -> Forecast:
        """What a step of `positions` positions is expected to take on the open route."""
        return self._swarm.forecast(self.needs, [hop.planned for hop in self.hops], positions)

    def step_positions(self, positions: int) -> int:
        """The size of the steps that so many positions are cut into, which flow through the hops in a row."""
        if positions <= SIZES[0]:
            return positions
        self.open(positions)
        forecasts = {size: self.forecast(size) for size in {min(size, positions) for size in SIZES}}
        size = best_step(positions, lambda count: forecasts[count].latency_ms, lambda count: forecasts[count].stage_ms)
        return min(size, MAX_PAYLOAD_BYTES // (4 * self._swarm.facts.hidden_size))

    def links(self) -> list[LinkUse]:
        """The links of the open route in order, with the bytes that one decode token takes on each."""
        return link_uses(self._chain, self._swarm.facts.hidden_size) if self._is_open else []

    def _repair_or_improve_route(self) -> None:
        """Before a step: replaces what an earlier call could not, or moves to a better route if that pays."""
        if self._log is None:
            return
        recovery = self._recovery()
        try:
            recovery.replace_dropped_hops(self.needs)
            cached = self._log.positions
            planned = [hop.planned for hop in self.hops]
            route = self._replanner.better_route(planned, self.needs, cached, max(0, self._budget - cached))
            if route is not None:
                recovery.move(route, self.needs)
        finally:
            self.recoveries += recovery.done

    def _send(self, parts: tuple[Part, ...], forks: tuple[Fork, ...] | None, payload: Payload) -> int:
        assert self._log is not None
        chain = self._chain
        number = self._next_number()
        self._log.record(parts, forks, payload)
        step = Step(self.id, chain.epoch, number, parts, forks, 0, chain.first_codec.code, payload)
        chain.send_step(step, sum(part.keep for part in parts))
        return number

    def _collect(self, numbers: Sequence[int], patience_s: float) -> torch.Tensor:
        """The results of steps in order."""
        outputs = [self._decode(awaited) for awaited in self._wait_for(numbers, patience_s)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _wait_for(self, numbers: Sequence[int], patience_s: float) -> list[Awaited]:
        """What was awaited, once it is there; after so much silence it looks what is wrong."""
        recovery = self._recovery()
        deadline = time.monotonic() + self._step_timeout_s
        try:
            awaited = [self._chain.awaited[number] for number in numbers]
            for each in awaited:
                while not each.done:
                    self._await(deadline, patience_s, recovery)
            return awaited
        finally:
            self.recoveries += recovery.done
            for number in numbers:
                self._chain.forget(number)

    def _decode(self, awaited: Awaited) -> torch.Tensor:
        assert isinstance(awaited, AwaitedStep | AwaitedReplay) and awaited.result is not None
        kept = awaited.kept if isinstance(awaited, AwaitedStep) else 0
        return codec_by_code(awaited.result.codec).decode(awaited.result.payload, kept, self._swarm.facts.hidden_size)
