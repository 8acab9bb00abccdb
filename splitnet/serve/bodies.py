"""Reading the bodies of requests: how long that may take, and how much memory all of them take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Receive

from splitnet.serve.failures import ApiError
from splitnet.serve.shares import Client, Holding, Shares

MAX_BODY_BYTES = 16 * 2**20

VALUE_BYTES = 64
"""What a value of JSON takes once it is parsed, without the text of strings: two bytes of a body can hold one."""

MAX_PARSED_BYTES = 48 * 2**20
ALL_PARSED_BYTES = 128 * 2**20
"""What bodies take when they are parsed: one, and those of all requests until they are answered."""

BODY_S = 60.0
"""Time for a body to arrive."""


class Bodies:
    """Reads the bodies of one server."""

    def __init__(self) -> None:
        # Half of it is for others, whatever a client sends.
        self._shares = Shares(ALL_PARSED_BYTES, ALL_PARSED_BYTES // 2)

    @asynccontextmanager
    async def read(self, receive: Receive, client: Client) -> AsyncIterator[Receive]:
        """Waits for the whole body; within the `with`, whoever receives gets it in one piece.

        Raises:
            ApiError: it is too long, has too many values or comes too slowly, or there is no memory for it now.
        """
        arriving = _Arriving(receive)
        holding = self._shares.hold(client, arriving.give_up)
        try:
            messages = [await arriving.whole(holding)]
            holding.settled = True

            async def received() -> Message:
                return messages.pop() if messages else await receive()

            yield received
        finally:
            holding.release()


class _Arriving:
    """A body on its way."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._timer = asyncio.timeout(BODY_S)
        self._given_up = False

    def give_up(self) -> None:
        """Ends the waiting: there is no room."""
        self._given_up = True
        self._timer.reschedule(0)

    async def whole(self, holding: Holding) -> Message:
        """The message with all of it.

        Raises:
            ApiError: see `Bodies.read`.
        """
        body, more = bytearray(), True
        try:
            async with self._timer:
                while more:
                    message = await self._receive()
                    new = message.get("body", b"")
                    more = message.get("more_body", False)
                    body += new
                    holding.grow(len(new) + VALUE_BYTES * sum(map(new.count, (b",", b"[", b"{"))))
                    if len(body) > MAX_BODY_BYTES:
                        raise ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
                    if holding.amount > MAX_PARSED_BYTES:
                        raise ApiError(413, "the body has too many values: send fewer prompts or messages at once")
                    if message["type"] == "http.disconnect":
                        return message
        except TimeoutError:
            if not self._given_up:
                raise ApiError(408, f"the body did not arrive within {BODY_S:.0f} s: send it faster") from None
        if self._given_up:
            raise ApiError(429, "there is no room for this body now: try again in a moment", code="overloaded")
        return {"type": "http.request", "body": bytes(body), "more_body": False}
