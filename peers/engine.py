"""The loop that owns the device: takes ready steps, runs them as one packed pass, hands the results on.

Between these it runs passes over whole sequences of clients that train, piece by piece.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

from peers.counters import Counters, PassKind
from peers.queue import WorkQueue
from peers.service import SessionService
from peers.sessions import GradientSum, PassWork, Session, SessionTooLong, Work, is_quick
from peers.speed import ObservedSpeed, measure_speed
from scheduler.batching import DECODE_POSITIONS, PASS_POSITIONS
from scheduler.load import Load
from splitnet.blocks.adapters import Adapter, read_tensors, write_groups
from splitnet.blocks.passes import GRAPH_BYTES, SpanPasses
from splitnet.blocks.span import Chunk as SpanChunk
from splitnet.blocks.span import Span
from splitnet.errors import AdapterError, CodecError, PeerBusy, ProtocolError
from splitnet.quant.device import Stopwatch, end_threads, seconds_after_work, to_device, to_host
from splitnet.wire.codecs import codec_by_code
from splitnet.wire.messages import Chunk, FailureCode, FetchKV, Forward, Gradient

log = logging.getLogger(__name__)

SHORT_S = 0.02
"""A step that takes no longer may run in the thread that received it: nothing else is received meanwhile."""

TELL_S = 60.0
"""How often the same error is logged at most: a client may cause it a thousand times a second."""

_told: dict[tuple[type[Exception], int], float] = {}
"""When errors were told, by kind and place in the code."""


def failure_of(error: Exception, what: str) -> tuple[FailureCode, str]:
    """Code and text for an error that came while `what` was computed; its cause goes to the log.

    An adapter that does not fit is the client's own: some layers show it only when they run.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return FailureCode.BUSY, "the device ran out of memory"
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
    return FailureCode.INTERNAL, f"the peer could not compute this {what}; see its log"


class _Abandoned(Exception):
    """The session has ended: nobody waits for its pass."""


