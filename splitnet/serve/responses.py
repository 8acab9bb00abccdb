"""From threads that generate to responses: what every protocol of the server answers with."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from splitnet.limits import FairAccount
from splitnet.serve.admission import ANYONE, Admission, Client
from splitnet.serve.failures import ApiError
from splitnet.serve.gate import Preparing
from splitnet.serve.generation import Ask, Ended, Event, Generations, Numbered, Piece, ScoredPrompt
from splitnet.serve.grammars import Grammars
from splitnet.serve.metrics import GatewayMetrics
from splitnet.serve.prompts import Prompts
from splitnet.serve.sampling import SamplingDefaults

UNREAD = ApiError(429, "too much of this answer was not read: read faster")
UNREAD_BYTES = 64 * 2**20  # of streams, whose clients read more slowly than the model answers

Result = TypeVar("Result")


def framed(document: dict[str, Any]) -> str:
    """One server-sent event; JSON has no line breaks of its own, so one line is enough."""
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Answer(Protocol):
    """Writes the events of a request as a protocol has them; clients know the answer by its `id`.

    `whole` gives the body of an answer that is not streamed, and `chunks` the server-sent events of a stream, of which
    `first` has been waited for already; an error is the last of them, as `failed` writes it.
    """

    id: str

    async def whole(self, events: AsyncGenerator[Numbered]) -> dict[str, Any]: ...
    def chunks(self, first: Numbered, events: AsyncGenerator[Numbered]) -> AsyncGenerator[str]: ...
    def failed(self, failure: ApiError) -> str: ...


@dataclass(frozen=True)
class ServedModel:
    """A model with all that protocols need to answer requests for it."""

    name: str  # that answers give
    generations: Generations
    prompts: Prompts
    grammars: Grammars
    admission: Admission
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)  # of what requests leave out
    other_names: Sequence[str] = ()  # which requests may give, too
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    preparing: Preparing = field(default_factory=Preparing)
    unread: FairAccount = field(default_factory=lambda: FairAccount(UNREAD_BYTES))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([self.name, *self.other_names]))

    def check_name(self, name: str) -> None:
        if name not in self.names:
            use = " or ".join(map(repr, self.names))
            raise ApiError(404, f"this server has no model {name!r}: use {use}", param="model", code="model_not_found")

    async def respond(self, request: Request, asks: Sequence[Ask], answer: Answer, *, stream: bool) -> Response:
        """Runs a request; the session ends when the client goes."""
        client: Client = request.state.client
        running = self.metrics.watch(self._events(client, asks, answer.id), asks)
        if not stream:
            async with aclosing(running):
                return JSONResponse(await unless_gone(request, answer.whole(running)))

        # Until the first event an error still has a status of its own.
        try:
            first = await unless_gone(request, anext(running))
        except BaseException:
            await running.aclose()
            raise
        return EventStream(answer.chunks(first, running), running, self.unread, client, answer.failed(UNREAD))

    async def _events(self, client: Client, asks: Sequence[Ask], answer: str) -> AsyncGenerator[Numbered]:
        """Runs the prompts of a request in one place, one after the other, until this is closed."""
        async with self.admission.place(client):
            for number, ask in enumerate(asks):
                client.spend(len(ask.prompt))
                async with aclosing(self._events_of(ask, answer)) as of_one:
                    async for event in of_one:
                        if isinstance(event, Piece) and ask.max_tokens:
                            client.spend(1)
                        yield number, event

    async def _events_of(self, ask: Ask, answer: str) -> AsyncGenerator[ScoredPrompt | Piece | Ended]:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        tell = loop.call_soon_threadsafe
        generation = self.generations.start(ask, lambda event: tell(inbox.put_nowait, event), answer)
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

    The events in `body` are made of `source`. With an account of those that are `unread`, they are taken as they come,
    so that the source ends when it has given the last one; a client that reads too slowly gets `evicted` as the last.
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
            self._closing.insert(0, _read_ahead(body, unread, client, evicted))
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
