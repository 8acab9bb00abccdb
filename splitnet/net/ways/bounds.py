"""How much of a helper others may take: places, counted by who holds them, and bytes per second, shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

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
