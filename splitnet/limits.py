"""Tokens per minute: what was spent comes back evenly, and what was taken beyond it is owed."""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Hashable

from splitnet.errors import SplitnetError

MINUTE_S = 60.0


class TokenBucket:
    """Of one key. How much a minute has is told at each call, as it may change.

    Attributes:
        at: when tokens were spent last, in seconds.
    """

    def __init__(self) -> None:
        self.at = 0.0
        self._spent = 0.0

    def wait_s(self, per_minute: int, now: float) -> int:
        """Seconds until there are some; 0: there are."""
        owed = self._still_spent(per_minute, now) - per_minute
        return math.floor(owed * MINUTE_S / per_minute) + 1 if owed >= 0 else 0

    def spend(self, tokens: int, per_minute: int, now: float) -> None:
        """Takes tokens away, also where there are not as many."""
        self._spent = self._still_spent(per_minute, now) + tokens
        self.at = now

    def _still_spent(self, per_minute: int, now: float) -> float:
        """What was spent and has not come back."""
        return max(0.0, self._spent - (now - self.at) * per_minute / MINUTE_S)


class Pace:
    """Keeps what is sent at a rate, evenly: a bucket without depth."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def wait_s(self, tokens: int, per_s: float, now: float | None = None) -> float:
        """Seconds to wait after `tokens` were used."""
        now = time.monotonic() if now is None else now
        self._free_at = max(self._free_at, now) + tokens / per_s
        return self._free_at - now


class Budget:
    """Bytes that are allocated, in all and by account. Thread-safe; every call is O(number of accounts given).

    An account is given as its levels, the widest first: `reserve(size, key, connection)` counts for the key, for that
    connection of the key, and in all. Count what is allocated, not what was announced.

    Args:
        limit: bytes in all.
        most: bytes that one account may hold, by level; None, or a level that is not named: as much as is left for all
            others (dynamic thresholds, Choudhury and Hahne 1998), so that one account gets half of the memory at most,
            and there is always some for the next. What an account takes first only has to fit.

    Attributes:
        limit: bytes in all.
        used: bytes that are held now.
        refused: how many reservations were refused.
    """

    def __init__(self, limit: int, most: tuple[int | None, ...] = ()) -> None:
        self.limit = limit
        self.used = 0
        self.refused = 0
        self._most = most
        self._held: dict[tuple[Hashable, ...], int] = {}
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        return self.limit - self.used

    def accounts(self) -> list[tuple[tuple[Hashable, ...], int]]:
        """All accounts of all levels, with the bytes that each holds."""
        with self._lock:
            return list(self._held.items())

    def held(self, *account: Hashable) -> int:
        """Bytes that an account holds."""
        return self._held.get(account, 0)

    def has_room(self, nbytes: int, *account: Hashable) -> bool:
        """Whether `reserve` would succeed now."""
        free = self.free
        if nbytes > free:
            return False
        for level in range(1, len(account) + 1):
            held = self._held.get(account[:level], 0)
            most = self._most[level - 1] if level <= len(self._most) else None
            if held and held + nbytes > (free if most is None else most):
                return False
        return True

    def reserve(self, nbytes: int, *account: Hashable) -> bool:
        """Counts bytes that are about to be allocated; False, and nothing is counted, if they do not fit."""
        with self._lock:
            if self.has_room(nbytes, *account):
                self._add(nbytes, account)
                return True
            self.refused += 1
            return False

    def release(self, nbytes: int, *account: Hashable) -> None:
        """Undoes one `reserve`, or a part of it."""
        with self._lock:
            self._add(-nbytes, account)

    def hold(self, nbytes: int, *account: Hashable) -> None:
        """Says what an account holds, where that is measured and not asked for; `used` may come to exceed `limit`."""
        with self._lock:
            self._add(nbytes - self._held.get(account, 0), account)

    def _add(self, nbytes: int, account: tuple[Hashable, ...]) -> None:
        self.used += nbytes
        for level in range(1, len(account) + 1):
            held = self._held.get(account[:level], 0) + nbytes
            if held:
                self._held[account[:level]] = held
            else:
                self._held.pop(account[:level], None)


BURST_S = 0.25
"""What comes together after a pause passes at once, as much as a share has in so long."""
LEAST_BURST = 1 << 20
ACTIVE_S = 1.0


class Places:
    """Counts what others hold, in all and by names of several kinds.

    Args:
        most: in all.
        most_of: of one name of each kind.

    Attributes:
        taken: places that are held.
        refused: how often there was none.
    """

    def __init__(self, most: int, **most_of: int) -> None:
        self.taken = 0
        self.refused = 0
        self._most = most
        self._most_of = most_of
        self._held: Counter[tuple[str, Hashable]] = Counter()

    def __len__(self) -> int:
        """Names that hold something."""
        return len(self._held)

    def take(self, **names: Hashable) -> bool:
        """Takes one place in the name of each kind; False if one of these, or all, hold too many."""
        full = any(self._held[kind, name] >= self._most_of[kind] for kind, name in names.items())
        if full or self.taken >= self._most:
            self.refused += 1
            return False
        self.taken += 1
        self._held.update(names.items())
        return True

    def held(self, kind: str, name: Hashable) -> int:
        """How many places of this name are taken."""
        return self._held[kind, name]

    def leave(self, **names: Hashable) -> None:
        """Undoes one `take`."""
        self.taken -= 1
        for item in names.items():
            self._held[item] -= 1
            if not self._held[item]:
                del self._held[item]


class Shares:
    """Bytes per second that are shared evenly by the names that pass some: a token bucket for each.

    Args:
        bytes_per_s: of all together.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._owed: dict[Hashable, tuple[float, float]] = {}
        """Bytes that were passed beyond what the time allowed, and as of when."""

    def delay_s(self, name: Hashable, nbytes: int, now: float) -> float:
        """Counts bytes that were passed, and tells how long to pass no more.

        Args:
            now: in seconds.
        """
        owed, at = self._owed.pop(name, (0.0, now))
        while self._owed:  # who passed something longest ago stands first
            first = next(iter(self._owed))
            if now - self._owed[first][1] <= ACTIVE_S:
                break
            del self._owed[first]
        rate = self._rate / (len(self._owed) + 1)
        owed = max(0.0, owed - (now - at) * rate) + nbytes
        self._owed[name] = owed, now
        return max(0.0, owed - max(rate * BURST_S, LEAST_BURST)) / rate


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

_LEAST_BYTES = 10**6


def parse_bytes(text: str) -> int:
    """Bytes in a text such as `4GiB` or `500M`; of a number alone, which is bytes, a megabyte is the least but none.

    Raises:
        SplitnetError: it is no amount, or so few bytes that another unit must be meant.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise SplitnetError(f"{text!r} is not an amount of memory: write it as 4GiB or 500MB")
    amount = float(match[1]) * _UNITS[match[2]]
    if text.strip() == match[1] and 0 < amount < _LEAST_BYTES:
        meant = f"{match[1]}{'GiB' if amount <= 1024 else 'MiB'}"
        raise SplitnetError(f"{match[1]} is an amount of {match[1]} bytes: did you mean {meant}? Write the unit")
    return int(amount)
