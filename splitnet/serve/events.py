"""From threads that generate to coroutines that answer: events of a request, until it ends or its client is gone."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from splitnet.limits import FairAccount
from splitnet.serve.admission import ANYONE, Admission, Client
from splitnet.serve.failures import ApiError
from splitnet.serve.generation import Ask, Ended, Event, Generations, Piece, ScoredPrompt

UNREAD = ApiError(429, "too much of this answer was not read: read faster")


def framed(document: dict[str, Any]) -> str:
    """One event; JSON has no line breaks of its own, so one line is enough."""
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


Result = TypeVar("Result")
Numbered = tuple[int, ScoredPrompt | Piece | Ended]
"""An event, and the number of the prompt that it belongs to."""


async def events(
    generations: Generations, admission: Admission, client: Client, asks: Sequence[Ask], answer: str
) -> AsyncGenerator[Numbered]:
    """Runs some prompts of one request in one place, one after the other; `answer` is the id of what they answer.

    The generation ends when this is closed, or its reader is cancelled.
    """
    async with admission.place(client):
        for number, ask in enumerate(asks):
            client.spend(len(ask.prompt))
            async with aclosing(_events_of(generations, ask, answer)) as of_one:
                async for event in of_one:
                    if isinstance(event, Piece) and ask.max_tokens:
                        client.spend(1)
                    yield number, event


async def _events_of(generations: Generations, ask: Ask, answer: str) -> AsyncGenerator[ScoredPrompt | Piece | Ended]:
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Event] = asyncio.Queue()
    generation = generations.start(ask, lambda event: loop.call_soon_threadsafe(inbox.put_nowait, event), answer)
    try:
        while True:
            event = await inbox.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Ended):
                return
    finally:
        generation.cancel()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Waits for `work`, and cancels it when the client has disconnected; its body must have been read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(400, "the client has disconnected")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, also before it began, its source is closed.

    Args:
        body: the events.
        source: what they come from.
        unread: the events are taken as they come, so that their source ends when it has given the last one, and what
            the client has not read counts here. None: the events are taken as they are read.
        evicted: the last event of a stream whose client reads too slowly.
    """

    def __init__(
        self,
        body: AsyncGenerator[str],
        source: AsyncGenerator[object],
        unread: FairAccount | None = None,
        client: Client = ANYONE,
        evicted: str = "",
    ) -> None:
        self._closing = [body, source]
        if unread is not None:
            ahead = _read_ahead(body, unread, client, evicted)
            self._closing.insert(0, ahead)
        super().__init__(self._closing[0], media_type="text/event-stream", headers={"Cache-Control": "no-cache"})  # pyright: ignore[reportArgumentType]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for each in self._closing:
                await each.aclose()


async def _read_ahead(
    source: AsyncGenerator[str], unread: FairAccount, client: Client, evicted: str
) -> AsyncGenerator[bytes]:
    kept: deque[bytes] = deque()
    more = asyncio.Event()

    async def read() -> None:
        async for text in source:
            kept.append(text.encode())
            more.set()
            holding.grow(len(kept[-1]))

    def evict() -> None:
        reading.cancel()
        kept.clear()
        kept.append(evicted.encode())

    holding = unread.hold(client, evict)
    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: more.set())
    try:
        while True:
            while kept:
                text = kept.popleft()
                holding.shrink(len(text))
                yield text
            if reading.done():
                return
            more.clear()
            await more.wait()
    finally:
        holding.release()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
