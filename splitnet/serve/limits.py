"""How many requests run at a time, how many wait for their turn, and whose turn it is."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from splitnet.limits import TokenBucket
from splitnet.serve.failures import ApiError


class TokenQuota:
    """Tokens of prompts and answers. What a running answer takes beyond them is owed before the next request.

    Args:
        per_minute: so many at once after a quiet minute, and so many in each minute.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._bucket = TokenBucket()

    def check(self) -> None:
        """Refuses a request if nothing is left.

        Raises:
            ApiError: with the seconds until there is something.
        """
        if seconds := self._bucket.wait_s(self._per_minute, self._clock()):
            raise ApiError(
                429,
                f"this key has used its {self._per_minute} tokens per minute: try again in {seconds} s",
                code="rate_limit_exceeded",
                retry_after_s=seconds,
            )

    def spend(self, tokens: int) -> None:
        """Takes tokens away."""
        self._bucket.spend(tokens, self._per_minute, self._clock())


@dataclass(frozen=True)
class Client:
    """Who asks: the holder of an API key, or an address where there are no keys.

    Attributes:
        name: by which clients are told apart; no key.
        weight: of its share.
        quota: of tokens; None: no bound.
    """

    name: str
    weight: float = 1.0
    quota: TokenQuota | None = field(default=None, compare=False)


ANYONE = Client("")


def client_at(address: str) -> Client:
    """Who asks from an IP address; of IPv6 one has 2**64 of them at least."""
    try:
        version = ipaddress.ip_address(address).version
    except ValueError:
        return Client(address)
    return Client(str(ipaddress.ip_network(f"{address}/64", strict=False)) if version == 6 else address)


class Holding:
    """What one request, connection or stream holds. Made by `Shares.hold`."""

    def __init__(self, shares: Shares, client: Client, number: int, let_go: Callable[[], object]) -> None:
        self._shares = shares
        self.client = client
        self.number = number
        self.let_go = let_go
        self.amount = 0
        self.settled = False
        """It is not asked to let go any more."""

    def grow(self, amount: int) -> None:
        """Takes so much more; whoever holds most lets go if that is too much, be it this one."""
        self.amount += amount
        self._shares.make_room(self.client)

    def shrink(self, amount: int) -> None:
        """Gives so much back."""
        self.amount -= amount

    def release(self) -> None:
        """Gives all back, for good."""
        self._shares.remove(self)


class Shares:
    """Bounds what all clients hold together, and each of them. For one thread.

    Args:
        limit: of all clients together.
        each: of one client.
        newest_first: of holdings of the same size the newest lets go first, otherwise the oldest.
    """

    def __init__(self, limit: int, each: int | None = None, *, newest_first: bool = False) -> None:
        self._limit = limit
        self._each = limit if each is None else each
        self._sign = 1 if newest_first else -1
        self._numbers = itertools.count()
        self._holdings: set[Holding] = set()

    def __len__(self) -> int:
        return len(self._holdings)

    @property
    def holdings(self) -> list[Holding]:
        """In the order in which they came."""
        return sorted(self._holdings, key=lambda holding: holding.number)

    @property
    def amount(self) -> int:
        """What all hold together."""
        return sum(holding.amount for holding in self._holdings)

    def hold(self, client: Client, let_go: Callable[[], object]) -> Holding:
        """Something that can hold; `let_go` is called when it must not any more, after it was removed."""
        holding = Holding(self, client, next(self._numbers), let_go)
        self._holdings.add(holding)
        return holding

    def remove(self, holding: Holding) -> None:
        self._holdings.discard(holding)

    def make_room(self, grown: Client) -> None:
        """Has holdings let go until the bounds are kept, as far as any can; `grown`: who has taken more."""
        while candidates := self._over(grown):
            largest = max(candidates, key=lambda holding: (holding.amount, self._sign * holding.number))
            self.remove(largest)
            largest.let_go()

    def _over(self, grown: Client) -> list[Holding]:
        """The holdings of which one must let go: those of a client with too much, or with most of what is too much."""
        totals: dict[Client, int] = {}
        loose: dict[Client, list[Holding]] = {}
        for holding in self._holdings:
            totals[holding.client] = totals.get(holding.client, 0) + holding.amount
            if not holding.settled and holding.amount:
                loose.setdefault(holding.client, []).append(holding)
        if totals.get(grown, 0) > self._each:
            return loose.get(grown, [])
        if sum(totals.values()) <= self._limit or not loose:
            return []
        return loose[max(loose, key=lambda client: (totals[client] / client.weight, client == grown))]


class Admission:
    """Lets requests in. A free place goes to the client that has fewest of them, for its weight, then in turns.

    When too many wait, the last of the client with most of them is told to come again.

    Args:
        at_a_time: requests that run.
        waiting: requests that may wait.
        spare: places that no client takes alone, for those who come later.

    Attributes:
        running: how many requests are running now.
    """

    def __init__(self, at_a_time: int, waiting: int, *, spare: int = 0) -> None:
        self._at_a_time = at_a_time
        self._most = max(1, at_a_time - spare)
        self._waiting = Shares(waiting, newest_first=True)
        self._turns: dict[Holding, asyncio.Future[None]] = {}
        self._places: Counter[Client] = Counter()
        self._taken: dict[Client, float] = {}
        """Places that each client has had so far, for its weight; who comes anew begins where the others are."""
        self._now = 0.0
        self.running = 0

    @property
    def waiting(self) -> int:
        """How many requests wait now."""
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, client: Client = ANYONE) -> AsyncIterator[None]:
        """Waits for a place, and has it until the end of the `with`.

        Raises:
            ApiError: too many wait already, or the client has used its tokens.
        """
        if client.quota is not None:
            client.quota.check()
        await self._turn(client)
        try:
            yield
        finally:
            self.running -= 1
            self._places[client] -= 1
            self._let_in()

    async def _turn(self, client: Client) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waits = self._waiting.hold(client, lambda: turn.done() or turn.set_exception(self._overloaded()))
        self._turns[waits] = turn
        self._taken.setdefault(client, self._now)
        self._let_in()
        if not turn.done():
            waits.grow(1)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.running -= 1
                self._places[client] -= 1
            raise
        finally:
            del self._turns[waits]
            waits.release()
            self._let_in()

    def _let_in(self) -> None:
        while self.running < self._at_a_time:
            first: dict[Client, Holding] = {}
            for waits in self._waiting.holdings:
                if not self._turns[waits].done() and self._places[waits.client] < self._most:
                    first.setdefault(waits.client, waits)
            if not first:
                break
            client = min(first, key=lambda each: (self._places[each] / each.weight, self._taken[each]))
            self._now = self._taken[client]
            self._taken[client] += 1 / client.weight
            self._places[client] += 1
            self.running += 1
            waits = first[client]
            waits.release()
            self._turns[waits].set_result(None)
        present = {waits.client for waits in self._waiting.holdings} | set(+self._places)
        for gone in self._taken.keys() - present:
            del self._taken[gone]
            del self._places[gone]

    def _overloaded(self) -> ApiError:
        return ApiError(
            429, f"{self._at_a_time} requests are running and others wait: try again in a moment", code="overloaded"
        )
