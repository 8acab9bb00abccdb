"""Which model a peer should serve, where it may serve any of several.

Each peer decides for itself, by how much models are asked for and by the cost model that places blocks within one:

- A model is worth the tokens per second that are asked of it, if peers serve all of its blocks. One that lacks blocks
  is worth half of that, times the share that is served: peers that fill it one after the other each gain.
- Where that stays the same the ms count that tokens wait: each waits for the weakest block of its model
  (`scheduler.placement.rates`). A move to a model that is busy must take a share of them away, and make up for the time
  that it costs.
- A peer never leaves a block of a model in use, unless others serve it of which one has a lower id: as within a model,
  with however stale views, every block keeps the lowest of those that leave it at once (`scheduler.peer_moves`).

Each move raises what the models are worth, or at the same worth takes a share of the waiting away. So peers that move
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
LEAST_DEMAND: Final = 0.01  # tokens per second that count as demand
BUSY: Final = 0.3  # of the time the weakest block of a model computes, if it is busy


class DecayingRate:
    """Events per second, smoothed: each counts less and less, to a third after a minute."""

    def __init__(self) -> None:
        self._count, self._at_s = 0.0, -math.inf

    def add(self, events: float, now_s: float) -> None:
        self._count, self._at_s = self._left(now_s) + events, max(now_s, self._at_s)

    def at(self, now_s: float) -> float:
        return self._left(now_s) / SMOOTHED_S

    def _left(self, now_s: float) -> float:
        return self._count * math.exp(min(0.0, self._at_s - now_s) / SMOOTHED_S) if self._count else 0.0


@dataclass(frozen=True)
class Offered:
    """A model as a peer sees it that may serve it.

    others: that serve it, or are on their way to it. own: the peer itself with the blocks and the speed that it has
    there, or would have. demand: tokens per second that are asked for. in_use: somebody has asked in the last minutes.
    """

    id: str
    num_blocks: int
    others: Sequence[Peer]
    own: Peer
    demand: float = 0.0
    in_use: bool = False

    def worth(self, *, with_own: bool) -> float:
        """The share of the demand that is served."""
        served = sum(map(bool, coverage(self._peers(with_own), self.num_blocks)))
        return 1.0 if served == self.num_blocks else served / self.num_blocks / 2

    def wait_ms(self, *, with_own: bool) -> float:
        """That a token waits for the weakest block; 0 if a block is served by nobody."""
        weakest = float(self._rates(self._peers(with_own)).min())
        return 1e6 / weakest if weakest else 0.0

    @property
    def can_spare_own(self) -> bool:
        """Whether others serve all blocks, and at each of the peer's own blocks one of them has a lower id."""
        own = slice(self.own.start, self.own.end)
        lower = self._rates([peer for peer in self.others if peer.id < self.own.id])
        return bool(self._rates(self.others).all() and lower[own].all())

    def _peers(self, with_own: bool) -> Sequence[Peer]:
        return [*self.others, self.own] if with_own else self.others

    def _rates(self, peers: Sequence[Peer]) -> Floats:
        spans = Spans.of(peers, self.num_blocks)
        return sum_per_block(spans.start, spans.end, spans.rate, self.num_blocks)


def first_model(offered: Sequence[Offered]) -> str:
    """The model that a new peer should serve: of those that nobody asks for one that lacks blocks, or is slow. Raises
    ValueError if there is none."""

    def gain(model: Offered) -> tuple[float, float, str]:
        demand = model.demand + LEAST_DEMAND
        worth, waits = model.worth(with_own=True) - model.worth(with_own=False), 0.0
        if model.worth(with_own=False) == 1.0:
            waits = model.wait_ms(with_own=False) - model.wait_ms(with_own=True)
        return demand * worth, demand * waits, model.id

    return max(offered, key=gain).id


def better_model(
    here: Offered, others: Sequence[Offered], *, settled_s: float = np.inf, sessions: int = 0
) -> str | None:
    """The model that a peer should serve in the place of the one that it serves; None: it stays. See this module.

    settled_s: since it last moved or joined. sessions: open ones, which would be replayed elsewhere.
    """
    can_spare = here.can_spare_own
    if here.in_use and not can_spare:
        return None
    demand = here.demand if here.in_use else 0.0
    lost = demand * (here.worth(with_own=True) - here.worth(with_own=False))
    slowed_ms = demand * (here.wait_ms(with_own=False) - here.wait_ms(with_own=True)) if can_spare else 0.0
    found: list[tuple[float, float, str]] = []
    for model in others:
        if model.demand < LEAST_DEMAND:
            continue
        worth = model.demand * (model.worth(with_own=True) - model.worth(with_own=False)) - lost
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
