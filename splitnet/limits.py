"""Limits: rates, accounts of bytes and places by holder, time for untrusted patterns, open files.

A `TokenBucket` bounds a rate. `Budget` and `Places` refuse what does not fit; `FairAccount` evicts the largest holding.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from splitnet.errors import SplitnetError, UnsupportedModel

try:
    import resource
except ImportError:  # not on Windows
    resource = None

MINUTE_S = 60.0
K = TypeVar("K")
V = TypeVar("V")


def keep_latest(kept: dict[K, V], key: K, value: V, most: int) -> None:
    """Puts an entry last, and removes the first entries beyond `most`."""
    kept.pop(key, None)
    kept[key] = value
    while len(kept) > most:
        del kept[next(iter(kept))]


class TokenBucket:
    """The tokens that one key has spent; the tokens come back evenly, at a rate that each call gives. at: time of the
    last spending, in seconds."""

    def __init__(self) -> None:
        self.at = 0.0
        self._spent = 0.0

    def wait_s(self, per_minute: int, now: float) -> int:
        """Seconds until tokens are available; 0: some tokens are available. At most `per_minute` tokens are saved
        up."""
        owed = self.still_spent(per_minute, now) - per_minute
        return math.floor(owed * MINUTE_S / per_minute) + 1 if owed >= 0 else 0

    def spend(self, tokens: float, per_minute: float, now: float) -> float:
        """Spends tokens, even more than are available; returns all spent tokens that have not come back."""
        self.correct(self.still_spent(per_minute, now) + tokens, now)
        return self._spent

    def correct(self, spent: float, now: float) -> None:
        """Sets the spent tokens that have not come back."""
        self._spent = spent
        self.at = now

    def still_spent(self, per_minute: float, now: float) -> float:
        """Spent tokens that have not come back."""
        return max(0.0, self._spent - (now - self.at) * per_minute / MINUTE_S)


BURST_S = 0.25  # Seconds of a share that may pass at once after a pause
LEAST_BURST = 1 << 20  # Bytes that may always pass at once
ACTIVE_S = 1.0  # A name that has passed nothing for this long has no share


class SharedRate:
    """A rate in bytes per second, shared evenly by the active names."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._buckets: dict[Hashable, TokenBucket] = {}  # the least recently active name first

    def delay_s(self, name: Hashable, nbytes: int, now: float) -> float:
        """Counts bytes that `name` passed at time `now`; returns for how many seconds it must pause."""
        bucket = self._buckets.pop(name, None) or TokenBucket()
        while self._buckets and now - self._buckets[first := next(iter(self._buckets))].at > ACTIVE_S:
            del self._buckets[first]
        rate = self._rate / (len(self._buckets) + 1)
        self._buckets[name] = bucket
        return max(0.0, bucket.spend(nbytes, rate * MINUTE_S, now) - max(rate * BURST_S, LEAST_BURST)) / rate