class Engine:
    """Runs steps through a span until closed.

    Args:
        span: the blocks.
        service: prepares each step and takes its output.
        queue: where steps come from.
        speed, load: updated with every pass.
        counters: what the peer counts; None: nobody reads it.
    """

    def __init__(
        self,
        span: Span,
        service: SessionService,
        queue: WorkQueue,
        speed: ObservedSpeed,
        load: Load,
        counters: Counters | None = None,
    ) -> None:
        self._span = span
        self._service = service
        self._queue = queue
        self._speed = speed
        self._load = load
        self._counters = counters or Counters()
        self._views: dict[tuple[int, int], Span] = {(span.start, span.end): span}
        self._runs_here = span.device.type != "cpu" or torch.get_num_threads() == 1
        self._turns = threading.Lock()
        """Held by the thread that runs what was waiting."""
        self._publish_speed()
        self._running: PassWork | None = None
        """The pass over whole sequences that the device is at."""
        self._piece_began = 0.0
        blocks = span.end - span.start
        graph_bytes = max(GRAPH_BYTES, service.training_memory.limit // 4)
        self._passes = SpanPasses(
            span, self._end_piece, partial(queue.piece_positions, blocks), graph_bytes=graph_bytes
        )
        self._thread = threading.Thread(target=self._run, name="splitnet-engine", daemon=True)

    def start(self) -> None:
        """Begins to compute. From now on `run_here` is to be called after messages were received.

        Call it from the thread that has loaded the blocks, which computes no more.
        """
        end_threads()
        self._queue.defers = True
        self._thread.start()

    def measure_when_idle(self) -> None:
        """Times the device again, here between passes, as nothing else may use it meanwhile; gives way to work."""
        self._queue.put_idle_job(self._measure)

    def close(self) -> None:
        """Ends the loop after the pass that is running."""
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join()
        with self._turns:  # what `run_here` has begun ends, too
            pass

    def run_here(self) -> None:
        """Runs a short decode step that waits alone, in the thread that has received it; another thread runs all else.

        Handing a step to another thread and its output back takes some tenths of a millisecond. Where several threads
        share the work, the engine's thread runs all of it: OpenMP has helpers for each thread that computes, and more
        of them than cores are slow.
        """
        if self._runs_here and self._turns.acquire(blocking=False):
            try:
                work = self._queue.take_short(SHORT_S, is_quick)
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
            elif (job := self._queue.take_idle_job()) is not None:
                job()
        return not self._queue.closed

    def _measure(self) -> None:
        try:
            with self._counters.energy.computing():
                measured = measure_speed(self._span, lambda: self._queue.has_work or self._queue.closed)
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
                self._service.prepare(work)
            codec = codec_by_code(work.step.codec)
            size = codec.bytes_per_position(self._span.hidden_size)
            payload = memoryview(work.step.payload)[work.done * size : (work.done + count) * size]
            work.hidden = codec.decode(payload, count, self._span.hidden_size)
            return bool(work.done) or not self._catches_up(work)
        except SessionTooLong as error:
            self._give_up(work, FailureCode.TOO_LONG, str(error))
        except CodecError as error:
            self._give_up(work, FailureCode.BAD_MESSAGE, str(error))
        except PeerBusy as error:
            self._give_up(work, FailureCode.BUSY, str(error))
        except ProtocolError as error:
            self._give_up(work, FailureCode.OUT_OF_ORDER, str(error))
        except Exception as error:
            self._give_up(work, *failure_of(error, "step"))
        return False

    def _catches_up(self, work: Work) -> bool:
        """After a rewind far back, runs some of what is to run once more; False: little is left, so the step can run.

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
        """Runs a pass; if that fails, each of its steps alone, so that none fails for another's sake."""
        began = time.monotonic()
        try:
            with self._counters.energy.computing():
                self._pass(ready)
            return
        except Exception as error:
            # A pass that fails leaves all rows as they were.
            failure = failure_of(error, "step")
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
        output = span.forward(hidden, parts)
        watch.stop()
        wanted = self._wanted(ready, output)
        elapsed_ms = watch.seconds * 1000
        computed_s = time.thread_time() - began_cpu
        # First of all, since the next hops wait for it. All that they gather comes at once.
        with self._service.outbox.together() if len(ready) > 1 else nullcontext():
            computed = self._hand_on(ready, wanted, elapsed_ms)
        self._speed.observe(len(hidden), span.end - span.start, elapsed_ms)
        if len(hidden) <= DECODE_POSITIONS * len(ready):
            sources = (work.session.id for work, _ in ready if not work.session.closed)
            self._queue.delay.ran(sources, elapsed_ms / 1000, computed_s, time.monotonic())
        self._observe_load(ready, fresh, began_at, elapsed_ms)
        for work, count in computed:
            self._counters.step_computed(work, count)
        self._counters.steps_passed(elapsed_ms / 1000, len(hidden), len(parts))

    def _hand_on(
        self, ready: list[tuple[Work, int]], wanted: list[torch.Tensor], elapsed_ms: float
    ) -> list[tuple[Work, int]]:
        """Takes in what is wanted of a pass, and sends on what is finished; returns those that have not failed."""
        computed = list[tuple[Work, int]]()
        for (work, count), values in zip(ready, wanted, strict=True):
            work.hidden = None
            kept = self._keep(work, values)
            work.compute_ms += elapsed_ms
            work.done += count
            work.session.done += count
            if not kept:
                work.done = work.total
                continue
            computed.append((work, count))
            if not work.remaining:
                self._finish(work)
        return computed

    def _wanted(self, ready: list[tuple[Work, int]], output: torch.Tensor) -> list[torch.Tensor]:
        """What is sent of the output of a pass, by step, on the CPU: copied at once."""
        own = output.split([count for _, count in ready])
        wanted = [
            _kept_rows(work.parts(count), each) if self._at_tail(work) else each
            for (work, count), each in zip(ready, own, strict=True)
        ]
        if output.device.type == "cpu":
            return wanted
        together = wanted[0] if len(wanted) == 1 else torch.cat(wanted)
        return list(to_host(together).split([len(each) for each in wanted]))

    def _keep(self, work: Work, values: torch.Tensor) -> bool:
        """Encodes what is sent of the output of a pass; False if the step has failed."""
        try:
            if len(values):
                work.outputs.append(work.session.codec.encode(values))
            return True
        except CodecError as error:
            self._service.failed(work, FailureCode.INTERNAL, str(error))
        except Exception as error:
            self._service.failed(work, *failure_of(error, "step"))
        return False

    def _finish(self, work: Work) -> None:
        output = work.outputs[0] if len(work.outputs) == 1 else b"".join(work.outputs)
        work.outputs = []
        try:
            self._service.finished(work, *((b"", output) if self._at_tail(work) else (output, b"")))
        except Exception as error:
            self._service.failed(work, *failure_of(error, "step"))

    def _at_tail(self, work: Work) -> bool:
        return work.session.end == self._service.served.num_blocks

    def _observe_load(self, ready: list[tuple[Work, int]], fresh: list[Work], now: float, elapsed_ms: float) -> None:
        for work in fresh:
            self._counters.step_began(work)
        positions = sum(count for _, count in ready)
        others = [positions - count for work, count in ready if work.total <= DECODE_POSITIONS]
        waits = [work.wait_ms for work in fresh if work.total <= DECODE_POSITIONS and not work.follows]
        self._load.observe(now, waits, others, elapsed_ms)

    def _run_pass(self, work: PassWork) -> None:
        """Does what `work` asks for; whatever goes wrong is told its client."""
        if work.session.closed:
            return
        work.wait_ms = (time.monotonic() - work.arrived_at) * 1000
        began = self._piece_began = time.perf_counter()
        self._running = work
        try:
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
        except CodecError as error:
            self._service.training.failed(work, FailureCode.BAD_MESSAGE, str(error))
        except ProtocolError as error:
            self._service.training.failed(work, FailureCode.OUT_OF_ORDER, str(error))
        except Exception as error:
            self._service.training.failed(work, *failure_of(error, "pass"))
        finally:
            self._let_others_in(work)

    def _end_piece(self) -> None:
        assert self._running is not None
        self._let_others_in(self._running)
        if self._running.session.closed:
            raise _Abandoned

    def _let_others_in(self, running: PassWork) -> None:
        """Between two pieces of a pass over whole sequences: steps that are ready do not wait for all of it."""
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
        if message.kept and nbytes is not None and self._service.training.may_keep_way(work, nbytes):
            output, way = self._passes.forward_kept(*run, nbytes, reach=message.reach)
            self._service.training.keep_saved(work, way)
            del way
        else:
            output = self._passes.forward(*run, reach=message.reach)
        payload = session.codec.encode(to_host(output))
        work.compute_ms = self._ms_since(began)
        session.done += message.positions
        self._counters.sequences_passed(PassKind.FORWARD, work, message.lengths, work.compute_ms / 1000)
        self._service.training.forwarded(work, payload)

    def _backward(self, work: PassWork, message: Gradient, began: float) -> None:
        session = work.session
        assert work.forward is not None and isinstance(work.forward.message, Forward)
        forward = work.forward.message
        adapter = self._adapter(work, forward)
        gradient = self._decode(message.codec, message.payload, forward.positions)
        way = self._service.training.take_saved(work.forward)
        if way is not None:
            gradient, by_adapter = self._passes.go_back(way, gradient)
        else:
            hidden = self._decode(forward.codec, forward.payload, forward.positions)
            gradient, by_adapter = self._passes.backward(
                hidden, forward.lengths, gradient, adapter, session.start, session.end, reach=forward.reach
            )
        payload = codec_by_code(forward.gradient_codec).encode(to_host(gradient))
        by_adapter = self._added_up(session, message, by_adapter)
        parts = write_groups(by_adapter) if by_adapter else []
        session.done += forward.positions
        self._counters.sequences_passed(PassKind.BACKWARD, work, forward.lengths, self._ms_since(began) / 1000)
        self._service.training.went_back(work, payload, parts)

    @staticmethod
    def _added_up(session: Session, message: Gradient, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradient by the adapter that goes to the client now: nothing, or the sum of its batch."""
        before, session.gradient_sum = session.gradient_sum, None
        # What an abandoned batch has left is of another epoch, or begins at another number.
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
        self._service.training.adapter_loaded(work)

    def _fetch_kv(self, work: PassWork, message: FetchKV) -> None:
        session = work.session
        row = session.rows.get(message.row)
        if row is None or not 0 < message.length <= row.length:
            raise ProtocolError(f"there are no {message.length} positions of row {message.row}")
        self._service.training.fetched_kv(work, write_groups(self._span.keys_and_values(row, message.length)))

    def _adapter(self, work: PassWork, message: Forward) -> Adapter | None:
        session = work.session
        if message.adapter and message.adapter != session.adapter_version:
            raise ProtocolError(f"version {message.adapter} of the adapter is not here")
        return session.adapter if message.adapter else None

    def _ms_since(self, began: float) -> float:
        return (seconds_after_work(self._span.device) - began) * 1000

    def _decode(self, codec: int, payload: bytes | memoryview, positions: int) -> torch.Tensor:
        values = codec_by_code(codec).decode(payload, positions, self._span.hidden_size)
        return to_device(values, self._span.device, values.dtype)

    def _view(self, start: int, end: int) -> Span:
        view = self._views.get((start, end))
        if view is None:
            view = self._views[start, end] = self._span.view(start, end)
        return view

    def _give_up(self, work: Work, code: FailureCode, text: str) -> None:
        work.done = work.total
        self._service.failed(work, code, text)

    def _publish_speed(self) -> None:
        blocks = self._span.end - self._span.start
        self._service.ms_per_position = blocks * self._speed.prefill_ms_per_block_position


def _kept_rows(parts: Sequence[Chunk], output: torch.Tensor) -> torch.Tensor:
    """The positions of `output` that the client asked to have back."""
    if all(part.keep == part.length for part in parts):
        return output
    pieces: list[torch.Tensor] = []
    offset = 0
    for part in parts:
        offset += part.length
        if part.keep:
            pieces.append(output[offset - part.keep : offset])
    return torch.cat(pieces) if pieces else output[:0]
