"""Which model a peer should serve, if it may serve several.

Each peer decides for itself, by the demand for models and the cost model that places blocks within one:

- The worth of a model is its demand in tokens per second, if all of its blocks have peers. The worth of a model that
  lacks blocks is half of its demand, times the share of blocks that have peers: so each peer that adds blocks raises
  it.
- If a move does not change the total worth, the waiting time of tokens counts: each token waits for the weakest block
of
  its model (`scheduler.placement.rates`). A move to a busy model must remove a share of the waiting time, and repay its
  own cost.
- A peer leaves a block of a model in use only if other peers serve this block, and one of them has a lower id. As
within
  a model, every block then keeps the lowest of the peers that would leave it at the same time, however stale the views
  are (`scheduler.peer_moves`).

Each move raises the total worth of the models, or keeps it and removes a share of the waiting time. So peers that move
one after the other do not go back and forth while the demand stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from scheduler.facts import Floats, Peer, coverage
from scheduler.peer_moves import HORIZON_S, LOAD_S, MIN_GAIN, REPLAY_S, SETTLE_S
from scheduler.placement import Spans, sum_per_block

SMOOTHED_S: Final = 60.0
LEAST_DEMAND: Final = 0.01  # lowest rate in tokens per second that counts as demand
BUSY: Final = 0.3  # a model is busy if its weakest block computes for this share of the time


class DecayingRate:
    """Events per second, smoothed: the weight of an event falls to a third within a minute."""

    def __init__(self) -> None:
        self._count, self._at_s = 0.0, -math.inf

    def add_events(self, events: float, now_s: float) -> None:
        self._count, self._at_s = self._left(now_s) + events, max(now_s, self._at_s)

    def rate_at(self, now_s: float) -> float:
        return self._left(now_s) / SMOOTHED_S

    def _left(self, now_s: float) -> float:
        return self._count * math.exp(min(0.0, self._at_s - now_s) / SMOOTHED_S) if self._count else 0.0


@dataclass(frozen=True)
class ModelOffer:
    """A model that a peer may serve, and the facts about it.

    others: other peers that serve the model, or move to it. own: the peer itself, with its actual or possible blocks
    and speed. demand: tokens per second. in_use: whether a client has asked for the model in the last minutes.
    """

    id: str
    num_blocks: int
    others: Sequence[Peer]
    own: Peer
    demand: float = 0.0
    in_use: bool = False

    def served_share(self, *, with_own: bool) -> float:
        """The part of the demand that counts as served, 0 to 1."""
        served = sum(map(bool, coverage(self._peers(with_own), self.num_blocks)))
        return 1.0 if served == self.num_blocks else served / self.num_blocks / 2

    def wait_ms(self, *, with_own: bool) -> float:
        """Ms that a token waits for the weakest block; 0 if a block has no peer."""
        weakest = float(self._rates(self._peers(with_own)).min())
        return 1e6 / weakest if weakest else 0.0

    @property
    def can_spare_own(self) -> bool:
        """Whether other peers serve all blocks, and each of the peer's own blocks also has a peer with a lower id."""
        own = slice(self.own.start, self.own.end)
        lower = self._rates([peer for peer in self.others if peer.id < self.own.id])
        return bool(self._rates(self.others).all() and lower[own].all())

    def _peers(self, with_own: bool) -> Sequence[Peer]:
        return [*self.others, self.own] if with_own else self.others

    def _rates(self, peers: Sequence[Peer]) -> Floats:
        spans = Spans.of(peers, self.num_blocks)
        return sum_per_block(spans.start, spans.end, spans.rate, self.num_blocks)


def first_model(offered: Sequence[ModelOffer]) -> str:
    """The model that a new peer should serve; without demand, a model that lacks blocks or is slow.

    Raises ValueError if `offered` is empty.
    """

    def gain(model: ModelOffer) -> tuple[float, float, str]:
        demand = model.demand + LEAST_DEMAND
        worth, waits = model.served_share(with_own=True) - model.served_share(with_own=False), 0.0
        if model.served_share(with_own=False) == 1.0:
            waits = model.wait_ms(with_own=False) - model.wait_ms(with_own=True)
        return demand * worth, demand * waits, model.id

    return max(offered, key=gain).id


def better_model(
    here: ModelOffer, others: Sequence[ModelOffer], *, settled_s: float = np.inf, sessions: int = 0
) -> str | None:
    """The model that a peer should serve instead of its present one; None: it stays. See this module's docstring.

    settled_s: time since the peer last moved or joined. sessions: number of open sessions, which would be replayed at
    other peers.
    """
    can_spare = here.can_spare_own
    if here.in_use and not can_spare:
        return None
    demand = here.demand if here.in_use else 0.0
    lost = demand * (here.served_share(with_own=True) - here.served_share(with_own=False))
    slowed_ms = demand * (here.wait_ms(with_own=False) - here.wait_ms(with_own=True)) if can_spare else 0.0
    found: list[tuple[float, float, str]] = []
    for model in others:
        if model.demand < LEAST_DEMAND:
            continue
        worth = model.demand * (model.served_share(with_own=True) - model.served_share(with_own=False)) - lost
        if worth > 0:
            found.append((worth, 0.0, model.id))
            continue
        waits_ms = model.demand * model.wait_ms(with_own=False)
        if worth < 0 or waits_ms < BUSY * 1000 or settled_s < SETTLE_S * here.in_use:
            continue
        gain_ms = waits_ms - model.demand * model.wait_ms(with_own=True) - slowed_ms
        least_ms = MIN_GAIN * (waits_ms + demand * here.wait_ms(with_own=True))
        if gain_ms > least_ms and gain_ms * HORIZON_S > slowed_ms * LOAD_S + sessions * REPLAY_S * 1000:
            found.append((0.0, gain_ms, model.id))
    return max(found)[2] if found else None