class Budget:
    """Allocated bytes, in all and by account. Thread-safe; every call is O(number of levels).

    An account is given as its levels, the widest first: `reserve(size, key, connection)` counts for the key, for the
    connection of this key, and in all. Count allocated bytes, not announced ones.

    Args:
        limit: bytes in all.
        most: bytes that one account may hold, by level. For a level that is None or missing, as many as are free
            (dynamic thresholds, Choudhury and Hahne 1998), so that one account gets at most half of the memory, and the
            next account always finds some. The first reservation of an account only has to fit.

    Attributes:
        used: held bytes.
        refused: number of refused reservations.
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
        return max(0, self.limit - self.used)

    def accounts(self) -> list[tuple[tuple[Hashable, ...], int]]:
        """All accounts of all levels, with the bytes that each account holds."""
        with self._lock:
            return list(self._held.items())

    def held_bytes(self, *account: Hashable) -> int:
        """Bytes that an account holds."""
        return self._held.get(account, 0)

    def has_room(self, nbytes: int, *account: Hashable) -> bool:
        """Whether `reserve` would succeed."""
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
        """Counts bytes before their allocation. Returns False, and counts nothing, if they do not fit."""
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

    def set_held(self, nbytes: int, *account: Hashable) -> None:
        """Sets the measured bytes of an account; `used` may then exceed `limit`."""
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


class Places:
    """Counts taken places: at most `most` in all, and at most `most_of[kind]` for each name of a kind.
    taken: number of taken places. refused: number of calls of `take_place` that found no place."""

    def __init__(self, most: int, **most_of: int) -> None:
        self.taken = 0
        self.refused = 0
        self._most = most
        self._most_of = most_of
        self._held: Counter[tuple[str, Hashable]] = Counter()

    def __len__(self) -> int:
        """How many names have places."""
        return len(self._held)

    @property
    def is_full(self) -> bool:
        return self.taken >= self._most

    def has_most(self, kind: str, name: Hashable) -> bool:
        """Whether this name has as many places as it may have."""
        return self._held[kind, name] >= self._most_of[kind]

    def places_of(self, kind: str, name: Hashable) -> int:
        """How many places this name has."""
        return self._held[kind, name]

    def take_place(self, **names: Hashable) -> bool:
        """Takes one place, counted for a name of each kind. False: a name or all names together have too many."""
        if self.is_full or any(self.has_most(kind, name) for kind, name in names.items()):
            self.refused += 1
            return False
        self.taken += 1
        self._held.update(names.items())
        return True

    def leave_place(self, **names: Hashable) -> None:
        """Undoes one `take_place`."""
        self.taken -= 1
        for item in names.items():
            self._held[item] -= 1
            if not self._held[item]:
                del self._held[item]


class Holder(Protocol):
    """The owner of holdings in a `FairAccount`; hashable."""

    @property
    def weight(self) -> float:
        """The weight of the holder's share."""
        ...


class Holding:
    """One holding of a holder, made by a `FairAccount`. amount: its present size. settled: it cannot be evicted."""

    def __init__(self, account: FairAccount, holder: Any, evict: Callable[[], object]) -> None:
        self.holder = holder
        self.evict = evict
        self.amount = 0
        self.is_pinned = False
        self._account = account

    def grow(self, amount: int) -> None:
        """Grows by `amount`; evicts the largest holding (which may be this one) if a bound is exceeded."""
        self.amount += amount
        self._account.make_room(self.holder)

    def shrink(self, amount: int) -> None:
        self.amount -= amount

    def release(self) -> None:
        """Removes the holding from its account."""
        self._account.holdings.pop(self, None)


class FairAccount:
    """Bounds the sizes of all holdings together and of each holder's holdings, by evicting the largest. For one thread.

    Args:
        limit: bound of all holders together.
        each: bound of one holder; None: `limit`.
        newest_first: evicts the newest of holdings of the same size, otherwise the oldest.
    """

    def __init__(self, limit: int, each: int | None = None, *, newest_first: bool = False) -> None:
        self.holdings: dict[Holding, None] = {}
        self._limit = limit
        self._each = limit if each is None else each
        self._newest_first = newest_first

    def make_holding(self, holder: Holder, evict: Callable[[], object], amount: int = 0) -> Holding:
        """Makes a holding; `evict` is called after the account has removed the holding to keep a bound."""
        holding = Holding(self, holder, evict)
        self.holdings[holding] = None
        if amount:
            holding.grow(amount)
        return holding

    def make_room(self, grown: Holder) -> None:
        """Evicts holdings until the bounds are kept, as far as possible; `grown`: the holder whose holding grew."""
        while candidates := self._candidates(grown):
            ordered = reversed(candidates) if self._newest_first else candidates
            largest = max(ordered, key=lambda holding: holding.amount)
            largest.release()
            largest.evict()

    def _candidates(self, grown: Holder) -> list[Holding]:
        """Candidates for an eviction: holdings of `grown` if it exceeds its bound, else those of the largest holder.

        Empty: no bound is exceeded. Holders are compared by the size of their holdings, divided by their weight.
        """
        totals: Counter[Holder] = Counter()
        loose: dict[Holder, list[Holding]] = {}
        for holding in self.holdings:
            totals[holding.holder] += holding.amount
            if not holding.is_pinned and holding.amount:
                loose.setdefault(holding.holder, []).append(holding)
        if totals[grown] > self._each:
            return loose.get(grown, [])
        if totals.total() <= self._limit or not loose:
            return []
        return loose[max(loose, key=lambda holder: (totals[holder] / holder.weight, holder == grown))]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

