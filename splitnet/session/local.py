"""A session with some blocks in this process and the others on peers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from splitnet.blocks.adapters import AdapterTensors
from splitnet.blocks.block_inputs import PositionInputs
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import SplitnetError
from splitnet.session.driver import SessionTraffic
from splitnet.session.events import Recovered
from splitnet.session.failover import RouteHop
from splitnet.session.inference import LinkUse, Session, UnderWay, cut_into_steps
from splitnet.swarm.plan import Prediction
from splitnet.wire.codecs import select_kept_positions
from splitnet.wire.messages import Chunk, Fork, Timing
from splitnet.wire.sent_log import fork_rows

Blocks = tuple[int, int]


def parse_local_blocks(text: str, num_blocks: int) -> list[Blocks]:
    """Parses ranges of blocks such as `0:10` or `0:2,28:30`, in order; adjacent ranges become one.

    Raises SplitnetError: the text has another form, or the model has no such blocks.
    """
    ranges: list[Blocks] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(\d+)\s*", piece)
        if match is None or not int(match[1]) < int(match[2]) <= num_blocks:
            raise SplitnetError(
                f"local blocks {text!r} do not fit a model of {num_blocks} blocks: write START:END, as 0:10 for "
                f"blocks 0 to 9, or several such ranges, as 0:2,{max(num_blocks - 2, 2)}:{num_blocks}"
            )
        ranges.append((int(match[1]), int(match[2])))
    joined: list[Blocks] = []
    for start, end in sorted(ranges):
        if joined and start < joined[-1][1]:
            raise SplitnetError(f"local blocks {text!r} name block {start} twice: write each block once")
        if joined and start == joined[-1][1]:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def load_stages(
    checkpoint: Checkpoint, blocks: str | None, *, device: str = "cpu", weights: str | None = None
) -> list[LocalSpan | Blocks]:
    """The stages of a model, in order: local spans, whose weights are loaded, and ranges that peers run.

    Args:
        blocks: the local blocks, such as `0:10` or `0:2,28:30`; None: no local blocks.
        weights: format of the weights of local blocks, see `splitnet.quant.choose`; None: as stored.

    Raises:
        SplitnetError: the model has no such blocks.
        UnsupportedModel, WeightsError, OutOfMemory: as `Span.load`.
    """
    stages: list[LocalSpan | Blocks] = []
    position = 0
    for start, end in parse_local_blocks(blocks, checkpoint.num_blocks) if blocks is not None else ():
        if position < start:
            stages.append((position, start))
        stages.append(LocalSpan(Span.load(checkpoint, start, end, device=device, weights=weights)))
        position = end
    if position < checkpoint.num_blocks:
        stages.append((position, checkpoint.num_blocks))
    return stages


class LocalSpan:
    """A span that the sessions of this process share; it runs for one session at a time."""

    def __init__(self, span: Span) -> None:
        self.start, self.end = span.start, span.end
        self.span = span
        self._lock = threading.Lock()

    def run(self, hidden: torch.Tensor, parts: Sequence[RowChunk], taps: Sequence[int] = ()) -> torch.Tensor:
        """`[positions, hidden]` -> `[positions, (taps + 1) * hidden]` float32, see `Span.forward`."""
        with self._lock:
            return self.span.forward(hidden, parts, taps).float()

    def fit_adapter(self, adapter: AdapterTensors) -> AdapterTensors | None:
        """The adapter's tensors for these blocks, on their device; None: there are none. Raises AdapterError."""
        tensors = adapter.of_blocks(self.start, self.end)
        if not tensors:
            return None
        own = AdapterTensors({name: tensor.to(self.span.device) for name, tensor in tensors.items()})
        with self._lock:
            self.span.fit_adapter(own)
        return own

    def sequences(self, hidden: torch.Tensor, lengths: Sequence[int], *given: Any) -> torch.Tensor:
        """Runs whole sequences, with a graph if torch records one: see `Span.sequences`."""
        with self._lock:
            return self.span.sequences(hidden, lengths, *given).to(hidden.device, hidden.dtype)


