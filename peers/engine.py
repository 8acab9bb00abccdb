"""The loop that owns the device: it runs ready steps as one packed pass, and gives their outputs to `Outputs`.

Between passes of steps it runs passes over whole sequences of clients that train, piece by piece.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch

from peers.counters import PassKind
from peers.service import SessionService
from peers.sessions import (
    HopSession,
    PassWork,
    SessionTooLong,
    Work,
)
from peers.speed import ObservedSpeed, measure_past, measure_speed
from scheduler.batching import DECODE_POSITIONS, PASS_POSITIONS
from scheduler.facts import CONTEXTS, PASS_SIZES
from splitnet.blocks.adapters import AdapterTensors, read_tensors, write_groups
from splitnet.blocks.block_inputs import decode_inputs
from splitnet.blocks.passes import GRAPH_BYTES, SpanPasses
from splitnet.blocks.span import RowChunk, Span
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
from splitnet.wire.codecs import are_finite, check_values, codec_by_code, encode_finite, select_kept_positions
from splitnet.wire.messages import FailureCode, FetchKV, Forward, Gradient, ImageFeatures, ReadImages

log = logging.getLogger(__name__)

SHORT_S = 0.02  # longest step that the receiving thread runs itself, because this thread receives no messages meanwhile
LOG_S = 60.0  # interval between two logs of the same error, which a client may cause a thousand times a second

Ready = list[tuple[Work, int]]  # the steps of a pass, each with the number of its positions in the pass
Tapped = tuple[Work, dict[int, torch.Tensor]]  # a step, and its hidden states by boundary

_logged_until: dict[tuple[type[Exception], int], float] = {}  # by type of error and line of code


def failure_of(error: Exception, what: str) -> tuple[FailureCode, str]:
    """Code and text for an error while `what` was computed; an error that the client has not caused is logged.

    AdapterError counts as caused by the client: some layers notice only when they run that an adapter does not fit.
    """
    if isinstance(error, PeerBusy):
        return FailureCode.BUSY, str(error)
    if isinstance(error, AdapterError):
        return FailureCode.BAD_MESSAGE, str(error)
    now, trace = time.monotonic(), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = type(error), trace.tb_lineno if trace is not None else 0
    if now >= _logged_until.get(place, 0.0):
        _logged_until[place] = now + LOG_S
        log.error("a %s failed", what, exc_info=error)
    if is_out_of_memory(error):
        text = f"memory is short at this peer, which could not compute this {what}: send fewer positions at a time"
        return FailureCode.BUSY, f"{text}, or use other peers"
    return FailureCode.INTERNAL, f"the peer could not compute this {what}; see its log"


_CODES = {  # subclasses first
    SessionTooLong: FailureCode.TOO_LONG,
    NotFinite: FailureCode.NOT_FINITE,
    CodecError: FailureCode.BAD_MESSAGE,
    ProtocolError: FailureCode.OUT_OF_ORDER,
}


def _refusal(error: Exception, what: str) -> tuple[FailureCode, str]:
    """Code and text for an error of `what`: a refusal of the message, or as in `failure_of`."""
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code, str(error)
    return failure_of(error, what)


class _Abandoned(Exception):
    """The session has ended during its pass."""


class Engine:
    """Runs the work of a service through a span until it is closed, and corrects `speed` with every pass."""

    def __init__(self, span: Span, service: SessionService, speed: ObservedSpeed) -> None:
        self._span = span
        self._service = service
        self._queue = queue = service.queue
        self._speed = speed
        self._training = service.training
        self._rows = service.rows
        self._outputs = service.outputs
        self._counters = service.counters
        self._view = cache(lambda *blocks: span if blocks == (span.start, span.end) else span.view(*blocks))
        self._runs_here = span.device.type != "cpu" or torch.get_num_threads() == 1
        self._turns = threading.Lock()  # held by the thread that runs work
        self._publish_speed()
        self._running: PassWork | None = None  # the pass over whole sequences on the device
        self.passed_at: float | None = None  # end of the last pass over whole sequences since memory was trimmed
        self._piece_began = 0.0
        pieces = partial(queue.piece_positions, span.end - span.start)
        graph_bytes = max(GRAPH_BYTES, service.training_memory.limit // 4)
        self._passes = SpanPasses(span, self._end_piece, pieces, graph_bytes=graph_bytes)
        self._thread = threading.Thread(target=self._run_thread, name="splitnet-engine", daemon=True)

    def start(self) -> None:
        """Begins to compute. Call it from the thread that has loaded the blocks. Call `run_here` after each received
        message."""
        end_threads()
        self._queue.defers = True
        self._thread.start()

    def measure_when_idle(self) -> None:
        """Has the engine's thread time the device while no work waits; arriving work interrupts it."""
        self._queue.put_idle_job(self._measure)

    def close(self) -> None:
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join()
        with self._turns:  # waits for `run_here`
            pass

    def run_here(self) -> None:
        """Runs a short decode step that is the only waiting work, in the thread that has received this step; wakes the
        engine's thread for other work.

        To hand a step to another thread takes some tenths of a millisecond. Where several threads share a pass, the
        engine's thread runs all passes: OpenMP has helper threads for each thread that computes, and more threads than
        cores are slow.
        """
        if self._runs_here and self._turns.acquire(blocking=False):
            try:
                work = self._queue.take_short(SHORT_S, self._rows.is_quick)
                if work is not None:
                    self._run_steps([(work, work.remaining)])
                    return
            finally:
                self._turns.release()
        self._queue.wake()

    def _run_thread(self) -> None:
        while self._run_next_pass():
            pass

    def _run_next_pass(self) -> bool:
        """Waits for work and runs one pass; False: the queue is closed. No reference to a session remains."""
        self._queue.gather()
        with self._turns:
            chosen = self._queue.take_steps(PASS_POSITIONS)
            if chosen:
                self._run_steps(chosen)
            elif (work := self._queue.take_pass()) is not None:
                self._run_pass(work)
                self._queue.release_pass(work)
                self.passed_at = time.monotonic()
            elif (session := self._queue.take_prefix_hit()) is not None:
                self._load_ahead(session)
            elif (job := self._queue.take_idle_job()) is not None:
                job()
        return not self._queue.closed

    def _load_ahead(self, session: HopSession) -> None:
        try:
            if self._rows.load_ahead(session, self._view):
                return
        except Exception as error:  # the step of the row will load the page again
            failure_of(error, "stored page")
        self._queue.release_prefix_hit(session)

    def _measure(self) -> None:
        contexts = CONTEXTS[: len(self._speed.past.ms)]

        def interrupted() -> bool:
            return self._queue.has_work or self._queue.closed

        try:
            with self._counters.energy.computing():
                measured = measure_speed(self._span, interrupted)
                # Only one block is timed, so its row may use the memory of all blocks.
                most = self._service.sessions.free_positions * (self._span.end - self._span.start)
                if measured is not None and contexts and contexts[-1] <= most:
                    measured.past = measure_past(self._span, contexts[-1], interrupted)
        except Exception:
            log.exception("could not measure the device again")
            return
        if measured is not None:
            self._speed.replace(measured)
            self._publish_speed()

    def _run_steps(self, chosen: Ready) -> None:
        chosen = [(work, work.whole_groups(count)) for work, count in chosen]
        ready = [(work, count) for work, count in chosen if self._begin_step(work, count)]
        if ready:
            self._compute(ready)
        for work, _ in chosen:
            self._queue.release_work(work)
        self._publish_speed()

    def _begin_step(self, work: Work, count: int) -> bool:
        """Decodes `count` positions of a step before a pass, and prepares its rows before the first pass.

        False: the step does not run in this pass.
        """
        if work.session.closed:
            work.done = work.total
            return False
        try:
            if not work.done:
                work.adapter = work.session.adapter
                if self._rows.is_loading(work, self._view):
                    return False
                self._rows.prepare_step(work)
            codec = codec_by_code(work.step.codec)
            size = codec.bytes_per_position(self._span.hidden_size)
            payload = memoryview(work.step.payload)[work.done * size : (work.done + count) * size]
            work.hidden = codec.decode(payload, count, self._span.hidden_size)
            if (step := work.step).inputs:
                read = work.parts(count), self._span.hidden_size, range(*work.blocks), self._span.per_layer_size
                work.inputs = decode_inputs(step.inputs, step.input_bytes, *read)
            if not work.done and (computed := self._rows.catch_up(work, self._view, PASS_POSITIONS)):
                work.session.done += computed
                return False
            return True
        except Exception as error:
            self._offer_less(work.session, error)
            self._give_up(work, *_refusal(error, "step"))
        return False

    def _compute(self, ready: Ready) -> None:
        """Runs a pass; if the pass fails, runs each step alone, so that no step fails because of another."""
        began = time.monotonic()
        try:
            with self._counters.energy.computing():
                self._pass(ready)
            return
        except Exception as error:
            # A failed pass changes no row.
            failure = failure_of(error, "step")
            if len(ready) == 1:
                self._offer_less(ready[0][0].session, error)
        finally:
            self._queue.charge_pass(ready, time.monotonic() - began)
        if len(ready) == 1:
            self._give_up(ready[0][0], *failure)
        else:
            for item in ready:
                self._compute([item])

    def _pass(self, ready: Ready) -> None:
        began_cpu = time.thread_time()
        began_at = time.monotonic()
        fresh = [work for work, _ in ready if not work.done]
        for work in fresh:
            work.wait_ms = (began_at - work.arrived_at) * 1000
        session = ready[0][0].session
        span = self._view(session.start, session.end)
        chunks: list[RowChunk] = []
        inputs: list[torch.Tensor] = []
        for work, count in ready:
            assert work.hidden is not None
            inputs.append(work.hidden)
            chunks += self._rows.chunks(work, count, span)
        hidden = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        watch = Stopwatch(self._span.device)
        tapping = [work.taps.boundaries for work, _ in ready if work.taps is not None]
        taps = sorted({tap for boundaries in tapping for tap in boundaries if tap < span.end}) if tapping else ()
        output = span.forward(hidden, chunks, taps)
        watch.stop()
        tapped = _tapped(ready, output, [*taps, span.end]) if tapping else ()
        wanted = self._wanted(ready, output[:, -span.hidden_size :] if taps else output)
        elapsed_ms = watch.seconds * 1000
        computed_s = time.thread_time() - began_cpu
        # Outputs are sent first, because the next hops wait. They are sent together, so that they share passes again.
        with self._service.outbox.together() if len(ready) > 1 else nullcontext():
            computed = self._finish(ready, wanted, elapsed_ms)
        for work, states in tapped:
            if any(work is each for each, _ in computed):
                self._add_taps(work, states)
        past_ms = sum(self._speed.past.ms_at(chunk.count, chunk.start) for chunk in chunks)
        self._speed.observe_pass(len(hidden), span.end - span.start, elapsed_ms, past_ms)
        if len(hidden) <= DECODE_POSITIONS * len(ready):
            sources = (work.session.id for work, _ in ready if not work.session.closed)
            self._queue.delay.observe_pass(sources, elapsed_ms / 1000, computed_s, time.monotonic())
        others = [len(hidden) - count for work, count in ready if work.total <= DECODE_POSITIONS]
        waits = [work.wait_ms for work in fresh if work.total <= DECODE_POSITIONS and not work.follows]
        self._service.load.observe(began_at, waits, others, elapsed_ms)
        for work in fresh:
            self._counters.step_began(work)
        for work, count in computed:
            self._counters.step_computed(work, count)
            if work.step.labels and not work.remaining:
                try:
                    self._rows.keep_pages(work)
                except Exception as error:  # the step itself has succeeded
                    failure_of(error, "stored page")
        self._counters.step_passes.observe(elapsed_ms / 1000, len(hidden), len(chunks))

    def _finish(self, ready: Ready, wanted: list[torch.Tensor], elapsed_ms: float) -> Ready:
        """Gives the outputs of a pass to `Outputs`, and finishes steps; returns the steps that have not failed."""
        computed = Ready()
        for (work, count), values in zip(ready, wanted, strict=True):
            work.hidden, work.inputs, failure = None, (), None
            try:
                self._outputs.add_output(work, values)
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
                try:
                    self._outputs.finish_step(work)
                except Exception as error:
                    self._service.report_failure(work, *failure_of(error, "step"))
        return computed

    def _wanted(self, ready: Ready, output: torch.Tensor) -> list[torch.Tensor]:
        """The positions of a pass's output to send, by step, in one copy to the CPU."""
        own = output.split([count for _, count in ready])
        wanted = [self._outputs.wanted(*item, each) for item, each in zip(ready, own, strict=True)]
        if output.device.type == "cpu":
            return wanted
        together = wanted[0] if len(wanted) == 1 else torch.cat(wanted)
        return list(to_host(together).split([len(each) for each in wanted]))

    def _add_taps(self, work: Work, states: dict[int, torch.Tensor]) -> None:
        """Gives hidden states of a pass to `Outputs`, after the outputs."""
        assert work.taps is not None
        try:
            self._outputs.add_taps(work, work.taps, states)
        except Exception as error:
            self._give_up(work, *failure_of(error, "step"))

    def _run_pass(self, work: PassWork) -> None:
        if work.session.closed:
            return
        work.wait_ms = (time.monotonic() - work.arrived_at) * 1000
        began = self._piece_began = time.perf_counter()
        self._running = work
        try:
            with self._counters.energy.computing():
                if isinstance(work.message, Forward):
                    self._run_forward(work, work.message, began)
                elif isinstance(work.message, Gradient):
                    self._run_backward(work, work.message, began)
                elif isinstance(work.message, FetchKV):
                    kv = self._rows.read_keys_and_values(work.session, work.message, self._span)
                    self._training.fetched_kv(work, write_groups(kv))
                elif isinstance(work.message, ReadImages):
                    self._training.images_read(work, self._read_images(work.message))
                else:
                    self._load_adapter(work)
        except _Abandoned:
            pass
        except Exception as error:
            self._training.report_failure(work, *_refusal(error, "pass"))
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

    def _run_forward(self, work: PassWork, message: Forward, began: float) -> None:
        session = work.session
        adapter = self._training.adapter_of(session, message)
        run = self._run_of(session, message, adapter)
        nbytes = self._passes.bytes_to_keep(message.lengths, adapter, session.end - session.start)
        if message.kept and nbytes is not None and self._training.reserve_graph(work, nbytes):
            output, graph = self._passes.forward_saving(**run, most=nbytes)
            self._training.keep_graph(work, graph)
            del graph
        else:
            output = self._passes.forward(**run)
        payload = encode_finite(session.codec, to_host(output))
        work.compute_ms = self._ms_since(began)
        session.done += message.positions
        self._counters.sequences_passed(PassKind.FORWARD, work, message.lengths, work.compute_ms / 1000)
        self._training.forwarded(work, payload)

    def _run_backward(self, work: PassWork, message: Gradient, began: float) -> None:
        session = work.session
        assert work.forward is not None and isinstance(work.forward.message, Forward)
        forward = work.forward.message
        adapter = self._training.adapter_of(session, forward)
        gradient = self._decode_payload(message.codec, message.payload, forward.positions)
        graph = self._training.take_graph(work.forward)
        if graph is not None:
            gradient, by_adapter = self._passes.backward_saved(graph, gradient)
        else:
            run = self._run_of(session, forward, adapter)
            gradient, by_adapter = self._passes.backward(**run, gradient=gradient)
        payload = encode_finite(codec_by_code(forward.gradient_codec), to_host(gradient))
        if not are_finite(by_adapter.values()):
            raise NotFinite("the gradients with respect to the adapter contain inf or NaN")
        by_adapter = self._training.added_up(session, message, by_adapter)
        parts = write_groups(by_adapter) if by_adapter else []
        session.done += forward.positions
        work.compute_ms = self._ms_since(began)
        self._counters.sequences_passed(PassKind.BACKWARD, work, forward.lengths, work.compute_ms / 1000)
        self._training.backward_done(work, payload, parts)

    def _run_of(self, session: HopSession, message: Forward, adapter: AdapterTensors | None) -> dict[str, Any]:
        """The arguments of `SpanPasses.forward`."""
        read = message.parts, self._span.hidden_size, range(session.start, session.end)
        inputs = decode_inputs(message.inputs, message.input_bytes, *read) if message.inputs else ()
        how = {"start": session.start, "end": session.end, "rope_length": message.rope_length, "inputs": inputs}
        hidden = self._decode_payload(message.codec, message.activations, message.positions)
        return {"hidden": hidden, "lengths": message.lengths, "adapter": adapter, **how}

    def _read_images(self, message: ReadImages) -> ImageFeatures:
        tower = self._service.tower
        assert tower is not None
        tower.on_layer = self._end_piece
        return tower.read(message)

    def _load_adapter(self, work: PassWork) -> None:
        session = work.session
        tensors: dict[str, torch.Tensor] = {}
        for part in work.parts:
            tensors.update(read_tensors(part.payload))
        adapter = AdapterTensors({name: tensor.to(self._span.device) for name, tensor in tensors.items()})
        if adapter.outside(session.start, session.end):
            raise AdapterError(
                f"the session has blocks {session.start}..{session.end - 1}, and the adapter has other blocks"
            )
        self._span.fit_adapter(adapter)
        self._training.adapter_loaded(work, adapter)

    def _ms_since(self, began: float) -> float:
        return (seconds_after_work(self._span.device) - began) * 1000

    def _decode_payload(self, codec: int, payload: bytes | memoryview, positions: int) -> torch.Tensor:
        check_values(codec, payload, positions, self._span.hidden_size)
        values = codec_by_code(codec).decode(payload, positions, self._span.hidden_size)
        return to_device(values, self._span.device, values.dtype)

    def _offer_less(self, session: HopSession, error: Exception) -> None:
        """After a failed allocation for a session, the peer offers less memory."""
        if is_out_of_memory(error):
            self._service.fell_short(session, time.monotonic())
            trim_memory()

    def _give_up(self, work: Work, code: FailureCode, text: str) -> None:
        work.done = work.total
        self._service.report_failure(work, code, text)

    def _publish_speed(self) -> None:
        blocks = self._span.end - self._span.start
        self._service.ms_per_position = blocks * self._speed.block_ms[-1] / PASS_SIZES[-1]


def _tapped(ready: Ready, output: torch.Tensor, boundaries: Sequence[int]) -> list[Tapped]:
    """The hidden states of a pass that clients want, by step and boundary.

    output: `[positions, boundaries * hidden]`, see `Span.forward`.
    """
    found: list[Tapped] = []
    own = output.split([count for _, count in ready])
    for (work, count), rows in zip(ready, own, strict=True):
        if work.taps is not None:
            kept = select_kept_positions(work.parts(count), rows).chunk(len(boundaries), dim=1)
            states = zip(boundaries, kept, strict=True)
            found.append((work, {tap: each for tap, each in states if tap in work.taps.boundaries}))
    return found