_LEAST_BYTES = 10**6


def parse_bytes(text: str) -> int:
    """Bytes in a text such as `4GiB` or `500M`; a number alone means bytes, and must be 0 or at least a megabyte.
    Raises SplitnetError: the text is not an amount, or is a small number whose unit must have been forgotten."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise SplitnetError(f"{text!r} is not an amount of memory: write it as 4GiB or 500MB")
    amount = float(match[1]) * _UNITS[match[2]]
    if text.strip() == match[1] and 0 < amount < _LEAST_BYTES:
        meant = f"{match[1]}{'GiB' if amount <= 1024 else 'MiB'}"
        raise SplitnetError(f"{match[1]} is an amount of {match[1]} bytes: did you mean {meant}? Write the unit")
    return int(amount)


MATCH_S = 0.5  # Longest time for one match; matches of names take microseconds
ALL_MATCHES_S = 10.0  # Longest processor time for all matches of one `Patterns`, beyond `FREE_MATCH_S` for each match
FREE_MATCH_S = 0.001  # Time that each match may take in any case: a large model needs a million matches
_LONGEST = 1000
_KNOWN = re.compile(
    r"(?:[\w/ ,:-]|\.|\\[.bdDwWsS/_-]|\[\^?(?:[\w./-]|\\[.dDwWsS_-])+\]|\((?:\?[:!=]|(?!\?))|[)|^$*+?]"
    r"|(?<=[\w.\]])\{\d{1,2}(?:,\d{0,2})?\})*"
)
"""Accepted patterns of names: without references, and without counted repeats of groups, which may take any amount of
memory. This expression is unambiguous, so matching it takes linear time."""


class Patterns:
    """Matches regular expressions of an untrusted file, for at most `MATCH_S` each and `ALL_MATCHES_S` in all. For
    messages: source: the name of the file; fix: what to do if a pattern cannot be used."""

    def __init__(self, source: str, fix: str = "take another checkpoint of this model") -> None:
        self._source = source
        self._fix = fix
        self._left = ALL_MATCHES_S
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, text: str) -> bool:
        """As `re.match`. Raises UnsupportedModel: the pattern cannot be a pattern of names, or takes too long to
        match."""
        import regex  # unlike `re`, it has timeouts

        begin = time.thread_time()
        try:
            if pattern not in self._compiled:
                if len(pattern) > _LONGEST or not _KNOWN.fullmatch(pattern):
                    raise ValueError("it is too long, or has unsupported parts")
                self._compiled[pattern] = regex.compile(pattern)
            return self._compiled[pattern].match(text, timeout=max(FREE_MATCH_S, min(MATCH_S, self._left))) is not None
        except TimeoutError:
            raise UnsupportedModel(
                f"the pattern {pattern!r} in {self._source} takes too long to match: {self._fix}"
            ) from None
        except (regex.error, ValueError, RecursionError) as error:
            raise UnsupportedModel(
                f"{pattern[:100]!r} in {self._source} is not a pattern of names ({error}): {self._fix}"
            ) from None
        finally:
            self._left -= max(0.0, time.thread_time() - begin - FREE_MATCH_S)


MOST_CONNECTIONS = 4096
_LEAST_CONNECTIONS = 64
_OTHER_DESCRIPTORS = 256  # Open files besides incoming connections: models, the DHT, links to other peers


def most_connections() -> int:
    """How many incoming connections this process' limit of open files allows; as many files are left for streams of
    relays."""
    if resource is None:
        return MOST_CONNECTIONS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return min(max(_LEAST_CONNECTIONS, (files - _OTHER_DESCRIPTORS) // 2), MOST_CONNECTIONS)


def allow_open_files() -> None:
    """Raises this process' limit of open files to the needs of `MOST_CONNECTIONS`, as far as the system allows."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OTHER_DESCRIPTORS + 2 * MOST_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS allows fewer files than the limit that it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
