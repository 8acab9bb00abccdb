"""What became of the clients of a simulation, in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from simulator.engine import Simulation
from simulator.session import FINISHED

SETTLED_MS = 60_000.0
"""Peers that served for less time say nothing about the balance of load."""


T_QUANTILES: Final = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)
"""97.5% points of Student's distribution by the degrees of freedom, from 1 on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one policy in one or more worlds.

    ttft_ms: from the client's wish for a route to the first token, of sessions that got one. token_ms: mean time
    between tokens, of each session with two or more. hops: of each session that has finished. utilisation: of each
    peer, the share of the time in which it served that it was busy. tokens: in time_s, which is how long clients came.
    predicted: what the plan said of the time per token, as a share of what it was; of sessions that kept their route.
    """

    sessions: int
    failed: int
    ttft_ms: Sequence[float]
    token_ms: Sequence[float]
    hops: Sequence[int]
    utilisation: Sequence[float]
    predicted: Sequence[float]
    tokens: int
    time_s: float
    peer_moves: int
    session_moves: int
    repairs: int
    record_bytes: int

    @property
    def goodput(self) -> float:
        """Tokens per second that clients got."""
        return self.tokens / self.time_s

    @property
    def gini(self) -> float:
        """How uneven the peers are busy: 0, all alike; 1, one does everything."""
        busy = np.sort(np.array(self.utilisation))
        if not len(busy) or busy.sum() == 0:
            return 0.0
        ranks = np.arange(1, len(busy) + 1)
        return float((2 * ranks - len(busy) - 1) @ busy / (len(busy) * busy.sum()))

    def figures(self) -> dict[str, float]:
        """What there is to compare; not a number where nothing was there to measure."""
        return {
            "ttft_p50_s": percentile(self.ttft_ms, 50) / 1000,
            "ttft_p95_s": percentile(self.ttft_ms, 95) / 1000,
            "token_p50_ms": percentile(self.token_ms, 50),
            "token_p95_ms": percentile(self.token_ms, 95),
            "goodput_tokens_per_s": self.goodput,
            "sessions": self.sessions,
            "failed": self.failed,
            "hops_mean": sum(self.hops) / max(1, len(self.hops)),
            "utilisation_max": max(self.utilisation, default=0.0),
            "utilisation_mean": sum(self.utilisation) / max(1, len(self.utilisation)),
            "utilisation_gini": self.gini,
            "foretold_p50": percentile(self.predicted, 50),
            "peer_moves": self.peer_moves,
            "session_moves": self.session_moves,
            "repairs": self.repairs,
            "record_bytes": self.record_bytes,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Not a number if there are no values."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def outcome_of(simulation: Simulation) -> Outcome:
    """Of a simulation that has ended."""
    sessions = simulation.sessions
    finished = [session for session in sessions if session.state == FINISHED]
    several = [session for session in sessions if session.tokens > 1]
    took_ms = {session: (session.last_ms - session.first_ms) / (session.tokens - 1) for session in several}
    return Outcome(
        sessions=len(sessions),
        failed=len(sessions) - len(finished),
        ttft_ms=[session.first_ms - session.arrived_ms for session in sessions if session.tokens],
        token_ms=list(took_ms.values()),
        hops=[len(session.hops) for session in finished],
        utilisation=[
            node.busy_ms / node.served_ms for node in simulation.nodes.values() if node.served_ms >= SETTLED_MS
        ],
        predicted=[
            session.predicted_ms / took
            for session, took in took_ms.items()
            if session.predicted_ms and not session.repairs and not session.moves
        ],
        tokens=simulation.tokens_in_time,
        time_s=simulation.world.settings.duration_s,
        peer_moves=simulation.membership.moves,
        session_moves=sum(session.moves for session in sessions),
        repairs=sum(session.repairs for session in sessions),
        record_bytes=simulation.membership.record_bytes,
    )


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    """The same policy in several worlds, as if all their sessions were of one."""
    return Outcome(
        sessions=sum(outcome.sessions for outcome in outcomes),
        failed=sum(outcome.failed for outcome in outcomes),
        ttft_ms=[value for outcome in outcomes for value in outcome.ttft_ms],
        token_ms=[value for outcome in outcomes for value in outcome.token_ms],
        hops=[value for outcome in outcomes for value in outcome.hops],
        utilisation=[value for outcome in outcomes for value in outcome.utilisation],
        predicted=[value for outcome in outcomes for value in outcome.predicted],
        tokens=sum(outcome.tokens for outcome in outcomes),
        time_s=sum(outcome.time_s for outcome in outcomes),
        peer_moves=sum(outcome.peer_moves for outcome in outcomes),
        session_moves=sum(outcome.session_moves for outcome in outcomes),
        repairs=sum(outcome.repairs for outcome in outcomes),
        record_bytes=max(outcome.record_bytes for outcome in outcomes),
    )


def differences(outcomes: Sequence[Outcome], others: Sequence[Outcome], figure: str) -> tuple[float, float, float]:
    """By what share a figure of `outcomes` exceeds that of `others` in the same worlds: mean, and 95% interval.

    The mean of the ratios is geometric. A world in which one of the two is 0 or nothing does not count; an interval of
    less than two worlds is not a number.
    """
    pairs = [(one.figures()[figure], other.figures()[figure]) for one, other in zip(outcomes, others, strict=True)]
    ratios = np.log([one / other for one, other in pairs if one > 0 and other > 0])
    if not len(ratios):
        return float("nan"), float("nan"), float("nan")
    spread = float("nan")
    if len(ratios) > 1:
        quantile = T_QUANTILES[min(len(ratios) - 1, len(T_QUANTILES)) - 1]
        spread = quantile * float(ratios.std(ddof=1)) / len(ratios) ** 0.5
    mean = float(ratios.mean())
    return float(np.expm1(mean)), float(np.expm1(mean - spread)), float(np.expm1(mean + spread))
