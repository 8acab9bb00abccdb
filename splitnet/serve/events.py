"""From threads that generate to coroutines that answer: events of a request, until it ends or nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from splitnet.serve.admission import Admission
from splitnet.serve.failures import ApiError
from splitnet.serve.generation import Ask, Ended, Event, Generations, Piece, ScoredPrompt

Result = TypeVar("Result")
Numbered = tuple[int, ScoredPrompt | Piece | Ended]
"""An event, and the number of the prompt that it belongs to."""


async def events(
    generations: Generations, admission: Admission, asks: Sequence[Ask], answer: str
) -> AsyncGenerator[Numbered]:
    """Runs some prompts of one request in one place, one after the other; `answer` is the id of what they answer.

    Whoever closes this, or is cancelled while waiting for it, ends the generation.
    """
    async with admission.place():
        for number, ask in enumerate(asks):
            async with aclosing(_events_of(generations, ask, answer)) as of_one:
                async for event in of_one:
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
    """Server-sent events; however it ends, also before it began, its source is closed."""

    def __init__(self, body: AsyncIterator[str], source: AsyncGenerator[object]) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()
