"""Sessions that are kept after their request, so that the next turn of a chat computes only what is new."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Handle = TypeVar("Handle")

LITTLE = 128  # tokens that many chats begin with
WORTH_TAKING = 0.5
"""Part of its tokens that a session must share with a prompt to be used for it: the rest is lost with that."""


@dataclass(frozen=True)
class KeepLimits:
    """How much is kept at most: sessions, positions that they reserve on the peers, and seconds without use."""

    sessions: int
    positions: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _Kept(Generic[Handle]):
    owner: str
    tokens: np.ndarray
    positions: int
    handle: Handle
    since: float


class SessionCache(Generic[Handle]):
    """Kept sessions, of which the least recently used of the owner with most of them go first. Thread-safe.

    A session that is taken has one user until it is kept again. Owners never get sessions of each other: these
    tell what was asked before. `close` frees a session, and is called without the lock.
    """

    def __init__(
        self, limits: KeepLimits, close: Callable[[Handle], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._close = close
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: list[_Kept[Handle]] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        with self._lock:
            return sum(len(kept.tokens) for kept in self._kept)

    def take(self, owner: str, prompt: list[int]) -> tuple[Handle, int] | None:
        """The session of an owner that shares most with the beginning of a prompt, and how many tokens that are."""
        wanted = np.asarray(prompt)
        with self._lock:
            shared = [_shared(kept.tokens, wanted) if kept.owner == owner else 0 for kept in self._kept]
            for index, kept in enumerate(self._kept):
                # Peers may have stored far more of a long prompt.
                little = shared[index] < LITTLE < len(prompt) - shared[index]
                if little or shared[index] < WORTH_TAKING * len(kept.tokens):
                    shared[index] = 0
            best = max(range(len(shared)), key=shared.__getitem__, default=0)
            return (self._kept.pop(best).handle, shared[best]) if any(shared) else None

    def keep(self, owner: str, tokens: list[int], positions: int, handle: Handle) -> None:
        """Keeps a session if the limits allow it, in the place of others that were not used for longer.

        `tokens` are those whose keys and values the peers hold, `positions` how many it reserves there.
        """
        with self._lock:
            self._kept.append(_Kept(owner, np.asarray(tokens), positions, handle, self._clock()))
        self.expire()

    def expire(self) -> None:
        with self._lock:
            oldest = self._clock() - self._limits.seconds
            limits = self._limits
            closed = [kept for kept in self._kept if kept.since <= oldest or kept.positions > limits.positions]
            left = [kept for kept in self._kept if kept not in closed]
            while len(left) > limits.sessions or sum(kept.positions for kept in left) > limits.positions:
                counts = Counter(kept.owner for kept in left)
                victim = next(kept for kept in left if counts[kept.owner] == max(counts.values()))
                left.remove(victim)
                closed.append(victim)
            self._kept = left
        for kept in closed:
            self._close(kept.handle)

    def clear(self) -> bool:
        """Closes all; whether there were any."""
        with self._lock:
            closed, self._kept = self._kept, []
        for kept in closed:
            self._close(kept.handle)
        return bool(closed)


def _shared(held: np.ndarray, wanted: np.ndarray) -> int:
    length = min(len(held), len(wanted))
    differs = held[:length] != wanted[:length]
    return int(differs.argmax()) if differs.any() else length
