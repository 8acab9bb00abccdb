"""The order in which a device serves the work of several clients: deficit round robin over device time.

M. Shreedhar and G. Varghese, "Efficient Fair Queuing using Deficit Round Robin", SIGCOMM 1995. The cost of work is
known only afterwards: a key may begin while its balance is positive; then the time of its work is subtracted from the
balance, which may become negative. A round adds an amount proportional to its weight to the balance of each key; a
round begins when no key with work has a positive balance.

A device runs one piece of work at a time, and a key with one session has no work between two of its tokens. Therefore,
if a key has used more device time than another active key, its pieces of work are short, and do not begin just before
the next work of the other key is expected.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, Generic, Protocol, TypeVar

from scheduler.batching import DECODE_POSITIONS, MovingAverage, Waiting

CREDIT_S: Final = 0.05  # seconds of device time, per weight, that a key may keep from earlier rounds
BULK_COST: Final = 4.0
"""Price of a second of prefill or training while other keys are active. Decode steps of several keys share a pass,
which costs about as much as a pass of one step; with this price, other work leaves four fifths of the time to decode
steps."""

CHUNK_S: Final = 0.05  # longest pass of prefill or piece of training, in seconds, while another key is active
SLACK: Final = 1.2  # with further steps, a decode pass may take this many times as long as with one step of each key
AHEAD_S: Final = 2.0
"""Seconds of device time, per weight and `FORGET_S`, that a key's prefill may borrow from the turns of other keys. A
key lends this much of its turns in full; after that it lends half of its turns."""

# Bounds in seconds; a key without work stays active for twice its usual absence, within them.
LATELY_S: Final = (1.0, 5.0)
FORGET_S: Final = 60.0  # a key without work for this time loses its account
_ROUND_S: Final = 0.001
_LEARNING: Final = 0.2
_EARLY: Final = 0.8  # a key may return after this part of its usual absence
# A key is given up if it is late by more than this part of its usual absence and of the waiting work.
_LATE: Final = 0.3
_WORTH: Final = 0.8  # a piece of work waits for another key for at most this part of the duration of the work
K = TypeVar("K", bound=Hashable)


class _Account:
    """The account of a key.

    balance: seconds of device time, per weight, less the sum of all rounds at the time. present: number of pieces of
    work that wait or run. away: seconds from the end of the key's last work to its next work. borrowed_s: seconds
    borrowed from turns of other keys, as of `ahead_at`; the allowance reduces them with time. lent_s: seconds lent from
    the key's own turns, less the seconds of its own prefill in such turns.
    """

    __slots__ = ("ahead_at", "away", "balance", "borrowed_s", "left_at", "lent_s", "present", "seen_at")

    def __init__(self, balance: float, now: float) -> None:
        self.balance = balance
        self.present = 0
        self.seen_at = now
        self.left_at = 0.0
        self.away = MovingAverage(_LEARNING)
        self.borrowed_s = 0.0
        self.ahead_at = now
        self.lent_s = 0.0

    def is_active(self, now: float) -> bool:
        least, most = LATELY_S
        return self.present > 0 or now - self.seen_at <= min(most, max(least, 2 * self.away.value))


class FairShares(Generic[K]):
    """The balances of keys. It has no clock: callers pass `now` in seconds. A call takes time in proportion to the
    number of active keys.

    weight: returns the weight of a key; keys share the device in proportion to their weights.
    """

    def __init__(self, weight: Callable[[K], float] = lambda key: 1.0) -> None:
        self._weight = weight
        self._accounts: OrderedDict[K, _Account] = OrderedDict()  # the most recently seen key is last
        self._present: set[K] = set()
        self._rounds_s = 0.0  # the sum of all rounds

    def __len__(self) -> int:
        return len(self._accounts)

    def work_arrived(self, key: K, now: float) -> None:
        """Counts a new piece of work of `key`."""
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account(CREDIT_S - self._rounds_s, now)
        elif not account.present and now - account.left_at <= LATELY_S[1]:
            account.away.add(now - account.left_at)
        account.present += 1
        self._present.add(key)
        self._touch(key, account, now)

    def work_done(self, key: K, now: float) -> None:
        """Counts off a piece of work that is done or was given up."""
        account = self._accounts[key]
        account.present -= 1
        if not account.present:
            self._present.discard(key)
            account.left_at = now
        self._touch(key, account, now)

    def contended(self, now: float) -> bool:
        """Whether several keys are active."""
        return len(self._present) + len(list(islice(self._absent(now), 2))) > 1

    def charge(self, key: K, seconds: float, now: float, *, bulk: bool = False) -> None:
        """Charges `key` for the device time of its work; `bulk`: prefill or training.

        While no other key is active, the work is free, but then the key keeps no credit for the time when another key
        becomes active.
        """
        account = self._accounts.get(key)
        if account is not None:
            balance = self._balance(account)
            if self.contended(now):
                balance -= seconds * (BULK_COST if bulk else 1.0) / self._weight(key)
            else:
                balance = min(0.0, balance)
            account.balance = balance - self._rounds_s

    def may_go_ahead(self, key: K, now: float) -> bool:
        """Whether `key` may borrow a turn of another key: it has not borrowed much lately."""
        return self._ahead(self._accounts[key], now) < AHEAD_S

    def lets_others(self, key: K) -> bool:
        """Whether `key` still lends turns: it has lent few turns, or has used as many of them itself since."""
        return self._accounts[key].lent_s < AHEAD_S

    def record_borrowed_turn(self, key: K, of: K, seconds: float, now: float) -> None:
        """Records that the prefill of `key` ran for `seconds` in a turn of `of`, which is charged for the time."""
        account, payer = self._accounts.get(key), self._accounts.get(of)
        if payer is not None:
            let_s = seconds / self._weight(of)
            payer.lent_s = max(0.0, payer.lent_s + (let_s if key != of else -let_s))
        if account is not None and key != of:
            account.borrowed_s = self._ahead(account, now) + seconds / self._weight(key)
            account.ahead_at = now

    def _ahead(self, account: _Account, now: float) -> float:
        return max(0.0, account.borrowed_s - (now - account.ahead_at) * AHEAD_S / FORGET_S)

    def ranked(self, keys: Collection[K]) -> list[K]:
        """Keys that have work, in the order of their balances, largest first."""
        return sorted(keys, key=lambda key: -self._balance(self._accounts[key]))

    def may_join(self, key: K) -> bool:
        """Whether a decode step of `key` may join the next pass: it has hardly used more time than a key that may
        begin."""
        return self._balance(self._accounts[key]) > -CREDIT_S

    def begin_rounds(self, first: K) -> None:
        """Adds rounds until `first` may begin."""
        short_s = -self._balance(self._accounts[first])
        if short_s >= 0:
            self._rounds_s += short_s + _ROUND_S

    def awaited(self, first: K, takes_s: float, now: float) -> tuple[K, float] | None:
        """The key that `first` waits for, as that key has used less and is expected soon, and the longest wait in
        seconds.

        None: `first` begins at once. first: the key that has used least of all keys with work. takes_s: duration of its
        next work.
        """
        own = self._balance(self._accounts[first])
        for key, account in self._absent(now):
            usual_s = account.away.value
            gone_s = now - account.left_at
            left_s = min(usual_s + max(_LATE * usual_s, _LATE * takes_s) - gone_s, takes_s)
            if self._balance(account) - own > takes_s and usual_s - gone_s <= _WORTH * takes_s and left_s > 0:
                return key, left_s
        return None

    def quiet_s(self, now: float) -> float:
        """Seconds during which no work of an active key without work is expected; 0: work may arrive at any time."""
        return min((max(0.0, _EARLY * it.away.value - (now - it.left_at)) for _, it in self._absent(now)), default=0.0)

    def _balance(self, account: _Account) -> float:
        return min(CREDIT_S, account.balance + self._rounds_s)

    def _absent(self, now: float) -> Iterator[tuple[K, _Account]]:
        """Active keys without work."""
        for key, account in reversed(self._accounts.items()):
            if now - account.seen_at > LATELY_S[1]:
                return
            if not account.present and account.is_active(now):
                yield key, account

    def _touch(self, key: K, account: _Account, now: float) -> None:
        account.seen_at = now
        self._accounts.move_to_end(key)
        oldest, former = next(iter(self._accounts.items()))
        if not former.present and now - former.seen_at > FORGET_S:
            del self._accounts[oldest]


class Owned(Waiting, Protocol):
    """A step of a client.

    total: number of positions of the whole step. owner: the client's key. left: positions of the session's reservation
    that are still to come.
    """

    @property
    def total(self) -> int: ...

    @property
    def owner(self) -> Hashable: ...

    @property
    def remaining_reservation(self) -> int: ...


W = TypeVar("W", bound=Owned)


class FairPasses(Generic[W]):
    """Chooses the passes for several keys. It has no clock: callers pass `now` in seconds.

    pass_s: returns the seconds of a pass, by its number of positions. weight: see `FairShares`.
    """

    def __init__(self, pass_s: Callable[[int], float], weight: Callable[[Any], float] = lambda key: 1.0) -> None:
        self.shares = FairShares[Any](weight)  # the device time that each key has used
        self._pass_s = pass_s
        # For a key whose prefill runs in the turn of another key: that other key.
        self._turn_of: dict[Hashable, Hashable] = {}

    def chunk_s(self, now: float) -> float:
        """Maximum seconds of a piece of prefill, or of a pass over whole sequences."""
        return max(CHUNK_S, 2 * self._pass_s(1), self.shares.quiet_s(now))

    def positions_within(self, seconds: float) -> int:
        """The maximum number of positions that a pass computes in this time, at least one."""
        low, high = 1, 1 << 16
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._pass_s(middle) <= seconds else (low, middle - 1)
        return low

    def prefill_turn(self, waiting: Sequence[W], first: Hashable, now: float) -> list[W]:
        """Steps whose prefill runs in a turn of `first`: its own, or a step of another key with a shorter prompt.

        If prompts share a device in turns, all prompts finish late. If the shortest prompt is first (Schrage 1968),
        half of the prompts finish in a fraction of the time, and hardly any prompt finishes later. Other keys decode as
        much as before: `first` is charged, no key borrows for long, and no key lends all its turns. waiting: at most
        one step of each session.
        """
        own = [step for step in waiting if step.owner == first]
        self._turn_of = {}
        if any(step.remaining <= DECODE_POSITIONS for step in own) or not self.shares.lets_others(first):
            return own
        bulk = [step for step in waiting if step.remaining > DECODE_POSITIONS]
        may = {key: key == first or self.shares.may_go_ahead(key, now) for key in {step.owner for step in bulk}}
        shortest = min(
            (step for step in bulk if may[step.owner]),
            key=lambda step: (step.remaining_reservation, step.owner != first),
        )
        if shortest.owner == first:
            return own
        self._turn_of = {shortest.owner: first}
        return [shortest]

    def decode_pass(
        self, waiting: Sequence[W], ranked: Sequence[Hashable], max_positions: int, now: float
    ) -> dict[W, int]:
        """A decode step of each key that may join, then further decode steps in turns and prefill, if they cost little.

        waiting: at most one step of each session; the first key of `ranked` has a decode step. ranked: the keys of the
        steps; the key that has used least is first.
        """
        self._turn_of = {}
        steps: dict[Hashable, list[W]] = {key: [] for key in ranked}
        for step in waiting:
            if step.remaining <= DECODE_POSITIONS:
                steps[step.owner].append(step)
        blocks = steps[ranked[0]][0].blocks
        lanes = [(self.shares.may_join(key), [step for step in steps[key] if step.blocks == blocks]) for key in ranked]
        due = sum(lane[0].remaining for may_join, lane in lanes if may_join and lane)
        limit_s = max(SLACK * self._pass_s(due), self.shares.quiet_s(now))
        counts: dict[W, int] = {}
        positions = 0
        for turn in range(max(len(lane) for _, lane in lanes)):
            for may_join, lane in lanes:
                if turn < len(lane):
                    total = positions + lane[turn].remaining
                    is_due = may_join and not turn
                    if total <= max_positions and (is_due or self._pass_s(total) <= limit_s):
                        counts[lane[turn]] = lane[turn].remaining
                        positions = total
        left = min(max_positions, self.positions_within(SLACK * self._pass_s(due))) - positions
        for key in ranked:
            for step in (step for step in waiting if step.owner == key):
                if left > 0 and step.remaining > DECODE_POSITIONS and step.blocks == blocks:
                    counts[step] = min(step.remaining, left)
                    left -= counts[step]
        return counts

    def charge_pass(self, chosen: Sequence[tuple[W, int]], seconds: float, now: float) -> None:
        """Charges a pass to the keys of its positions. Prefill in a pass with decode steps costs as much as prefill
        alone."""
        decode = [(step, count) for step, count in chosen if step.total <= DECODE_POSITIONS]
        bulk = [(step, count) for step, count in chosen if step.total > DECODE_POSITIONS]
        bulk_s = seconds if bulk else 0.0
        if decode and bulk:
            in_piece = self.positions_within(self.chunk_s(now))
            bulk_s = min(seconds, self._pass_s(in_piece) * sum(count for _, count in bulk) / in_piece)
        for part, took_s in ((decode, seconds - bulk_s), (bulk, bulk_s)):
            positions = sum(count for _, count in part)
            for step, count in part:
                own_s = took_s * count / positions
                payer = self._turn_of.get(step.owner, step.owner) if part is bulk else step.owner
                self.shares.charge(payer, own_s, now, bulk=part is bulk)
                if part is bulk:
                    self.shares.record_borrowed_turn(step.owner, payer, own_s, now)
        self._turn_of = {}
