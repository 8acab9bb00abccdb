"""Turns the events of generation threads into HTTP responses, whole or streamed, for every protocol."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from splitnet.errors import SplitnetError
from splitnet.limits import Budget, FairAccount
from splitnet.serve.admission import ANYONE, Admission, ApiClient
from splitnet.serve.answer_records import RECORD, AnswerRecord
from splitnet.serve.answers.grammars import Grammars
from splitnet.serve.answers.sampling import SamplingDefaults
from splitnet.serve.failures import ApiError, api_error_of
from splitnet.serve.generation import Ended, Event, GenerationRequest, Generations, Numbered, ScoredPrompt, TextDelta
from splitnet.serve.image_hosts import ImageHosts
from splitnet.serve.metrics import GatewayMetrics
from splitnet.serve.pooling import Pooling
from splitnet.serve.prompts import Prompts
from splitnet.serve.request_gate import PreparationQueue, cancel_on_disconnect
from splitnet.serve.shared_state import SharedState
from splitnet.serve.trace import TRACE
from splitnet.swarm.plan import blocks_text
from splitnet.swarm.swarm import Overview
from splitnet.wire.endpoints import LinkState

UNREAD = ApiError(429, "too much of this answer was not read: read faster")
MAX_PIXEL_BYTES = 2 * 2**30  # Maximum number of bytes of the fetched and processed images of unanswered requests
MAX_UNREAD_BYTES = 64 * 2**20  # Maximum number of bytes of all streams together that clients have not read yet
EVENTS, KEEP_ALIVE = "text/event-stream", ": still at work\n\n"  # clients ignore `KEEP_ALIVE`, which is a comment
FIRST_EVENT_S = 5.0  # How long a stream waits for its first event before the status 200 is sent, if no block is missing
KEEP_ALIVE_S = 5.0  # Time without an event after which the part `alive` is sent to a client

Result = TypeVar("Result")
Told = TypeVar("Told")
Taken = TypeVar("Taken", contravariant=True)


def framed(document: dict[str, Any]) -> str:
    """One server-sent event in one line, because JSON escapes line breaks."""
    return f"data: {json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


class AnswerWriter(Protocol[Taken]):
    """Writes the events of a request in the form of a protocol. id: the answer's id for clients.

    `whole_body` returns the body of an answer that is not streamed. `event_stream` yields the parts of a stream, and
    `error_event` returns the last part after an error. alive: the part that is sent while there are no events.
    """

    id: str
    media_type: str
    alive: str

    async def whole_body(self, events: AsyncIterator[Taken]) -> dict[str, Any]: ...
    def event_stream(self, events: AsyncIterator[Taken]) -> AsyncGenerator[str]: ...
    def error_event(self, failure: ApiError) -> str: ...


@dataclass(frozen=True)
class ServedModel:
    """A model with everything that protocols need to answer requests."""

    name: str  # the name in answers
    generations: Generations
    prompts: Prompts
    grammars: Grammars
    admission: Admission
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)  # for parameters that requests leave out
    other_names: Sequence[str] = ()  # further names that requests may give
    pooling: Pooling = field(default_factory=Pooling)
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    preparing: PreparationQueue = field(default_factory=PreparationQueue)
    unread: FairAccount = field(default_factory=lambda: FairAccount(MAX_UNREAD_BYTES))
    pixels: Budget = field(default_factory=lambda: Budget(MAX_PIXEL_BYTES))  # by client
    image_hosts: ImageHosts = field(default_factory=ImageHosts)
    state: SharedState | None = None  # what other gateways share
    # Called with the number of tokens of each prompt and its answers, which is demand for the model.
    note_demand: Callable[[int], None] = lambda tokens: None
    leave: Callable[[], None] = lambda: None  # leaves the model's swarm

    def close(self) -> None:
        """Ends all requests of the model and leaves the swarm; returns when this is done."""
        self.generations.close()
        self.grammars.close()
        self.leave()

    @property
    def model_names(self) -> list[str]:
        return list(dict.fromkeys([self.name, *self.other_names]))

    @property
    def sees_images(self) -> bool:
        return self.prompts.processor is not None

    def running(self, client: ApiClient, asks: Sequence[GenerationRequest], answer: str) -> AsyncGenerator[Numbered]:
        """Runs the prompts of a request once the request has a place; closing the generator ends the prompts.

        answer: the id of the answer.
        """
        return self.metrics.watch_answer(self._events(client, asks, answer), asks)

    def missing_blocks(self) -> str:
        """The blocks that no connected peer serves, for people; empty: peers serve all blocks. May take seconds."""
        model = self.generations.model
        # The record of a killed peer stays for some time, so peers to which the connection is down are not counted.
        present = (
            each for each in model.swarm.peers() if model.swarm.links.link_state(each.endpoint) is not LinkState.DOWN
        )
        return ", ".join(blocks_text(*hole) for hole in Overview.of(model.swarm, present, model.local_spans).missing)

    async def prepare(self, request: Request, work: Callable[[], Result], size: int | None = None) -> Result:
        """Runs `work` in another thread and returns its result. size: bytes of its input; None: the body's."""
        return await self.preparing.run_in_turn(request, len(await request.body()) if size is None else size, work)

    async def respond(
        self, request: Request, events: AsyncGenerator[Told], answer: AnswerWriter[Told], *, stream: bool
    ) -> Response:
        """Answers with the events of a request; closes `events` when the client disconnects."""
        if not stream:
            async with aclosing(events):
                whole = await cancel_on_disconnect(request, answer.whole_body(events))
            try:
                return JSONResponse(whole)
            except ValueError:
                raise ApiError(502, "the answer has numbers or characters that JSON cannot have: ask again") from None
        # An error before `_wait_for_event` returns still gets its own HTTP status.
        first = asyncio.ensure_future(anext(events))
        resumed = _PeekedEvents(first, events)
        try:
            await cancel_on_disconnect(request, self._wait_for_event(first))
            if first.done():
                first.result()
        except BaseException:
            await resumed.aclose()
            raise
        chunks, evicted = stream_parts(answer, resumed, RECORD.get()), partial(answer.error_event, UNREAD)
        client: ApiClient = request.state.client
        reply = EventStream(chunks, resumed, self.unread, client, evicted, answer.alive, answer.media_type)
        reply.headers["X-Answer-Id"] = answer.id  # also before the first event, for the dashboard
        return reply

    async def _wait_for_event(self, first: asyncio.Future[Any]) -> None:
        """Waits for `FIRST_EVENT_S`, and longer while blocks are missing, because that may end with an error."""
        while not (await asyncio.wait((first,), timeout=FIRST_EVENT_S))[0]:
            try:
                if not await to_thread.run_sync(self.missing_blocks):
                    return
            except SplitnetError:  # the directory does not answer, but the peers of the route may
                return

    async def _events(
        self, client: ApiClient, asks: Sequence[GenerationRequest], answer: str
    ) -> AsyncGenerator[Numbered]:
        """Runs the prompts of a request in one place, one after the other; closing the generator ends the prompts."""
        if self.generations.model.headless and any(ask.reading is None for ask in asks):
            raise ApiError(400, f"{self.name!r} has no head to answer with: ask it for embeddings", param="model")
        record = RECORD.get()
        if record is not None and len(asks) == 1 and asks[0].can_continue and not self.generations.ropes_vary:
            asks = [replace(asks[0], given=tuple(record.tokens))]
        if self.state is not None:
            await self.state.share_spending(client)
        trace = TRACE.get()
        trace.end_part("prepare")
        async with self.admission.admitted(client):
            trace.end_part("queue")
            for number, ask in enumerate(asks):
                client.spend_tokens(0 if ask.given else len(ask.prompt))
                self.note_demand(len(ask.prompt) + ask.max_tokens)
                async with aclosing(self._events_of(ask, answer)) as of_one:
                    async for event in of_one:
                        trace.note_event()
                        if isinstance(event, TextDelta) and ask.max_tokens:
                            is_new = record is None or await record.pass_tokens(event.tokens)
                            client.spend_tokens(int(is_new))
                        yield number, event

    async def _events_of(self, ask: GenerationRequest, answer: str) -> AsyncGenerator[ScoredPrompt | TextDelta | Ended]:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        tell = loop.call_soon_threadsafe
        generation = self.generations.start(ask, lambda event: tell(inbox.put_nowait, event), answer)
        TRACE.get().routes = generation.progress.routes
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