class LocalSequences:
    """The KV caches of one session in a local span. One thread at a time."""

    def __init__(self, span: LocalSpan) -> None:
        self._span = span
        self._rows: dict[int, SequenceCache] = {}
        self._adapter: AdapterTensors | None = None
        self._taps: Sequence[int] = ()

    def use_taps(self, taps: Sequence[int]) -> None:
        """As `Session.use_taps`."""
        self._taps = sorted({tap for tap in taps if self._span.start < tap < self._span.end})

    def use_adapter(self, adapter: AdapterTensors) -> None:
        """Sets the adapter, before the first step. Raises AdapterError: the adapter does not fit the blocks."""
        self._adapter = self._span.fit_adapter(adapter)

    def step(
        self,
        hidden: torch.Tensor,
        parts: Sequence[Chunk],
        forks: Sequence[Fork] | None,
        rope_length: int = 0,
        inputs: Sequence[PositionInputs] = (),
    ) -> torch.Tensor:
        """Runs new positions, `[positions, hidden]` -> `[positions, (taps + 1) * hidden]` float32, ignoring `keep`.

        Drops the positions of the rows from each part's start on. For the arguments, see `Step`.
        """
        if forks is not None:
            self._rows = fork_rows(self._rows, forks, lambda row: row.fork())
        span_parts: list[RowChunk] = []
        for part, own in zip_longest(parts, inputs):
            row = self._rows.get(part.row)
            if row is None:
                row = self._rows[part.row] = self._span.span.new_row(adapter=self._adapter)
            row.crop(part.start)
            span_parts.append(RowChunk(row, part.start, part.length, self._adapter, rope_length, own))
        return self._span.run(hidden, span_parts, self._taps)

    def close(self) -> None:
        """Drops all rows."""
        self._rows = {}

    close_later = close

    def fetch_kv(self, row: int, length: int) -> dict[str, torch.Tensor]:
        """Keys and values of the first positions of a row, named as in `Session.fetch_kv`."""
        return self._span.span.keys_and_values(self._rows[row], length)


@dataclass(slots=True)
class StagedPositions:
    """Positions on their way through the stages."""

    parts: list[Chunk]
    forks: Sequence[Fork] | None
    hidden: torch.Tensor
    rope_length: int
    inputs: Sequence[PositionInputs]
    stage: int = 0  # index of the next stage
    tapped: list[torch.Tensor] = field(default_factory=list[torch.Tensor])  # `[positions, states * hidden]`, in order
    sent: tuple[Session, UnderWay] | None = None  # what is under way on the route of this stage


