"""How many requests run at a time, how many wait for their turn, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from splitnet.serve.failures import ApiError
from splitnet.serve.shares import ANYONE, Client, Holding, Shares


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