async def stream_parts(
    answer: AnswerWriter[Told], events: AsyncIterator[Told], record: AnswerRecord | None = None
) -> AsyncGenerator[str]:
    """The parts of a stream; an error becomes the last part. With a record, parts of server-sent events have ids, and
    those that the client has are left out."""
    number = 0
    try:
        async with aclosing(answer.event_stream(events)) as chunks:
            async for chunk in chunks:
                chunk.encode()  # raises if the text cannot be sent, and the error is sent instead
                number += 1
                if record is None or answer.media_type != EVENTS:
                    yield chunk
                elif number > record.skips:
                    yield f"id: {record.event_prefix}{number}\n{chunk}"
    except Exception as error:
        yield answer.error_event(api_error_of(error))


class _PeekedEvents(AsyncIterator[Told]):
    """An iterator of events that can be closed at any point; the first event is awaited as the future `first`."""

    def __init__(self, first: asyncio.Future[Told], events: AsyncGenerator[Told]) -> None:
        self._first: asyncio.Future[Told] | None = first
        self._events = events

    async def __anext__(self) -> Told:
        if self._first is None:
            return await anext(self._events)
        event = await self._first
        self._first = None
        return event

    async def aclose(self) -> None:
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._events.aclose()


class Closable(Protocol):
    def aclose(self) -> Awaitable[None]: ...


class EventStream(StreamingResponse):
    """A response of server-sent events. Its source is always closed, even if the response ends before it begins.

    The events in `body` are made from those of `source`. With the account `unread`, events are buffered as they come,
    so that a slow client does not delay the source; a client that reads too slowly receives `evicted` as the last
    event. After `KEEP_ALIVE_S` without an event, `alive` is sent to the client, so that proxies keep the connection.
    """

    def __init__(
        self,
        body: AsyncGenerator[str],
        source: Closable,
        unread: FairAccount | None = None,
        client: ApiClient = ANYONE,
        evicted: Callable[[], str] = str,
        alive: str = "",
        media_type: str = EVENTS,
    ) -> None:
        self._closing: list[Closable] = [body, source]
        sent: Any = body
        if unread is not None:
            sent = _read_ahead(body, unread, client, evicted, alive)
            self._closing.insert(0, sent)
        super().__init__(sent, media_type=media_type, headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for each in self._closing:
                await each.aclose()


async def _read_ahead(
    source: AsyncGenerator[str], unread: FairAccount, client: ApiClient, evicted: Callable[[], str], alive: str
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
        kept.append(evicted().encode())

    holding = unread.make_holding(client, evict)
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
            try:
                await asyncio.wait_for(more.wait(), KEEP_ALIVE_S)
            except TimeoutError:
                yield alive.encode()
    finally:
        holding.release()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
