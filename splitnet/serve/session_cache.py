"""Sessions that are kept after a request, so that the next turn of a chat computes only its new positions."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Handle = TypeVar("Handle")

COMMON_PREFIX_TOKENS = 128  # Unrelated chats often have up to this many first tokens in common
MIN_SHARED_PART = 0.5
"""A kept session is used for a prompt only if at least this share of the session's tokens is also the beginning of the
prompt, because the session's other tokens are dropped."""


@dataclass(frozen=True)
class KeepLimits:
    """Limits of kept sessions: their number, the positions that they reserve on peers, and seconds without use."""

    sessions: int
    positions: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _KeptSession(Generic[Handle]):
    owner: str
    tokens: np.ndarray
    positions: int
    handle: Handle
    since: float


class SessionCache(Generic[Handle]):
    """Kept sessions. Evicts the least recently used session of the owner with the most sessions. Thread-safe.

    A taken session has one user until the session is kept again. An owner never gets a session of another owner,
    because a hit would reveal the prompts of the other owner. close: closes a session; called without the lock.
    """

    def __init__(
        self, limits: KeepLimits, close: Callable[[Handle], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._close = close
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: list[_KeptSession[Handle]] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        with self._lock:
            return sum(len(kept.tokens) for kept in self._kept)

    def take_session(self, owner: str, prompt: list[int]) -> tuple[Handle, int] | None:
        """Takes the owner's session that has the longest prefix in common with a prompt; also returns that length."""
        wanted = np.asarray(prompt)
        with self._lock:
            shared = [_shared(kept.tokens, wanted) if kept.owner == owner else 0 for kept in self._kept]
            for index, kept in enumerate(self._kept):
                # For a long prompt, the prefix stores of peers may contain far more tokens than the common prefix.
                little = shared[index] < COMMON_PREFIX_TOKENS < len(prompt) - shared[index]
                if little or shared[index] < MIN_SHARED_PART * len(kept.tokens):
                    shared[index] = 0
            best = max(range(len(shared)), key=shared.__getitem__, default=0)
            return (self._kept.pop(best).handle, shared[best]) if any(shared) else None

    def keep_session(self, owner: str, tokens: list[int], positions: int, handle: Handle) -> None:
        """Keeps a session if the limits allow it; closes older sessions where the limits require it.

        tokens: the tokens whose keys and values the peers hold. positions: how many positions the session reserves.
        """
        with self._lock:
            self._kept.append(_KeptSession(owner, np.asarray(tokens), positions, handle, self._clock()))
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
        """Closes all kept sessions; returns whether there were any."""
        with self._lock:
            closed, self._kept = self._kept, []
        for kept in closed:
            self._close(kept.handle)
        return bool(closed)


def _shared(held: np.ndarray, wanted: np.ndarray) -> int:
    length = min(len(held), len(wanted))
    differs = held[:length] != wanted[:length]
    return int(differs.argmax()) if differs.any() else length
