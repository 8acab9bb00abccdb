"""Runs passes over whole sequences on the device, takes adapters over, and looks keys and values up."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from peers.counters import Counters, PassKind
from peers.failures import failure_of
from peers.session import GradientSum, PassWork, Session
from peers.training import Training
from splitnet.errors import AdapterError, CodecError, ProtocolError
from splitnet.model.adapters import (
    Adapter,
    read_tensors,
    write_groups,
)
from splitnet.model.device_clock import seconds_after_work
from splitnet.model.device_copies import to_device, to_host
from splitnet.model.passes import GRAPH_BYTES, SpanPasses
from splitnet.model.span import Span
from splitnet.net.codecs import codec_by_code
from splitnet.net.messages import FailureCode, FetchKV, Forward, Gradient


class PassEngine:
    """Belongs to the engine.

    Args:
        span: the blocks.
        training: takes what is computed.
        between: called between two pieces of a pass, for others, with the seconds that the last one took.
        most_positions: of a piece, if a pass has more sequences; None: any.
        counters: what the peer counts.
    """

    def __init__(
        self,
        span: Span,
        training: Training,
        between: Callable[[PassWork, float], None],
        most_positions: Callable[[], int | None],
        counters: Counters,
    ) -> None:
        self._span = span
        self._training = training
        self._between = between
        self._counters = counters
        self._running: PassWork | None = None
        self._piece_began = 0.0
        graph_bytes = max(GRAPH_BYTES, training.memory.limit // 4)
        self._passes = SpanPasses(span, self._end_piece, most_positions, graph_bytes=graph_bytes)

    def run(self, work: PassWork) -> None:
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
            self._training.failed(work, FailureCode.BAD_MESSAGE, str(error))
        except ProtocolError as error:
            self._training.failed(work, FailureCode.OUT_OF_ORDER, str(error))
        except Exception as error:
            self._training.failed(work, *failure_of(error, "pass"))
        finally:
            self._let_others_in(work)

    def _end_piece(self) -> None:
        assert self._running is not None
        self._let_others_in(self._running)
        if self._running.session.closed:
            raise _Abandoned

    def _let_others_in(self, running: PassWork) -> None:
        self._between(running, seconds_after_work(self._span.device) - self._piece_began)
        self._piece_began = time.perf_counter()

    def _forward(self, work: PassWork, message: Forward, began: float) -> None:
        session = work.session
        adapter = self._adapter(work, message)
        hidden = self._decode(message.codec, message.payload, message.positions)
        run = hidden, message.lengths, adapter, session.start, session.end
        nbytes = self._passes.bytes_to_keep(message.lengths, adapter, session.end - session.start)
        if message.kept and nbytes is not None and self._training.may_keep_way(work, nbytes):
            output, way = self._passes.forward_kept(*run, nbytes, reach=message.reach)
            self._training.keep_way(work, way)
            del way
        else:
            output = self._passes.forward(*run, reach=message.reach)
        payload = session.codec.encode(to_host(output))
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
        way = self._training.take_way(work.forward)
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
        self._training.went_back(work, payload, parts)

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
        values = codec_by_code(codec).decode(payload, positions, self._span.hidden_size)
        return to_device(values, self._span.device, values.dtype)


class _Abandoned(Exception):
    """The session has ended: nobody waits for its pass."""
