"""What clients hold of something that is bounded: when there is too much, who holds most lets go."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from splitnet.serve.quota import TokenQuota


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
