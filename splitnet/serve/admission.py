"""How many requests run at a time, and how many wait for their turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from splitnet.serve.failures import ApiError


class Admission:
    """Lets requests in one after the other, in the order in which they came.

    Args:
        at_a_time: requests that run.
        waiting: requests that may wait; more are told to come again.

    Attributes:
        running, waiting: how many requests are running and waiting now.
    """

    def __init__(self, at_a_time: int, waiting: int) -> None:
        self._places = asyncio.Semaphore(at_a_time)
        self._free_to_wait = waiting
        self._at_a_time = at_a_time
        self.running = 0
        self.waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for a place, and has it until the end of the `with`.

        Raises:
            ApiError: too many wait already.
        """
        if self._places.locked() and self._free_to_wait <= 0:
            raise ApiError(
                429, f"{self._at_a_time} requests are running and others wait: try again in a moment", code="overloaded"
            )
        self._free_to_wait -= 1
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._free_to_wait += 1
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()