class MixedSession:
    """Rows of positions with KV caches in this process for some blocks, and along routes of peers for the others.

    Has the methods of `Session`, for a whole model. One thread uses a session at a time.

    open_session: opens the session of a range of remote blocks, with a reservation of positions.
    """

    def __init__(
        self, stages: Sequence[LocalSpan | Blocks], open_session: Callable[[int, Blocks], Session], reservation: int
    ) -> None:
        self._stages: list[LocalSequences | Session] = [
            LocalSequences(stage) if isinstance(stage, LocalSpan) else open_session(reservation, stage)
            for stage in stages
        ]
        self.sessions = [stage for stage in self._stages if isinstance(stage, Session)]  # of the remote stages
        self._ends = [stage.end if isinstance(stage, LocalSpan) else stage[1] for stage in stages]
        self.taps: tuple[int, ...] = ()
        self._positions = 0

    @property
    def hops(self) -> list[RouteHop]:
        return [hop for session in self.sessions for hop in session.hops]

    @property
    def recoveries(self) -> list[Recovered]:
        return [recovered for session in self.sessions for recovered in session.recoveries]

    @property
    def timings(self) -> tuple[Timing, ...]:
        return tuple(timing for session in self.sessions for timing in session.timings)

    @property
    def traffic(self) -> SessionTraffic:
        """The sum over all routes."""
        moved = [session.traffic for session in self.sessions]
        sent, received = sum(each.bytes_sent for each in moved), sum(each.bytes_received for each in moved)
        steps, joules = sum(each.steps for each in moved), sum(each.joules for each in moved)
        return SessionTraffic(steps, self._positions, sent, received, joules)

    @property
    def passed(self) -> int:
        """As `Session.passed`, of the last route; 0: all blocks are local."""
        return self.sessions[-1].passed if self.sessions else 0

    @property
    def prefix_hit(self) -> int:
        """As `Session.prefix_hit`, of the last route."""
        return self.sessions[-1].prefix_hit if self.sessions else 0

    @property
    def reused(self) -> int:
        """As `Session.reused`, of the last route."""
        return self.sessions[-1].reused if self.sessions else 0

    def use_namespace(self, name: str) -> None:
        """As `Session.use_namespace`."""
        for session in self.sessions:
            session.use_namespace(name)

    def links(self) -> list[LinkUse]:
        return [link for session in self.sessions for link in session.links()]

    def predictions(self) -> Callable[[int], Prediction]:
        """As `Session.predictions`, for the remote blocks."""
        of_parts = [session.predictions() for session in self.sessions]

        def prediction(positions: int) -> Prediction:
            found = [of_part(positions) for of_part in of_parts]
            slowest_ms = max((each.slowest_hop_ms for each in found), default=0.0)
            return Prediction(sum(each.latency_ms for each in found), slowest_ms)

        return prediction

    def reserve(self, positions: int) -> None:
        """As `Session.reserve`; local blocks allocate memory with each position."""
        for session in self.sessions:
            session.reserve(positions)

    def use_adapter(self, adapter: AdapterTensors) -> None:
        """As `Session.use_adapter`; also raises AdapterError: the adapter does not fit the local blocks."""
        for stage in self._stages:
            stage.use_adapter(adapter)

    def use_taps(self, taps: Sequence[int]) -> None:
        """As `Session.use_taps`."""
        self.taps = tuple(sorted({tap for tap in taps if 0 < tap < self._ends[-1]}))
        for stage in self._stages:
            stage.use_taps(taps)

    def begin(
        self,
        hidden: torch.Tensor,
        parts: Sequence[Chunk],
        forks: Sequence[Fork] | None = None,
        *,
        rope_length: int = 0,
        inputs: Sequence[PositionInputs] = (),
    ) -> list[StagedPositions]:
        """As `Session.begin`; cuts a long prefill into chunks, so that peers and local blocks run in parallel."""
        sent: list[StagedPositions] = []
        offset = 0
        size = min((session.step_positions(len(hidden)) for session in self.sessions), default=len(hidden))
        for step, own in cut_into_steps(parts, size, inputs):
            positions = sum(part.length for part in step)
            sent.append(StagedPositions(step, forks, hidden[offset : offset + positions], rope_length, own))
            offset += positions
            forks = None
            self._positions += positions
            with self._abandoning(sent):
                self._go_on(sent[-1])
        return sent

    def finish(self, sent: list[StagedPositions]) -> torch.Tensor:
        """As `Session.finish`."""
        with self._abandoning(sent):
            while any(piece.sent is not None for piece in sent):
                for piece in sent:
                    if piece.sent is not None:
                        (session, under_way), piece.sent = piece.sent, None
                        self._pass(piece, session.finish(under_way))
                        self._go_on(piece)
        outputs = [piece.hidden for piece in sent]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def abandon(self, sent: list[StagedPositions]) -> None:
        """As `Session.abandon`."""
        for piece in sent:
            if piece.sent is not None:
                (session, under_way), piece.sent = piece.sent, None
                session.abandon(under_way)

    def fetch_kv(self, row: int, length: int) -> dict[str, torch.Tensor]:
        """As `Session.fetch_kv`."""
        return {name: tensor for stage in self._stages for name, tensor in stage.fetch_kv(row, length).items()}

    def close(self) -> None:
        """Frees the memory here and on all hops."""
        for stage in self._stages:
            stage.close()

    def close_later(self) -> None:
        """Frees the memory here, and on all hops within a second; see `SessionDriver.close_later`."""
        for stage in self._stages:
            stage.close_later()

    @contextmanager
    def _abandoning(self, sent: list[StagedPositions]) -> Iterator[None]:
        """Abandons all pieces after an error."""
        try:
            yield
        except BaseException:
            self.abandon(sent)
            raise

    def _go_on(self, piece: StagedPositions) -> None:
        """Runs local stages up to the next remote one, and sends the piece there."""
        while piece.stage < len(self._stages):
            stage, last = self._stages[piece.stage], piece.stage + 1 == len(self._stages)
            if isinstance(stage, Session):
                # Stages before the last one return all positions, because later blocks need them.
                parts = piece.parts if last else [part._replace(keep=part.length) for part in piece.parts]
                size = len(piece.hidden)
                how = {"step_positions": size, "rope_length": piece.rope_length, "inputs": piece.inputs}
                piece.sent = stage, stage.begin(piece.hidden, parts, piece.forks, **how)
                return
            self._pass(piece, stage.step(piece.hidden, piece.parts, piece.forks, piece.rope_length, piece.inputs))

    def _pass(self, piece: StagedPositions, output: torch.Tensor) -> None:
        """Takes in the output of a stage. In each row the hidden states at taps stand before the output."""
        last, size = piece.stage + 1 == len(self._stages), piece.hidden.shape[1]
        if last and isinstance(self._stages[-1], LocalSequences):
            output = select_kept_positions(piece.parts, output)
        if last and piece.tapped:
            output = torch.cat(
                (*(select_kept_positions(piece.parts, states) for states in piece.tapped), output), dim=1
            )
        elif self.taps and not last:
            if self._ends[piece.stage] in self.taps:
                piece.tapped.append(output)
            elif output.shape[1] > size:
                piece.tapped.append(output[:, :-size])
            output = output[:, -size:]
        piece.hidden = output
        piece.stage += 1
