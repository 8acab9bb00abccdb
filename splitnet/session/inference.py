"""A session that generates: rows of positions with KV caches at the hops of a route."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from scheduler.batching import DECODE_POSITIONS
from scheduler.facts import ContextCost
from scheduler.liveness import PROGRESS_TIMEOUT_S
from scheduler.prefill_chunks import CHUNK_SIZES, best_chunk
from scheduler.route import ENERGY_SLOWDOWN
from splitnet.blocks.adapters import AdapterTensors, read_tensors
from splitnet.blocks.block_inputs import PositionInputs, encode_step
from splitnet.errors import PeerLied, ProtocolError, SplitnetError
from splitnet.session.driver import LinkCodecs, SessionDriver
from splitnet.session.events import Abandon, Distrust, EncodedPositions, LookUpPrefix, Resize, Submit, UseAdapter
from splitnet.session.failover import RouteHop
from splitnet.session.options import ConnectionOptions
from splitnet.session.prefix_lookup import LookUpNamespace, positions_to_look_up
from splitnet.session.requests import FetchRequest, StepRequest
from splitnet.session.standby import Standby, StandbyText
from splitnet.swarm.plan import Prediction
from splitnet.swarm.swarm import Swarm
from splitnet.wire.codecs import Codec, codec_by_code, codec_by_name
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import (
    MAX_INPUTS,
    MAX_PAYLOAD_BYTES,
    MAX_TAPS,
    AskReceipt,
    Chunk,
    CopiedPages,
    Failure,
    FetchedSent,
    FetchKV,
    FetchSent,
    Fork,
    Message,
    Receipt,
    Result,
    Step,
    Timing,
    encode,
)
from splitnet.wire.sent_log import ReplayStep

ASK_S = 2.0  # between two questions to hops about the times of decode steps
THROUGHPUT_STEPS = 8  # steps under way in a session that prefers throughput
_POSITION = 1000
_TIMING = Timing(500, 10_000, 500)  # usual values, to compute the usual size of a message


@dataclass(frozen=True, slots=True)
class LinkUse:
    """A link of a route. bytes_per_token: size of a decode step's message, without ZeroMQ's framing and encryption."""

    sender: str
    receiver: str
    codec: str
    bytes_per_token: int


class Audit(Protocol):
    """Watches the steps of a session, see `splitnet.audit.session_audit`. lie: names a hop that has lied; methods for
    steps raise it."""

    lie: PeerLied | None

    def step_begins(self, parts: Sequence[Chunk]) -> None: ...

    def step_done(self, request: StepRequest) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class UnderWay:
    """New positions under way on the route.

    began: seconds of `time.perf_counter`. repairs: number of earlier repairs of the route. alone: nothing else was
    under way.
    """

    requests: tuple[StepRequest, ...]
    began: float
    repairs: int
    alone: bool


@dataclass(frozen=True, slots=True)
class SentRow:
    """The first positions of a row as the client has sent them, for an audit.

    hops: the route. repairs: repairs of the route so far. payload: the encoded positions. steps: the same with their
    block inputs; the last step may be longer.
    """

    row: int
    length: int
    hops: tuple[RouteHop, ...]
    repairs: int
    codec: int
    payload: bytes
    steps: tuple[ReplayStep, ...]


class Session(SessionDriver):
    """KV caches of rows along a route. One thread uses a session at a time.

    The session replaces dead hops and then gives the same tokens; see `splitnet.session.machine`.

    options: see `splitnet.AutoModelForCausalLM.from_pretrained`. reservation: positions over all rows; grows on demand.
    blocks, progress_timeout_s: see `SessionDriver`. codecs: None: chosen by the options.
    """

    def __init__(
        self,
        swarm: Swarm,
        options: ConnectionOptions,
        *,
        reservation: int,
        blocks: tuple[int, int] | None = None,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
        codecs: LinkCodecs | None = None,
    ) -> None:
        slowdown = options.energy_slowdown or ENERGY_SLOWDOWN
        super().__init__(
            swarm,
            options,
            reservation=reservation,
            codecs=codecs or LinkCodecs(swarm, options.codec),
            blocks=blocks,
            in_flight=THROUGHPUT_STEPS if options.prefer == "throughput" else 1,
            energy_slowdown=slowdown if options.prefer == "energy" else None,
            progress_timeout_s=progress_timeout_s,
        )
        self._asked_at = 0.0
        self._prefixes = options.prefixes
        self._standby_rate = options.standby_rate
        self.standby: Standby | None = None
        self.passed = 0  # positions with received outputs
        self.audit: Audit | None = None
        self._questions: dict[tuple[Endpoint, int], Future[Message]] = {}  # without an answer, by hop and number

    @property
    def timings(self) -> tuple[Timing, ...]:
        """Times of the last step at each hop, as reported by the last hop."""
        return self.state.timings

    @property
    def compute_ms(self) -> float:
        """Time that the devices of all hops spent on the last step."""
        return sum(timing.compute_us for timing in self.timings) / 1000

    @property
    def taps(self) -> tuple[int, ...]:
        """See `use_taps`."""
        return self.state.taps

    def reserve(self, positions: int) -> None:
        """Reserves memory for `positions` over all rows, on every hop.

        Raises PeerBusy: a hop has no memory, and the session keeps its former reservation. Also raises as `open`.
        """
        if positions <= self.state.reservation:
            return
        if self.hops:
            self.open()  # only an open route keeps the former reservation after a refusal
        self.feed(Resize(positions))
        self._wait_until(lambda: self.state.is_settled)
        self._raise_if_broken()
        if self.state.refusal is not None:
            raise self.state.refusal

    def step(self, hidden: torch.Tensor, parts: Sequence[Chunk], forks: Sequence[Fork] | None = None) -> torch.Tensor:
        """Sends new positions through the route, and waits for the outputs.

        Args:
            hidden: `[positions, hidden]`, the positions of all parts in order.
            parts: the rows of the positions, and how many outputs of each row to return.
            forks: rows to fork before the step, see `splitnet.wire.messages.Step`.

        Returns:
            `[kept, hidden]` float32: the outputs that the parts keep, in order. With taps, the hidden states at the
            taps stand before each output: `[kept, (taps + 1) * hidden]`, see `use_taps`.

        Raises:
            PeerLost, CoverageError: a hop died or made no progress, and could not be replaced.
            PeerFailed: two hops answered with the same error.
            ContextTooLong: the rows are longer than the model allows.
            SessionClosed: another thread has closed the session.
        """
        return self.finish(self.begin(hidden, parts, forks))

    def begin(
        self,
        hidden: torch.Tensor,
        parts: Sequence[Chunk],
        forks: Sequence[Fork] | None = None,
        *,
        step_positions: int | None = None,
        rope_length: int = 0,
        inputs: Sequence[PositionInputs] = (),
    ) -> UnderWay:
        """Sends new positions, with the arguments and errors of `step`; `finish` or `abandon` must follow.

        Further positions may be sent before the outputs arrive. Hops forget all positions from a part's start on.

        Args:
            step_positions: largest number of positions of a step; None: chosen from predicted times.
            rope_length: see `splitnet.wire.messages.Step`.
            inputs: block inputs of each part; empty: none.
        """
        if self.audit is not None:
            self.audit.step_begins(parts)
        state = self.state
        begins_text = state.log is None or (forks is not None and not forks)
        inputs = [each.of_blocks(*state.blocks) for each in inputs]
        hit = self._look_up_prefix(hidden, parts, rope_length, inputs) if begins_text else 0
        self.open(len(hidden) - hit)
        if hit:
            hidden, forks, inputs = hidden[hit:], None, [each.cut(hit, len(hidden)) for each in inputs]
            parts = [Chunk(parts[0].row, hit, len(hidden), parts[0].keep)]
        if not state.in_flight_count and state.log is not None:
            self._improve_route()
        began, alone, repairs = time.perf_counter(), not state.in_flight_count, len(self.recoveries)
        prediction = self.predictions() if len(hidden) > DECODE_POSITIONS else None
        size = step_positions or (self.step_positions(len(hidden), prediction) if prediction else len(hidden))
        predicted_ms = prediction(min(size, len(hidden))).latency_ms if prediction is not None else 0.0
        codec = state.first_codec
        requests: list[StepRequest] = []
        offset = 0
        forked = tuple(forks) if forks is not None else None
        for chunk, own in cut_into_steps(parts, size, inputs):
            positions = sum(part.length for part in chunk)
            payload, described = encode_step(hidden[offset : offset + positions], chunk, own, codec)
            offset += positions
            ids = self.id, state.epoch, state.next_number()
            step = Step(*ids, tuple(chunk), forked, 0, codec.code, payload, rope_length=rope_length, inputs=described)
            forked = None
            kept = sum(part.keep for part in chunk)
            requests.append(StepRequest(step, kept, state.taps if kept else (), predicted_ms=predicted_ms))
            self.feed(Submit((requests[-1],)))
        self.traffic.steps += len(requests)
        self.traffic.positions += offset
        return UnderWay(tuple(requests), began, repairs, alone)

    def _look_up_prefix(
        self, hidden: torch.Tensor, parts: Sequence[Chunk], rope_length: int, inputs: Sequence[PositionInputs]
    ) -> int:
        """Opens the route for a new text, and returns how many of its first positions the hops had stored."""
        state, part, prefixes = self.state, parts[0], self.state.prefixes
        salt, most = prefixes.namespace.salt, positions_to_look_up(parts)
        if salt is None or state.in_flight_count or not most:
            prefixes.hit = prefixes.reused = 0
            return 0
        looked_up, own = Chunk(part.row, 0, most, 0), [each.cut(0, most) for each in inputs]
        encoded: Callable[[Codec], EncodedPositions] = cache(partial(encode_step, hidden[:most], [looked_up], own))
        text, index = LookUpPrefix(looked_up, encoded, rope_length), self._swarm.prefix_index
        self._stored = {}
        for name in tuple(index.codecs) if not self.hops else ():
            with suppress(SplitnetError):
                log = text.log(codec_by_name(name), state.hidden_size, salt)
                text.logs[log.codec] = log
                self._stored |= index.positions(log.labels(part.row))
        self.feed(text)
        self.open(len(hidden))
        return prefixes.hit

    def finish(self, sent: UnderWay) -> torch.Tensor:
        """Waits for the outputs, in the order of sending; returns and raises as `step`."""
        outputs: list[torch.Tensor] = []
        for request in sent.requests:
            output = None
            while output is None:
                self._wait_for([request])
                output = self._decoded(request)
            outputs.append(output)
            if self.audit is not None:
                self.audit.step_done(request)
            self.passed += request.message.positions
            if request.message.labels or (self._standby_rate and self.standby is None):
                self._note_stored(request.message)
            if not request.decodes:
                self.count_energy([request.result])
        if len(sent.requests) == 1 and sent.requests[0].decodes and len(self.recoveries) == sent.repairs:
            if sent.alone:
                self._routes.step_took((time.perf_counter() - sent.began) * 1000, sent.requests[0].message.positions)
                self.state.usual_ms = self._routes.watch.usual.value
            self._learn_timings(sent.requests[0].message.positions, at_once=sent.alone and self._routes.watch.surprised)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _note_stored(self, step: Step) -> None:
        """Adds the pages that hops have stored in a step to the index, and starts the standby."""
        state = self.state
        row = state.log.only_row if state.log is not None else None
        if state.log is None or row is None:
            return
        labels = state.log.labels(row)
        for hop in self.hops:
            pages = len(labels) if hop.stores else 0
            self._swarm.prefix_index.note(labels, hop.name, pages, state.first_codec.name)
        if self._standby_rate and self.standby is None:
            self.standby = Standby(self._swarm, self.id, self._standby_rate, self._stored_text, state.next_number)

    def _stored_text(self) -> StandbyText | None:
        with self._handling:
            state = self.state
            row = state.log.only_row if state.log is not None and state.is_open else None
            if state.log is None or row is None:
                return None
            return StandbyText(tuple(state.hops), state.log.labels(row), self.needs(), state.first_codec.name)

    def ask(self, hop: RouteHop, kind: type[AskReceipt | FetchSent], row: int, length: int) -> Future[Message]:
        """Asks a hop about the first `length` positions of a row; any thread may. The future stays undone without an
        answer; the answer may be a `Failure`."""
        with self._handling:
            number, answer = self.state.next_number(), Future[Message]()
            self._questions[hop.endpoint, number] = answer
            self._swarm.links.send(hop.endpoint, kind(self.id, self.state.epoch, number, row, length))
        return answer

    def sent_row(self, row: int, length: int) -> SentRow | None:
        """The first `length` positions of a row as the client has sent them; any thread may ask. None: the route is not
        open, or the row is shorter."""
        with self._handling:
            state, log = self.state, self.state.log
            if not state.is_open or log is None or log.length(row) < length:
                return None
            steps = [step for step in log.replay(only=row) if step.parts[0].start < length]
            facts = tuple(state.hops), len(self.recoveries), log.codec, log.first(row, length)
            return SentRow(row, length, *facts, tuple(steps))

    def deliver(self, source: Endpoint, message: Message) -> None:
        standby = self.standby
        if isinstance(message, Receipt | FetchedSent | Failure):
            answer = self._questions.pop((source, message.number), None)
            if answer is not None:
                answer.set_result(message)
                return
        if not isinstance(message, CopiedPages) or standby is None or not standby.received(message):
            super().deliver(source, message)

    def close(self) -> None:
        if self.standby is not None:
            self.standby.close()
        if self.audit is not None:
            self.audit.close()
        super().close()

    def abandon(self, sent: UnderWay) -> None:
        """Gives up the outputs. The next positions that are sent replace the abandoned ones at the hops."""
        self.feed(Abandon(tuple(request.number for request in sent.requests)))

    def use_adapter(self, adapter: AdapterTensors) -> None:
        """Sets the adapter of the blocks; once, before the first step. Raises PeerFailed: the adapter does not fit."""
        state = self.state
        if adapter is state.adapter:
            return
        if state.log is not None or state.adapter is not None:
            raise SplitnetError("the peers hold keys and values of another adapter: begin with a new cache")
        self.feed(UseAdapter(adapter))
        if state.hops:
            self.open()

    def use_taps(self, taps: Sequence[int]) -> None:
        """Returns hidden states at boundaries together with the outputs; only boundaries within the blocks count.

        Must come before the first step. Raises SplitnetError: too many boundaries.
        """
        start, end = self.state.blocks
        inner = sorted({tap for tap in taps if start < tap < end})
        if len(inner) > MAX_TAPS:
            raise SplitnetError(f"the hidden states of {len(inner)} depths are wanted: ask for {MAX_TAPS} at most")
        self.state.taps, self.state.tap_codec = tuple(inner), self._codecs.of_taps

    def use_namespace(self, name: str) -> None:
        """Sets the namespace of stored prefixes, before the first step; another namespace does not find the pages.

        With `prefixes="off"` hops store no pages; with "shared" all names are one namespace.
        """
        generation, shared = self._swarm.prefix_index.generation, self._prefixes == "shared"
        salt = b"shared" if shared else self._swarm.identity.derive(f"splitnet prefixes {generation} {name}")
        self.state.prefixes.namespace = LookUpNamespace(salt if self._prefixes != "off" else None, shared)

    @property
    def prefix_hit(self) -> int:
        """First positions of the text that at least one hop had stored, so that the client did not send them."""
        return self.state.prefixes.hit

    @property
    def reused(self) -> int:
        """First positions of the text that all hops had stored, so that no hop has computed them."""
        return self.state.prefixes.reused

    def fetch_kv(self, row: int, length: int) -> dict[str, torch.Tensor]:
        """The keys and values of the first `length` positions of a row, without the row's trained prefix.

        For names and shapes, see the prefix in `splitnet.blocks.adapters`. Raises as `step`.
        """
        self.open()
        request = FetchRequest(FetchKV(self.id, self.state.epoch, self.state.next_number(), row, length))
        self.feed(Submit((request,)))
        self._wait_for([request])
        tensors: dict[str, torch.Tensor] = {}
        for endpoint in self.state.endpoints():
            for part in request.found.parts[endpoint]:
                tensors.update(read_tensors(part))
        return tensors

    def step_positions(self, positions: int, prediction: Callable[[int], Prediction] | None = None) -> int:
        """The best size of steps for this number of positions; several steps flow through the hops at once."""
        if positions <= CHUNK_SIZES[0]:
            return positions
        if prediction is None:
            self.open(positions)
            prediction = self.predictions()
        size = best_chunk(positions, lambda n: prediction(n).latency_ms, lambda n: prediction(n).slowest_hop_ms)
        return min(size, MAX_PAYLOAD_BYTES // (4 * self._swarm.facts.hidden_size))

    def links(self) -> list[LinkUse]:
        """The links of the route in order, from the client back to it."""
        state, timings, hops = self.state, list[Timing](), list(self.state.hops)
        uses: list[LinkUse] = []
        codec, sender = state.first_codec, "client"
        for hop in hops:
            start, end = hop.blocks
            receiver = f"blocks {start}..{end - 1}"
            payload = bytes(codec.bytes_per_position(state.hidden_size))
            parts = (Chunk(1, _POSITION, 1, 1),)
            step = Step(self.id, state.epoch, _POSITION, parts, None, 0, codec.code, payload, 0, tuple(timings))
            uses.append(LinkUse(sender, receiver, codec.name, sum(map(len, encode(step)))))
            timings.append(_TIMING)
            sender = f"{receiver} via client" if hop.relayed else receiver
            codec = hop.codec
        if hops:
            payload = bytes(codec.bytes_per_position(state.hidden_size))
            result = Result(self.id, state.epoch, _POSITION, state.blocks[1], codec.code, tuple(timings), payload)
            uses.append(LinkUse(sender, "client", codec.name, sum(map(len, encode(result)))))
        return uses

    def _improve_route(self) -> None:
        """Moves to a better route before a step, if the gain exceeds the cost."""
        state = self.state
        cached = state.log.positions if state.log is not None else 0
        planned = [hop.planned for hop in state.hops]
        move = self._routes.better_route(planned, self.needs, cached, max(0, state.reservation - cached))
        if move is not None:
            self.feed(move)
            self.open()

    def _decoded(self, request: StepRequest) -> torch.Tensor | None:
        """The return value of `step`; None: an answer was unusable, and the step is done again."""
        result, hidden_size = request.result, self._swarm.facts.hidden_size
        assert result is not None
        states: list[torch.Tensor] = []
        for tap in (*self.state.taps, self.state.blocks[1]):
            came = request.tapped.get(tap, result)  # without kept positions, hops send no states
            try:
                values = codec_by_code(came.codec).decode(came.payload, request.kept, hidden_size)
                if np.isfinite(values.numpy()).all():  # for few numbers, a fifth of the time of torch
                    states.append(values)
                    continue
                why = "answered with values that are not finite"
            except ProtocolError as error:
                why = f"answered nonsense: {error}"
            self._swarm.prefix_index.distrust()
            self.feed(Distrust(request, self.state.maker_of(tap), why))
            return None
        return states[0] if len(states) == 1 else torch.cat(states, dim=1)

    def _learn_timings(self, positions: int, *, at_once: bool) -> None:
        """Notes the times of a decode step; a hop's times are taken from this hop only.

        A hop may rewrite the timings of earlier hops in a result, so only the tail's timing is taken from the result.
        The other hops are asked every `ASK_S`, without waiting. at_once: ask, because the step was unusually slow.
        """
        hops, timings = self.state.hops, self.state.timings
        if timings:
            self._note_timing(hops[-1], None, positions, timings[-1])
        now = time.monotonic()
        if not at_once and now < self._asked_at + ASK_S:
            return
        self._asked_at = now
        for hop, following in pairwise(hops):
            told = partial(self._note_timing, hop, following, positions)
            self._swarm.ping(hop.endpoint, self.id).add_done_callback(
                lambda pong, told=told: told(pong.result().timing)
            )

    def _note_timing(self, hop: RouteHop, following: RouteHop | None, positions: int, timing: Timing | None) -> None:
        if timing is None:
            return
        measurements = self._swarm.measurements
        blocks = hop.planned.end - hop.planned.start
        # The cost model adds the time of reading the cached positions.
        held = self.state.log.positions if self.state.log is not None else 0
        block_ms = timing.compute_us / 1000 / blocks - ContextCost(hop.planned.record.past_ms).ms_at(positions, held)
        measurements.hop_seen(hop.name, positions, max(0.0, block_ms), timing.wait_us / 1000)
        if timing.next_rtt_us and following is not None:
            measurements.link_seen(hop.name, following.name, timing.next_rtt_us / 1000)


def cut_into_steps(
    parts: Sequence[Chunk], limit: int, inputs: Sequence[PositionInputs] = ()
) -> list[tuple[list[Chunk], list[PositionInputs]]]:
    """Cuts parts and their block inputs into steps, which together keep the last `keep` outputs of each part.

    A step has at most `limit` positions, or more where it would cut a group of positions; fewer where its block inputs
    would be too many or too large for a message.
    """
    most = max((len(own.per_layer) for own in inputs), default=0)
    if most:
        values = sum(each.shape[1] for each in inputs[0].per_layer.values())
        limit = max(1, min(limit, MAX_PAYLOAD_BYTES // (8 * values)))
    steps: list[tuple[list[Chunk], list[PositionInputs]]] = [([], [])]
    room = limit
    given = inputs or [PositionInputs()] * len(parts)
    for (row, start, length, keep), own in zip(parts, given, strict=True):
        begun = 0
        while begun < length:
            if room <= 0 or (steps[-1][0] and (len(steps[-1][0]) + 1) * most > MAX_INPUTS - len(parts)):
                steps.append(([], []))
                room = limit
            taken = own.end_of_group(min(begun + room, length)) - begun
            kept = max(0, min(taken, begun + taken - (length - keep)))
            steps[-1][0].append(Chunk(row, start + begun, taken, kept))
            steps[-1][1].append(own.cut(begun, begun + taken))
            begun += taken
            room -= taken
    return steps
