"""Clients of the gateway: their token quotas, and which of their requests run, wait or are refused."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from splitnet.errors import SplitnetError
from splitnet.limits import FairAccount, Holding, TokenBucket


class Overloaded(SplitnetError):
    """Too many requests are waiting."""


class QuotaExceeded(SplitnetError):
    """A client has used its tokens per minute; the client gets more tokens after `retry_after_s` seconds."""

    def __init__(self, per_minute: int, retry_after_s: int) -> None:
        super().__init__(f"this key has used its {per_minute} tokens per minute: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ClientBucket(TokenBucket):
    """The tokens that a client has spent. unshared: the part that other gateways have not been told of."""

    def __init__(self) -> None:
        super().__init__()
        self.unshared = 0.0

    def spend(self, tokens: float, per_minute: float, now: float) -> float:
        self.unshared += tokens
        return super().spend(tokens, per_minute, now)


@dataclass(frozen=True)
class ApiClient:
    """The holder of an API key; if the server has no keys, an IP address."""

    name: str  # identifies the client; not the secret key
    weight: float = 1.0  # the client's share of the places is proportional to this weight
    # Tokens of prompts and answers; a client may use all tokens of a minute at once if it was idle before. None: no
    # bound. A running answer may exceed the bound; then the client must wait longer before its next request.
    tokens_per_minute: int | None = None
    clock: Callable[[], float] = field(default=time.monotonic, compare=False)
    key_digest: str = field(default="", compare=False)  # of the API key; empty: there are no keys
    bucket: ClientBucket = field(default_factory=lambda: ClientBucket(), compare=False, repr=False)

    @property
    def shared_name(self) -> str:
        """Names the client at all gateways with the same API keys, without the key itself."""
        return self.key_digest or self.name

    def check_quota(self) -> None:
        """Raises QuotaExceeded if the client has no tokens left."""
        per_minute = self.tokens_per_minute
        if per_minute is not None and (seconds := self.bucket.wait_s(per_minute, self.clock())):
            raise QuotaExceeded(per_minute, seconds)

    def spend_tokens(self, tokens: int) -> None:
        if self.tokens_per_minute is not None:
            self.bucket.spend(tokens, self.tokens_per_minute, self.clock())


ANYONE = ApiClient("")


def client_at(address: str) -> ApiClient:
    """The client at an IP address. All IPv6 addresses of a /64 network are one client, as one machine may use all."""
    try:
        version = ipaddress.ip_address(address).version
    except ValueError:
        return ApiClient(address)
    return ApiClient(str(ipaddress.ip_network(f"{address}/64", strict=False)) if version == 6 else address)


class Admission:
    """Admits requests. The client with the fewest places relative to its weight gets a free place; equal clients
    alternate.

    When more than `waiting` requests wait, the newest request of the client with the most waiting requests is refused.
    A client holds at most `at_a_time - spare` places, so that `spare` places are free for clients that come later.
    """

    def __init__(self, at_a_time: int, waiting: int, *, spare: int = 0) -> None:
        self.at_a_time = at_a_time
        self._most = max(1, at_a_time - spare)
        self._waiting = FairAccount(waiting, newest_first=True)
        self._turns: dict[Holding, asyncio.Future[None]] = {}
        self._places: Counter[ApiClient] = Counter()
        self._taken: dict[ApiClient, float] = {}
        """Places that each client has received, divided by its weight. A new client starts at the current minimum."""
        self._now = 0.0
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting.holdings)

    @asynccontextmanager
    async def admitted(self, client: ApiClient = ANYONE) -> AsyncIterator[None]:
        """Waits for a place and holds the place within the `with`.

        Raises QuotaExceeded, or Overloaded if too many requests wait.
        """
        client.check_quota()
        await self._wait_for_turn(client)
        try:
            yield
        finally:
            self._leave_place(client)
            self._admit_waiting()

    def _leave_place(self, client: ApiClient) -> None:
        self.running -= 1
        self._places[client] -= 1

    async def _wait_for_turn(self, client: ApiClient) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        refusal = Overloaded(f"{self.at_a_time} requests are running and others wait: try again in a moment")
        waits = self._waiting.make_holding(client, lambda: turn.done() or turn.set_exception(refusal))
        self._turns[waits] = turn
        self._taken.setdefault(client, self._now)
        self._admit_waiting()
        if not turn.done():
            waits.grow(1)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave_place(client)
            raise
        finally:
            del self._turns[waits]
            waits.release()
            self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self.running < self.at_a_time:
            first: dict[ApiClient, Holding] = {}
            for waits in self._waiting.holdings:
                if not self._turns[waits].done() and self._places[waits.holder] < self._most:
                    first.setdefault(waits.holder, waits)
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
        present = {waits.holder for waits in self._waiting.holdings} | set(+self._places)
        for gone in self._taken.keys() - present:
            del self._taken[gone]
            del self._places[gone]
