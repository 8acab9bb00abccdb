"""Who holds how many bytes of a kind of memory, and how many are left: the accountant of what others fill."""

from __future__ import annotations

import threading
from collections.abc import Hashable


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
