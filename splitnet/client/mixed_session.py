"""A session whose blocks are partly here and partly on peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from splitnet.client.link_use import LinkUse
from splitnet.client.local_blocks import Blocks, LocalBlocks, LocalRows, LocalSpan
from splitnet.client.planner import Forecast
from splitnet.client.route_hop import RouteHop
from splitnet.client.session import Session, cut_into_steps
from splitnet.client.session import UnderWay as SentThrough
from splitnet.client.session_driver import Traffic
from splitnet.client.session_events import Recovered
from splitnet.model.adapters import Adapter
from splitnet.net.messages import Fork, Part, Timing


@dataclass(slots=True)
class _Piece:
    """Positions on their way through the stages."""

    parts: list[Part]
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
        budget: positions to reserve on the peers.
    """

    def __init__(self, local: LocalBlocks, open_session: Callable[[int, Blocks], Session], budget: int) -> None:
        self._stages: list[LocalRows | Session] = [
            LocalRows(stage) if isinstance(stage, LocalSpan) else open_session(budget, stage) for stage in local.stages
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

    def forecast(self, positions: int) -> Forecast:
        """As `Session.forecast`, of what is not here."""
        forecasts = [session.forecast(positions) for session in self.sessions]
        return Forecast(
            sum(forecast.latency_ms for forecast in forecasts),
            max((forecast.stage_ms for forecast in forecasts), default=0.0),
        )

    def reserve(self, positions: int) -> None:
        """As `Session.reserve`; what is here takes memory as positions come."""
        for session in self.sessions:
            session.reserve(positions)

    def use_adapter(self, adapter: Adapter) -> None:
        """As `Session.use_adapter`; raises AdapterError, too, if it does not fit the blocks that are here."""
        for stage in self._stages:
            stage.use_adapter(adapter)

    def step(self, hidden: torch.Tensor, parts: Sequence[Part], forks: Sequence[Fork] | None = None) -> torch.Tensor:
        """As `Session.step`."""
        return self.finish(self.begin(hidden, parts, forks))

    def begin(
        self, hidden: torch.Tensor, parts: Sequence[Part], forks: Sequence[Fork] | None = None, *, reach: int = 0
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


def _keeping_all(parts: Sequence[Part]) -> list[Part]:
    """The same positions, of which all come back: other blocks need them."""
    return [part._replace(keep=part.length) for part in parts]


def _kept_positions(output: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """What comes back of the output of all positions, `[positions, hidden]`."""
    pieces = output.split([part.length for part in parts])
    return torch.cat([piece[part.length - part.keep :] for piece, part in zip(pieces, parts, strict=True)])
