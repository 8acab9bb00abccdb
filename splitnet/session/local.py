"""A session whose blocks are partly here and partly on peers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from splitnet.blocks.adapters import Adapter
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.blocks.span import Chunk as SpanChunk
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import SplitnetError
from splitnet.session.driver import LinkUse, Traffic
from splitnet.session.events import Recovered
from splitnet.session.failover import RouteHop
from splitnet.session.inference import Session, cut_into_steps
from splitnet.session.inference import UnderWay as SentThrough
from splitnet.swarm.plan import Prediction
from splitnet.wire.log import fork_rows
from splitnet.wire.messages import Chunk, Fork, Timing

Blocks = tuple[int, int]


def parse_local_blocks(text: str, num_blocks: int) -> list[Blocks]:
    """Ranges of blocks in a text such as `0:10` or `0:2,28:30`, in order; ranges that touch become one.

    Raises:
        SplitnetError: it is no such text, or the model has no such blocks.
    """
    ranges: list[Blocks] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d+):(\d+)\s*", piece)
        if match is None or not int(match[1]) < int(match[2]) <= num_blocks:
            raise SplitnetError(
                f"local blocks {text!r} are no blocks of a model that has {num_blocks}: write START:END, as 0:10 for "
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


class LocalBlocks:
    """The spans of a model that are here, and the ranges between them that peers run. Thread-safe.

    Args:
        spans: in order.
        num_blocks: of the model.
    """

    def __init__(self, spans: Sequence[Span], num_blocks: int) -> None:
        self.stages: list[LocalSpan | Blocks] = []
        """What runs the model, in order: spans that are here, and ranges `[start, end)` that are not."""
        position = 0
        for span in spans:
            if position < span.start:
                self.stages.append((position, span.start))
            self.stages.append(LocalSpan(span))
            position = span.end
        if position < num_blocks:
            self.stages.append((position, num_blocks))

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, blocks: str | None, *, device: str = "cpu", weights: str | None = None
    ) -> LocalBlocks:
        """Reads the weights of these blocks, and no others.

        Args:
            blocks: as in `0:10` or `0:2,28:30`; None: none.
            weights: what they are held as, see `splitnet.quant.choose`; None: as they are stored.

        Raises:
            SplitnetError: the model has no such blocks.
            UnsupportedModel, WeightsError, OutOfMemory: as `Span.load`.
        """
        ranges = parse_local_blocks(blocks, checkpoint.num_blocks) if blocks is not None else []
        spans = [Span.load(checkpoint, *blocks, device=device, weights=weights) for blocks in ranges]
        return cls(spans, checkpoint.num_blocks)

    @property
    def ranges(self) -> list[Blocks]:
        """The blocks that are here."""
        return [(stage.start, stage.end) for stage in self.stages if isinstance(stage, LocalSpan)]


class LocalSpan:
    """A span that several sessions of this process share: it runs for one at a time."""

    def __init__(self, span: Span) -> None:
        self.start, self.end = span.start, span.end
        self._span = span
        self._lock = threading.Lock()

    def new_row(self, adapter: Adapter | None) -> SequenceCache:
        return self._span.new_row(adapter=adapter)

    def run(self, hidden: torch.Tensor, parts: Sequence[SpanChunk]) -> torch.Tensor:
        """`[positions, hidden]` -> `[positions, hidden]` float32, see `Span.forward`."""
        with self._lock:
            return self._span.forward(hidden, parts).float()

    def keys_and_values(self, row: SequenceCache, length: int) -> dict[str, torch.Tensor]:
        """See `Span.keys_and_values`."""
        return self._span.keys_and_values(row, length)

    def fit(self, adapter: Adapter) -> Adapter | None:
        """The part of an adapter that belongs to these blocks, on their device; None: it has none.

        Raises:
            AdapterError: it does not fit them.
        """
        tensors = adapter.within(self.start, self.end)
        if not tensors:
            return None
        own = Adapter({name: tensor.to(self._span.device) for name, tensor in tensors.items()})
        with self._lock:
            self._span.fit(own)
        return own

    def sequences(
        self, hidden: torch.Tensor, lengths: Sequence[int], adapter: Adapter | None, reach: int = 0
    ) -> torch.Tensor:
        """Whole sequences, with a graph where torch records one: see `Span.sequences`."""
        with self._lock:
            return self._span.sequences(hidden, lengths, adapter, reach).to(hidden.device, hidden.dtype)


class LocalSequences:
    """The KV caches of one session in a local span. One thread uses them at a time."""

    def __init__(self, span: LocalSpan) -> None:
        self._span = span
        self._rows: dict[int, SequenceCache] = {}
        self._adapter: Adapter | None = None

    def use_adapter(self, adapter: Adapter) -> None:
        """Before the first step. Raises AdapterError if it does not fit the blocks."""
        self._adapter = self._span.fit(adapter)

    def step(
        self, hidden: torch.Tensor, parts: Sequence[Chunk], forks: Sequence[Fork] | None, reach: int = 0
    ) -> torch.Tensor:
        """Runs new positions; what the rows hold from a part's start on is forgotten before.

        Args:
            hidden: `[positions, hidden]`.
            parts, forks, reach: see `splitnet.wire.messages.Step`; all positions are returned, whatever `keep` says.

        Returns:
            `[positions, hidden]` float32.
        """
        if forks is not None:
            self._rows = fork_rows(self._rows, forks, lambda row: row.fork())
        span_parts: list[SpanChunk] = []
        for part in parts:
            row = self._rows.get(part.row)
            if row is None:
                row = self._rows[part.row] = self._span.new_row(self._adapter)
            row.crop(part.start)
            span_parts.append(SpanChunk(row, part.start, part.length, self._adapter, reach))
        return self._span.run(hidden, span_parts)

    def close(self) -> None:
        """Forgets all rows."""
        self._rows = {}

    def fetch_kv(self, row: int, length: int) -> dict[str, torch.Tensor]:
        """Keys and values of the first positions of a row, named as in `Session.fetch_kv`."""
        return self._span.keys_and_values(self._rows[row], length)


@dataclass(slots=True)
class _Piece:
    """Positions on their way through the stages."""

    parts: list[Chunk]
    forks: Sequence[Fork] | None
    hidden: torch.Tensor
    reach: int
    stage: int = 0
    """Where they are: the first that they have not passed."""
    sent: SentThrough | None = None


@dataclass(frozen=True, slots=True)
class UnderWay:
    """New positions that were sent through the stages."""

    pieces: list[_Piece]


class MixedSession:
    """Rows of positions whose KV caches are here for some blocks, and along routes of peers for the others.

    What `Session` is for a chain this is for a whole model. One thread uses it at a time.

    Args:
        local: the blocks that are here.
        open_session: makes the session for a range of blocks that peers run, with a budget of positions.
        reservation: positions to reserve on the peers.
    """

    def __init__(self, local: LocalBlocks, open_session: Callable[[int, Blocks], Session], reservation: int) -> None:
        self._stages: list[LocalSequences | Session] = [
            LocalSequences(stage) if isinstance(stage, LocalSpan) else open_session(reservation, stage)
            for stage in local.stages
        ]
        self._positions = 0

    @property
    def sessions(self) -> list[Session]:
        """Those on peers, in order."""
        return [stage for stage in self._stages if isinstance(stage, Session)]

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
    def compute_ms(self) -> float:
        return sum(session.compute_ms for session in self.sessions)

    @property
    def traffic(self) -> Traffic:
        """Of all routes together."""
        moved = [session.traffic for session in self.sessions]
        return Traffic(
            steps=sum(traffic.steps for traffic in moved),
            positions=self._positions,
            bytes_sent=sum(traffic.bytes_sent for traffic in moved),
            bytes_received=sum(traffic.bytes_received for traffic in moved),
        )

    def links(self) -> list[LinkUse]:
        return [link for session in self.sessions for link in session.links()]

    def prediction(self, positions: int) -> Prediction:
        """As `Session.forecast`, of what is not here."""
        predictions = [session.prediction(positions) for session in self.sessions]
        return Prediction(
            sum(prediction.latency_ms for prediction in predictions),
            max((prediction.slowest_hop_ms for prediction in predictions), default=0.0),
        )

    def reserve(self, positions: int) -> None:
        """As `Session.reserve`; what is here takes memory as positions come."""
        for session in self.sessions:
            session.reserve(positions)

    def use_adapter(self, adapter: Adapter) -> None:
        """As `Session.use_adapter`; raises AdapterError, too, if it does not fit the blocks that are here."""
        for stage in self._stages:
            stage.use_adapter(adapter)

    def step(self, hidden: torch.Tensor, parts: Sequence[Chunk], forks: Sequence[Fork] | None = None) -> torch.Tensor:
        """As `Session.step`."""
        return self.finish(self.begin(hidden, parts, forks))

    def begin(
        self, hidden: torch.Tensor, parts: Sequence[Chunk], forks: Sequence[Fork] | None = None, *, reach: int = 0
    ) -> UnderWay:
        """As `Session.begin`; a long prefill goes in pieces, so that peers run one while the next is run here."""
        sent = UnderWay([])
        offset = 0
        size = min((session.step_positions(len(hidden)) for session in self.sessions), default=len(hidden))
        for step in cut_into_steps(parts, size):
            positions = sum(part.length for part in step)
            piece = _Piece(step, forks, hidden[offset : offset + positions], reach)
            offset += positions
            forks = None
            sent.pieces.append(piece)
            self._positions += positions
            with self._abandoning(sent):
                self._go_on(piece)
        return sent

    def finish(self, sent: UnderWay) -> torch.Tensor:
        """As `Session.finish`."""
        with self._abandoning(sent):
            while any(piece.sent is not None for piece in sent.pieces):
                for piece in sent.pieces:
                    self._finish_stage(piece)
        outputs = [piece.hidden for piece in sent.pieces]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def abandon(self, sent: UnderWay) -> None:
        """As `Session.abandon`."""
        for piece in sent.pieces:
            session = self._stages[piece.stage] if piece.sent is not None else None
            if isinstance(session, Session) and piece.sent is not None:
                session.abandon(piece.sent)
                piece.sent = None

    def fetch_kv(self, row: int, length: int) -> dict[str, torch.Tensor]:
        """As `Session.fetch_kv`."""
        tensors: dict[str, torch.Tensor] = {}
        for stage in self._stages:
            tensors.update(stage.fetch_kv(row, length))
        return tensors

    def close(self) -> None:
        """Frees the memory here and on all hops."""
        for stage in self._stages:
            stage.close()

    def close_later(self) -> None:
        """Frees the memory here, and on all hops within a second; see `SessionDriver.close_later`."""
        for stage in self._stages:
            if isinstance(stage, Session):
                stage.close_later()
            else:
                stage.close()

    def _finish_stage(self, piece: _Piece) -> None:
        """Takes what comes back from the stage where a piece is, and sends it on."""
        session = self._stages[piece.stage] if piece.sent is not None else None
        if isinstance(session, Session) and piece.sent is not None:
            under_way, piece.sent = piece.sent, None
            piece.hidden = session.finish(under_way)
            piece.stage += 1
            self._go_on(piece)

    @contextmanager
    def _abandoning(self, sent: UnderWay) -> Iterator[None]:
        """After an error nothing is under way any more."""
        try:
            yield
        except BaseException:
            self.abandon(sent)
            raise

    def _go_on(self, piece: _Piece) -> None:
        """Runs the stages that are here, up to the next that is not."""
        while piece.stage < len(self._stages):
            stage, last = self._stages[piece.stage], piece.stage + 1 == len(self._stages)
            if isinstance(stage, Session):
                parts = piece.parts if last else _keeping_all(piece.parts)
                size = len(piece.hidden)
                piece.sent = stage.begin(piece.hidden, parts, piece.forks, step_positions=size, reach=piece.reach)
                return
            piece.hidden = stage.step(piece.hidden, piece.parts, piece.forks, piece.reach)
            if last:
                piece.hidden = _kept_positions(piece.hidden, piece.parts)
            piece.stage += 1


def _keeping_all(parts: Sequence[Chunk]) -> list[Chunk]:
    """The same positions, of which all come back: other blocks need them."""
    return [part._replace(keep=part.length) for part in parts]


def _kept_positions(output: torch.Tensor, parts: Sequence[Chunk]) -> torch.Tensor:
    """What comes back of the output of all positions, `[positions, hidden]`."""
    pieces = output.split([part.length for part in parts])
    return torch.cat([piece[part.length - part.keep :] for piece, part in zip(pieces, parts, strict=True)])
