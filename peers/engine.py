"""The loop that owns the device: takes ready steps, runs them as one packed pass, hands the results on.

Between these it runs passes over whole sequences of clients that train, piece by piece. How fast the device runs its
blocks is timed at the start, and corrected by every pass.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

from peers.counters import PassKind
from peers.service import SessionService
from peers.sessions import (
    Filling,
    GradientSum,
    PassWork,
    Recalled,
    Session,
    SessionTooLong,
    Work,
    room_for,
    shared_room,
)
from peers.speed import ObservedSpeed, measure_past, measure_speed
from scheduler.batching import DECODE_POSITIONS, PASS_POSITIONS
from scheduler.facts import CONTEXTS, PASS_SIZES
from splitnet.blocks.adapters import Adapter, read_tensors, write_groups
from splitnet.blocks.passes import GRAPH_BYTES, SpanPasses
from splitnet.blocks.span import Chunk as SpanChunk
from splitnet.blocks.span import Span
from splitnet.errors import AdapterError, CodecError, NotFinite, PeerBusy, ProtocolError
from splitnet.quant.device import (
    Stopwatch,
    end_threads,
    is_out_of_memory,
    seconds_after_work,
    to_device,
    to_host,
    trim_memory,
)
from splitnet.wire.codecs import are_finite, check_values, codec_by_code, encode_finite, kept_rows
from splitnet.wire.messages import FailureCode, FetchKV, Forward, Gradient

log = logging.getLogger(__name__)

SHORT_S = 0.02  # a step that takes no longer may run in the thread that received it: nothing else is received meanwhile
TELL_S = 60.0  # how often the same error is logged at most: a client may cause it a thousand times a second
FILLED_AT_ONCE = 1 << 27  # bytes of pages that are put into a row before other steps run
FILLED_BESIDE = 1 << 25  # the same, where several keys are active

_told: dict[tuple[type[Exception], int], float] = {}  # when errors were told, by kind and place in the code


def failure_of(error: Exception, what: str) -> tuple[FailureCode, str]:
    """Code and text for an error of `what` while it was computed; the cause goes to the log if it is not the client's.

    Some layers show only when they run that an adapter does not fit.
    """
    if isinstance(error, PeerBusy):
        return FailureCode.BUSY, str(error)
    if isinstance(error, AdapterError):
        return FailureCode.BAD_MESSAGE, str(error)
    now, trace = time.monotonic(), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = type(error), trace.tb_lineno if trace is not None else 0
    if now >= _told.get(place, 0.0):
        _told[place] = now + TELL_S
        log.error("a %s failed", what, exc_info=error)
    if is_out_of_memory(error):
        text = f"memory is short at this peer, which could not compute this {what}: send fewer positions at a time"
        return FailureCode.BUSY, f"{text}, or use other peers"
    return FailureCode.INTERNAL, f"the peer could not compute this {what}; see its log"


_CODES = {  # special kinds first
    SessionTooLong: FailureCode.TOO_LONG,
    NotFinite: FailureCode.NOT_FINITE,
    CodecError: FailureCode.BAD_MESSAGE,
    ProtocolError: FailureCode.OUT_OF_ORDER,
}


def _refusal(error: Exception, what: str) -> tuple[FailureCode, str]:
    """Code and text for an error of what was to be computed: as `failure_of`, if it is not about the message."""
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code, str(error)
    return failure_of(error, what)


class _Abandoned(Exception):
    """The session of a pass has ended."""


class Engine:
    """Runs the steps of a service through a span until closed; `speed` is updated with every pass."""

    def __init__(self, span: Span, service: SessionService, speed: ObservedSpeed) -> None:
        self._span = span
        self._service = service
        self._queue = queue = service.queue
        self._speed = speed
        self._load = service.load
        self._training = service.training
        self._counters = service.counters
        self._views: dict[tuple[int, int], Span] = {(span.start, span.end): span}
        self._runs_here = span.device.type != "cpu" or torch.get_num_threads() == 1
        self._turns = threading.Lock()  # held by the thread that runs what was waiting
        self._publish_speed()
        self._running: PassWork | None = None  # the pass over whole sequences that the device is at
        self.passed_at: float | None = None  # when the last one ended; None: none has run since memory was trimmed
        self._piece_began = 0.0
        blocks = span.end - span.start
        graph_bytes = max(GRAPH_BYTES, service.training_memory.limit // 4)
        self._passes = SpanPasses(
            span, self._end_piece, partial(queue.piece_positions, blocks), graph_bytes=graph_bytes
        )
        self._thread = threading.Thread(target=self._run, name="splitnet-engine", daemon=True)

    def start(self) -> None:
        """Begins to compute; from now on call `run_here` after messages were received.

        Call it from the thread that has loaded the blocks, which computes no more.
        """
        end_threads()
        self._queue.defers = True
        self._thread.start()

    def measure_when_idle(self) -> None:
        """Times the device again between passes, as nothing else may use it meanwhile; gives way to work."""
        self._queue.put_idle_job(self._measure)

    def close(self) -> None:
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join()
        with self._turns:  # what `run_here` has begun ends, too
            pass

    def run_here(self) -> None:
        """Runs a short decode step that waits alone in the thread that has received it; the engine's runs all else.

        Handing a step to another thread and its output back takes some tenths of a millisecond. Where several threads
        share the work of a pass, the engine's thread runs all of it: OpenMP has helpers for each thread that computes,
        and more of them than cores are slow.
        """
        if self._runs_here and self._turns.acquire(blocking=False):
            try:
                work = self._queue.take_short(SHORT_S)
                if work is not None:
                    self._run_steps([(work, work.remaining)])
                    return
            finally:
                self._turns.release()
        self._queue.wake()

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Waits for work and runs a pass of it; False when the queue is closed. Keeps no session alive after it."""
        self._queue.gather()
        with self._turns:
            chosen = self._queue.take(PASS_POSITIONS)
            if chosen:
                self._run_steps(chosen)
            elif (work := self._queue.take_pass()) is not None:
                self._run_pass(work)
                self._queue.release_pass(work)
                self.passed_at = time.monotonic()
            elif (session := self._queue.take_recalled()) is not None:
                self._fill_ahead(session)
            elif (job := self._queue.take_idle_job()) is not None:
                job()
        return not self._queue.closed

    def _measure(self) -> None:
        contexts = CONTEXTS[: len(self._speed.past.ms)]

        def interrupted() -> bool:
            return self._queue.has_work or self._queue.closed

        try:
            with self._counters.energy.computing():
                measured = measure_speed(self._span, interrupted)
                # Of one block, so of as many positions as the memory of all has room for.
                most = self._service.sessions.free_positions * (self._span.end - self._span.start)
                if measured is not None and contexts and contexts[-1] <= most:
                    measured.past = measure_past(self._span, contexts[-1], interrupted)
        except Exception:
            log.exception("could not measure the device again")
            return
        if measured is not None:
            self._speed.replace(measured)
            self._publish_speed()

    def _run_steps(self, chosen: list[tuple[Work, int]]) -> None:
        ready = [(work, count) for work, count in chosen if self._begin(work, count)]
        if ready:
            self._compute(ready)
        for work, _ in chosen:
            self._queue.release(work)
        self._publish_speed()

    def _begin(self, work: Work, count: int) -> bool:
        """Before a pass of a step: decodes `count` positions, and before the first one prepares the session's rows.

        False if it does not run in this pass.
        """
        if work.session.closed:
            work.done = work.total
            return False
        try:
            if not work.done:
                work.adapter = work.session.adapter
                if self._recalls(work):
                    return False
                self._service.prepare(work)
            codec = codec_by_code(work.step.codec)
            size = codec.bytes_per_position(self._span.hidden_size)
            payload = memoryview(work.step.payload)[work.done * size : (work.done + count) * size]
            work.hidden = codec.decode(payload, count, self._span.hidden_size)
            return bool(work.done) or not self._catches_up(work)
        except Exception as error:
            self._offer_less(work.session, error)
            self._give_up(work, *_refusal(error, "step"))
        return False

    def _recalls(self, work: Work) -> bool:
        """Begins a row with the pages that were found for it when the session was opened, if a step goes on there; some
        pages at a time, so that steps of others run meanwhile. True: there are more."""
        session, part, filling = work.session, work.step.parts[0], work.session.filling
        if filling is None and session.recalled is None:
            return False
        if filling is None or filling.work is not work:
            self._queue.release_recalled(session)
            recalled = self._service.take_recalled(work) if session.recalled is not None else None
            if recalled is None:
                session.filling = None
                return False
            # A row depends on an adapter by its prefix alone.
            if filling is None or not filling.begins(recalled) or filling.row.prefix_length or session.prefix_length:
                filling = session.filling = self._new_filling(session, recalled, part.start + part.length)
            filling.recalled, filling.work = recalled, work
        self._fill(session, filling)
        if filling.goes_on:
            return True
        self._service.begin_row(work, filling, self._span.device)
        session.filling = None
        return False

    def _fill_ahead(self, session: Session) -> None:
        """Puts some of the pages that were found for a session into a row, before its step comes: all hops of a route
        do so at the same time."""
        recalled, filling = session.recalled, session.filling
        # With the rows that it has it would hold more than it has reserved; texts by turns would be work for nothing.
        waits = session.closed or session.rows or session.prefix_length
        if not waits and recalled is not None and (filling is None or filling.begins(recalled)):
            try:
                filling = session.filling = filling or self._new_filling(session, recalled, recalled.positions)
                self._fill(session, filling)
                if filling.goes_on:
                    return
            except Exception as error:  # it is tried again with the step, and refused
                failure_of(error, "stored page")
        self._queue.release_recalled(session)

    def _new_filling(self, session: Session, recalled: Recalled, end: int) -> Filling:
        """A row with room for these pages, and for `end` positions."""
        end = max(recalled.positions, end) + session.prefix_length
        room = shared_room({recalled.row: end}, {}, room_for(session.reservation))[recalled.row]
        row = self._view(session.start, session.end).new_row(room - session.prefix_length, session.adapter)
        return Filling(row, recalled)

    def _fill(self, session: Session, filling: Filling) -> None:
        began = time.perf_counter()
        if filling.goes_on:
            nbytes = FILLED_BESIDE if self._queue.is_contended else FILLED_AT_ONCE
            most = max(1, nbytes // filling.recalled.pages[0].nbytes)
            self._service.fill(session, filling, self._span.device, most)
            self._queue.charge(session, seconds_after_work(self._span.device) - began)

    def _catches_up(self, work: Work) -> bool:
        """After a rewind far back, computes some positions again; False: few are left, so the step can run.

        One pass at a time: so steps of others run meanwhile, and the client sees progress.
        """
        session = work.session
        for part in work.step.parts:
            row = session.rows.get(part.row)
            if row is not None and row.length - row.computed > PASS_POSITIONS:
                span, began = self._view(session.start, session.end), time.perf_counter()
                session.done += span.catch_up(row, work.adapter, PASS_POSITIONS)
                self._queue.charge(session, seconds_after_work(self._span.device) - began)
                return True
        return False

    def _compute(self, ready: list[tuple[Work, int]]) -> None:
        """Runs a pass; if that fails, each of its steps alone, so that none fails because of another."""
        began = time.monotonic()
        try:
            with self._counters.energy.computing():
                self._pass(ready)
            return
        except Exception as error:
            # A pass that fails leaves all rows as they were.
            failure = failure_of(error, "step")
            if len(ready) == 1:
                self._offer_less(ready[0][0].session, error)
        finally:
            self._queue.ran(ready, time.monotonic() - began)
        if len(ready) == 1:
            self._give_up(ready[0][0], *failure)
        else:
            for item in ready:
                self._compute([item])

    def _pass(self, ready: list[tuple[Work, int]]) -> None:
        began_cpu = time.thread_time()
        began_at = time.monotonic()
        fresh = [work for work, _ in ready if not work.done]
        for work in fresh:
            work.wait_ms = (began_at - work.arrived_at) * 1000
        session = ready[0][0].session
        span = self._view(session.start, session.end)
        parts: list[SpanChunk] = []
        inputs: list[torch.Tensor] = []
        for work, count in ready:
            assert work.hidden is not None
            inputs.append(work.hidden)
            for part in work.parts(count):
                row = work.session.rows.get(part.row)
                if row is None:
                    room = work.session.new_room[part.row]
                    row = work.session.rows[part.row] = span.new_row(room, work.adapter)
                parts.append(SpanChunk(row, part.start, part.length, work.adapter, work.step.reach))
        hidden = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        watch = Stopwatch(self._span.device)
        tapping = [work.taps.boundaries for work, _ in ready if work.taps is not None]
        taps = sorted({tap for boundaries in tapping for tap in boundaries if tap < span.end}) if tapping else ()
        output = span.forward(hidden, parts, taps)
        watch.stop()
        tapped = _tapped(ready, output, [*taps, span.end]) if tapping else ()
        wanted = self._wanted(ready, output[:, -span.hidden_size :] if taps else output)
        elapsed_ms = watch.seconds * 1000
        computed_s = time.thread_time() - began_cpu
        # First of all, since the next hops wait for it. Steps that they gather arrive at once.
        with self._service.outbox.together() if len(ready) > 1 else nullcontext():
            computed = self._hand_on(ready, wanted, elapsed_ms)
        for work, states in tapped:
            if any(work is each for each, _ in computed):
                self._send_taps(work, states)
        past_ms = sum(self._speed.past.at(part.count, part.start) for part in parts)
        self._speed.observe(len(hidden), span.end - span.start, elapsed_ms, past_ms)
        if len(hidden) <= DECODE_POSITIONS * len(ready):
            sources = (work.session.id for work, _ in ready if not work.session.closed)
            self._queue.delay.ran(sources, elapsed_ms / 1000, computed_s, time.monotonic())
        others = [len(hidden) - count for work, count in ready if work.total <= DECODE_POSITIONS]
        waits = [work.wait_ms for work in fresh if work.total <= DECODE_POSITIONS and not work.follows]
        self._load.observe(began_at, waits, others, elapsed_ms)
        for work in fresh:
            self._counters.step_began(work)
        for work, count in computed:
            self._counters.step_computed(work, count)
            if work.step.labels and not work.remaining:
                try:
                    self._service.keep_pages(work)
                except Exception as error:  # the step is done
                    failure_of(error, "stored page")
        self._counters.step_passes.observe(elapsed_ms / 1000, len(hidden), len(parts))

    def _hand_on(
        self, ready: list[tuple[Work, int]], wanted: list[torch.Tensor], elapsed_ms: float
    ) -> list[tuple[Work, int]]:
        """Keeps what is wanted of a pass, and sends on finished steps; returns the steps that have not failed."""
        computed = list[tuple[Work, int]]()
        for (work, count), values in zip(ready, wanted, strict=True):
            work.hidden, failure = None, None
            try:
                if len(values):
                    work.outputs.append(work.session.codec.encode(values))
            except CodecError as error:
                failure = FailureCode.INTERNAL, str(error)
            except Exception as error:
                failure = failure_of(error, "step")
            work.compute_ms += elapsed_ms
            work.done += count
            work.session.done += count
            if failure is not None:
                self._give_up(work, *failure)
                continue
            computed.append((work, count))
            if not work.remaining:
                self._finish(work)
        return computed

    def _wanted(self, ready: list[tuple[Work, int]], output: torch.Tensor) -> list[torch.Tensor]:
        """What is sent of the output of a pass, by step, copied to the CPU at once."""
        own = output.split([count for _, count in ready])
        wanted = [
            kept_rows(work.parts(count), each) if self._at_tail(work) else each
            for (work, count), each in zip(ready, own, strict=True)
        ]
        if output.device.type == "cpu":
            return wanted
        together = wanted[0] if len(wanted) == 1 else torch.cat(wanted)
        return list(to_host(together).split([len(each) for each in wanted]))

    def _send_taps(self, work: Work, states: dict[int, torch.Tensor]) -> None:
        """Encodes hidden states of a pass, behind what was sent on, and sends those of a step that is finished."""
        assert work.taps is not None
        try:
            for tap, values in states.items():
                work.tapped.setdefault(tap, []).append(work.taps.codec.encode(to_host(values)))
            if not work.remaining:
                self._service.tapped(work, work.taps)
        except Exception as error:
            self._give_up(work, *failure_of(error, "step"))

    def _finish(self, work: Work) -> None:
        output = work.outputs[0] if len(work.outputs) == 1 else b"".join(work.outputs)
        work.outputs = []
        try:
            self._service.finished(work, *((b"", output) if self._at_tail(work) else (output, b"")))
        except Exception as error:
            self._service.failed(work, *failure_of(error, "step"))

    def _at_tail(self, work: Work) -> bool:
        return work.session.end == self._service.served.num_blocks

    def _run_pass(self, work: PassWork) -> None:
        if work.session.closed:
            return
        work.wait_ms = (time.monotonic() - work.arrived_at) * 1000
        began = self._piece_began = time.perf_counter()
        self._running = work
        try:
            with self._counters.energy.computing():
                if isinstance(work.message, Forward):
                    self._forward(work, work.message, began)
                elif isinstance(work.message, Gradient):
                    self._backward(work, work.message, began)
                elif isinstance(work.message, FetchKV):
                    self._fetch_kv(work, work.message)
                else:
                    self._adopt(work)
        except _Abandoned:
            pass
        except Exception as error:
            self._training.failed(work, *_refusal(error, "pass"))
        finally:
            self._let_others_in(work)

    def _end_piece(self) -> None:
        assert self._running is not None
        self._let_others_in(self._running)
        if self._running.session.closed:
            raise _Abandoned

    def _let_others_in(self, running: PassWork) -> None:
        """Runs ready steps between two pieces of a pass over whole sequences."""
        self._queue.charge(running.session, seconds_after_work(self._span.device) - self._piece_began)
        first = True
        while chosen := self._queue.take_between(running, PASS_POSITIONS, first=first):
            self._run_steps(chosen)
            first = False
        self._piece_began = time.perf_counter()

    def _forward(self, work: PassWork, message: Forward, began: float) -> None:
        session = work.session
        adapter = self._adapter(work, message)
        hidden = self._decode(message.codec, message.payload, message.positions)
        run = hidden, message.lengths, adapter, session.start, session.end
        nbytes = self._passes.bytes_to_keep(message.lengths, adapter, session.end - session.start)
        if message.kept and nbytes is not None and self._training.may_keep_way(work, nbytes):
            output, way = self._passes.forward_kept(*run, nbytes, reach=message.reach)
            self._training.keep_saved(work, way)
            del way
        else:
            output = self._passes.forward(*run, reach=message.reach)
        payload = encode_finite(session.codec, to_host(output))
        work.compute_ms = self._ms_since(began)
        session.done += message.positions
        self._counters.sequences_passed(PassKind.FORWARD, work, message.lengths, work.compute_ms / 1000)
        self._training.forwarded(work, payload)

    def _backward(self, work: PassWork, message: Gradient, began: float) -> None:
        session = work.session
        assert work.forward is not None and isinstance(work.forward.message, Forward)
        forward = work.forward.message
        adapter = self._adapter(work, forward)
        gradient = self._decode(message.codec, message.payload, forward.positions)
        way = self._training.take_saved(work.forward)
        if way is not None:
            gradient, by_adapter = self._passes.go_back(way, gradient)
        else:
            hidden = self._decode(forward.codec, forward.payload, forward.positions)
            gradient, by_adapter = self._passes.backward(
                hidden, forward.lengths, gradient, adapter, session.start, session.end, reach=forward.reach
            )
        payload = encode_finite(codec_by_code(forward.gradient_codec), to_host(gradient))
        if not are_finite(by_adapter.values()):
            raise NotFinite("the gradients by the adapter hold inf or NaN")
        by_adapter = self._added_up(session, message, by_adapter)
        parts = write_groups(by_adapter) if by_adapter else []
        session.done += forward.positions
        work.compute_ms = self._ms_since(began)
        self._counters.sequences_passed(PassKind.BACKWARD, work, forward.lengths, work.compute_ms / 1000)
        self._training.went_back(work, payload, parts)

    @staticmethod
    def _added_up(session: Session, message: Gradient, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradient by the adapter that goes to the client now: none, or the sum of its batch."""
        before, session.gradient_sum = session.gradient_sum, None
        # The sum of an abandoned batch is of another epoch, or begins at another number.
        if tensors and before is not None and (before.epoch, before.since) == (message.epoch, message.since):
            tensors = {name: before.tensors[name] + tensor for name, tensor in tensors.items()}
        if tensors and message.held:
            session.gradient_sum = GradientSum(message.epoch, message.since, tensors)
            return {}
        return tensors

    def _adopt(self, work: PassWork) -> None:
        session = work.session
        tensors: dict[str, torch.Tensor] = {}
        for part in work.parts:
            tensors.update(read_tensors(part.payload))
        adapter = Adapter({name: tensor.to(self._span.device) for name, tensor in tensors.items()})
        if adapter.outside(session.start, session.end):
            raise AdapterError(f"the session has blocks {session.start}..{session.end - 1}, the adapter others")
        self._span.fit(adapter)
        session.adapter, session.adapter_version = adapter, work.parts[0].version
        session.gradient_sum = None  # of the former one, whose memory is given back
        self._training.adapter_loaded(work)

    def _fetch_kv(self, work: PassWork, message: FetchKV) -> None:
        session = work.session
        row = session.rows.get(message.row)
        if row is None or not 0 < message.length <= row.length:
            raise ProtocolError(f"there are no {message.length} positions of row {message.row}")
        self._training.fetched_kv(work, write_groups(self._span.keys_and_values(row, message.length)))

    def _adapter(self, work: PassWork, message: Forward) -> Adapter | None:
        session = work.session
        if message.adapter and message.adapter != session.adapter_version:
            raise ProtocolError(f"version {message.adapter} of the adapter is not here")
        return session.adapter if message.adapter else None

    def _ms_since(self, began: float) -> float:
        return (seconds_after_work(self._span.device) - began) * 1000

    def _decode(self, codec: int, payload: bytes | memoryview, positions: int) -> torch.Tensor:
        check_values(codec, payload, positions, self._span.hidden_size)
        values = codec_by_code(codec).decode(payload, positions, self._span.hidden_size)
        return to_device(values, self._span.device, values.dtype)

    def _view(self, start: int, end: int) -> Span:
        view = self._views.get((start, end))
        if view is None:
            view = self._views[start, end] = self._span.view(start, end)
        return view

    def _offer_less(self, session: Session, error: Exception) -> None:
        """Where an allocation for a session failed, the peer takes back memory that it offers."""
        if is_out_of_memory(error):
            self._service.fell_short(session, time.monotonic())
            trim_memory()

    def _give_up(self, work: Work, code: FailureCode, text: str) -> None:
        work.done = work.total
        self._service.failed(work, code, text)

    def _publish_speed(self) -> None:
        blocks = self._span.end - self._span.start
        self._service.ms_per_position = blocks * self._speed.block_ms[-1] / PASS_SIZES[-1]


def _tapped(
    ready: list[tuple[Work, int]], output: torch.Tensor, boundaries: Sequence[int]
) -> list[tuple[Work, dict[int, torch.Tensor]]]:
    """The hidden states that clients want of a pass, by step and boundary.

    output: `[positions, boundaries * hidden]`, as of `Span.forward`.
    """
    found: list[tuple[Work, dict[int, torch.Tensor]]] = []
    own = output.split([count for _, count in ready])
    for (work, count), rows in zip(ready, own, strict=True):
        if work.taps is not None:
            kept = kept_rows(work.parts(count), rows).chunk(len(boundaries), dim=1)
            states = zip(boundaries, kept, strict=True)
            found.append((work, {tap: each for tap, each in states if tap in work.taps.boundaries}))
    return found
