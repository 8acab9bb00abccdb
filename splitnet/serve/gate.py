"""The way in and out of every request: the host that it names, its key, its body, and unexpected errors."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from splitnet.errors import KeyFileError
from splitnet.limits import FairAccount, Holding
from splitnet.paths import lines_of
from splitnet.security.identity import KeyOptions, is_options, parse_options
from splitnet.serve.admission import Admission, Client, client_at
from splitnet.serve.failures import ApiError, failure_of, refused


class ApiKeys:
    """Keys that are accepted, with the options of each; without any, everybody is."""

    def __init__(self, keys: Mapping[str, KeyOptions]) -> None:
        self._clients = [
            (key.encode(), Client(f"key {number}", options.weight, options.tokens_per_minute))
            for number, (key, options) in enumerate(keys.items(), start=1)
        ]

    @classmethod
    def read(cls, file: Path | None) -> ApiKeys:
        """The keys of a file, one per line, with their options before or after them; # begins a comment.

        Raises KeyFileError if it cannot be read, holds no key, or a line is wrong.
        """
        if file is None:
            return cls({})
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not a text file"
            refusal = f"the API keys in {file} cannot be read ({reason}): give a file with one key per line"
            raise KeyFileError(refusal) from None
        keys: dict[str, KeyOptions] = {}
        for number, line in lines_of(text):
            try:
                key, options = _key_of(line.split())
                if keys.setdefault(key, options) is not options:
                    raise KeyFileError("this key is there already: leave it out")
            except KeyFileError as error:
                raise KeyFileError(f"{file}, line {number}: {error}") from None
        if not keys:
            raise KeyFileError(f"{file} holds no API key: write one per line, or leave out --api-key-file")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._clients)

    def client_of(self, given: bytes) -> Client | None:
        """The client of a key; None: the key is not accepted. The time that it takes tells nothing about the keys."""
        matching = [client for key, client in self._clients if hmac.compare_digest(given, key)]
        return next(iter(matching), None)


def _key_of(words: Sequence[str]) -> tuple[str, KeyOptions]:
    keys = [word for word in words if not is_options(word)]
    options = [word for word in words if is_options(word)]
    if len(keys) != 1 or len(options) > 1:
        raise KeyFileError("write one key, its options before or after it without spaces, and a comment after #")
    read = parse_options(options[0]) if options else KeyOptions()
    if read.kv is not None or not read.train:
        raise KeyFileError("kv and train are for authorized_keys of peers: leave them out of a file of API keys")
    return keys[0], read


MAX_BODY_BYTES = 16 * 2**20

# Memory of a value of JSON once it is parsed, without the text of strings, and of an object, which takes the event loop
# longest, too: two bytes of a body can hold one.
VALUE_BYTES, OBJECT_BYTES = 64, 512
MAX_PARSED_BYTES = 48 * 2**20  # what a body takes when it is parsed
ALL_PARSED_BYTES = 128 * 2**20  # the same of all requests, until they are answered
BODY_S = 60.0  # Time for a body to arrive


class Body:
    """The body of a request, on its way; `account`: of the memory of all bodies, until they are answered."""

    def __init__(self, account: FairAccount, client: Client, receive: Receive) -> None:
        self._receive = receive
        self._timer = asyncio.timeout(BODY_S)
        self._given_up = False
        self._holding = account.hold(client, self._give_up)

    def _give_up(self) -> None:
        self._given_up = True
        self._timer.reschedule(0)

    @asynccontextmanager
    async def whole(self) -> AsyncIterator[Receive]:
        """Waits for all of it; within the `with`, what is given receives it in one piece.

        Raises ApiError if it is too long, has too many values or comes too slowly, or there is no memory for it now.
        """
        try:
            messages = [await self._arrived()]
            self._holding.settled = True

            async def received() -> Message:
                return messages.pop() if messages else await self._receive()

            yield received
        finally:
            self._holding.release()

    async def _arrived(self) -> Message:
        body, more = bytearray(), True
        try:
            async with self._timer:
                while more:
                    message = await self._receive()
                    new = message.get("body", b"")
                    more = message.get("more_body", False)
                    body += new
                    values = new.count(b",") + new.count(b"[")
                    self._holding.grow(len(new) + VALUE_BYTES * values + OBJECT_BYTES * new.count(b"{"))
                    if len(body) > MAX_BODY_BYTES:
                        raise ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
                    if self._holding.amount > MAX_PARSED_BYTES:
                        raise ApiError(413, "the body has too many values: send fewer prompts or messages at once")
                    if message["type"] == "http.disconnect":
                        return message
        except TimeoutError:
            if not self._given_up:
                raise ApiError(408, f"the body did not arrive within {BODY_S:.0f} s: send it faster") from None
        if self._given_up:
            raise ApiError(429, "there is no room for this body now: try again in a moment", code="overloaded")
        return {"type": "http.request", "body": bytes(body), "more_body": False}


REQUEST_S = 10.0  # Time for the head of a request, from the connection or from the last answer on
UNREAD_S = 30.0  # A client that has not read `READ_BYTES` of what waits for it within this time is cut off
READ_BYTES = 2**14

IDLE_CONNECTIONS = 256
"""Connections without a whole request, at most; the oldest of the client with most of them are closed."""


class Connection(H11Protocol):
    """uvicorn's, with bounds on the time for a head and for reading; `idle`: account of all without a whole request."""

    def __init__(self, idle: FairAccount, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._all_idle = idle
        self._idle: Holding | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._wait(REQUEST_S)
        self._be_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        self._be_busy()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self._answering:
            if not self.flow.write_paused:
                self._wait(None)
            if not self.cycle.more_body:
                self._be_busy()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering:
            self._wait(UNREAD_S if self.flow.write_paused else REQUEST_S)
            self._be_idle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(UNREAD_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wait(None if self._answering else REQUEST_S)

    @property
    def _answering(self) -> bool:
        # Before its first request a connection of uvicorn has none.
        return self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _wait(self, seconds: float | None) -> None:
        """Cuts the client off if it does nothing for this time; None: waits without end."""
        if self._timer is not None:
            self._timer.cancel()
        self._unread = self.transport.get_write_buffer_size()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        if self.transport.get_write_buffer_size() <= self._unread - READ_BYTES:
            self._wait(UNREAD_S)
        else:
            self.transport.abort()

    def _be_idle(self) -> None:
        if self._idle is None and not self.transport.is_closing():
            client = client_at(self.client[0] if self.client else "")
            self._idle = self._all_idle.hold(client, self.transport.abort, 1)

    def _be_busy(self) -> None:
        if self._idle is not None:
            self._idle.release()
            self._idle = None


ON_THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # Origins whose pages may always use the server
REQUEST_ID = r"[\w.:-]{1,128}"  # What a request may call itself; others get a name
REQUEST_ID_HEADERS = (
    b"x-request-id",
    b"request-id",
)  # Of answers: clients of OpenAI read the first, Anthropic's the other
WITHOUT_VERSION = ("/chat/completions", "/completions", "/models", "/embeddings", "/responses", "/messages", "/rerank")
"""Paths that stand for those of `/v1`: some programs take the address of the server alone."""
PROTECTED = ("/dashboard/", "/metrics")  # Paths that need a key begin with one of these, or are those of a protocol


@dataclass(frozen=True)
class Api:
    """A protocol of HTTP."""

    paths: tuple[str, ...]  # with which its paths begin
    router: Callable[[Any], APIRouter]  # its paths for a `splitnet.serve.gateway.Gateway`
    error_body: Callable[[ApiError], dict[str, Any]]  # the JSON of an error
    key_of: Callable[[Headers], str]  # the API key that the headers of a request give
    key_header: str  # how a request gives its key, for the sentence that refuses a wrong one
    challenge: str  # the header WWW-Authenticate of that refusal
    error: type[BaseModel]  # the type of `error_body`
    header: str | None = None  # a header that its clients alone send, also to paths that several protocols have


def api_of(path: str, headers: Headers, apis: Sequence[Api]) -> Api:
    """The protocol of the header, or else the one that has the longest beginning of a path; if none has, the first."""

    def fits(api: Api) -> tuple[bool, int]:
        longest = max((len(begin) for begin in api.paths if path.startswith(begin)), default=0)
        return api.header is not None and api.header in headers, longest

    return max(apis, key=fits)


ENDS: ContextVar[ExitStack] = ContextVar("ENDS")  # What is to be done once a request has its answer, in its task


@dataclass(eq=False)
class Gate:
    """ASGI middleware; paths of protocols and those that are `PROTECTED` need a key, if there are keys.

    Without keys, a page of another site must not reach the server by giving its own name the address of this machine:
    requests name an IP address, localhost, or one of `hosts`. Nor may it send requests of which it could not read the
    answers: they come from the server's own page, from one of this machine, or from one of `origins`. What is let in
    has a `Client` in its state.
    """

    app: ASGIApp
    apis: Sequence[Api]
    keys: ApiKeys
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def __post_init__(self) -> None:
        self._hosts = {"localhost", *(host.lower() for host in self.hosts)}
        self._protected = *PROTECTED, *(begin for api in self.apis for begin in api.paths)
        # Half of it is for others, however much a client sends.
        self._parsed = FairAccount(ALL_PARSED_BYTES, ALL_PARSED_BYTES // 2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"].startswith(WITHOUT_VERSION):
            scope["path"] = "/v1" + scope["path"]
        api = api_of(scope["path"], headers, self.apis)
        given = headers.get("x-request-id", "")
        own_id = given if re.fullmatch(REQUEST_ID, given) else f"req_{secrets.token_hex(12)}"
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                told = ((name, own_id.encode()) for name in REQUEST_ID_HEADERS)
                message = {**message, "headers": [*message["headers"], *told]}
            await send(message)

        try:
            if not self.keys:
                self._check_host(headers)
                self._check_origin(headers)
            client = self._client_of(scope, api, headers)
            scope.setdefault("state", {})["client"] = client
            with ExitStack() as ends:
                ends.callback(ENDS.reset, ENDS.set(ends))
                async with Body(self._parsed, client, receive).whole() as received:
                    await self.app(scope, received, noting_send)
        except Exception as error:
            failure = failure_of(error)
            if not begun:
                response = JSONResponse(api.error_body(failure), failure.status, failure.headers)
                await response(scope, receive, noting_send)

    def _check_host(self, headers: Headers) -> None:
        given = headers.get("host")
        if given is None:  # browsers always tell it
            return
        host = given.lower()
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        with suppress(ValueError):
            ipaddress.ip_address(host)
            return
        if host.removesuffix(".") not in self._hosts:
            unknown = "the server does not know this host name: start it with --allow-host NAME"
            raise ApiError(403, unknown, code="unknown_host")

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self.origins or re.fullmatch(ON_THIS_MACHINE, origin):
            return
        # A proxy may name another host than the browser did, which says so itself over TLS; no script can.
        if origin.partition("://")[2] != headers.get("host") and headers.get("sec-fetch-site") != "same-origin":
            unknown = "pages of this site may not use the server: start it with --allow-origin ORIGIN"
            raise ApiError(403, unknown, code="unknown_origin")

    def _client_of(self, scope: Scope, api: Api, headers: Headers) -> Client:
        if not self.keys or not scope["path"].startswith(self._protected):
            return client_at(scope["client"][0] if scope.get("client") else "")
        client = self.keys.client_of(api.key_of(headers).encode())
        if client is None:
            wrong = f"wrong API key: send one of the server's as `{api.key_header}`"
            raise ApiError(401, wrong, code="wrong_key", headers={"WWW-Authenticate": api.challenge})
        return client


Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)

LARGE_BYTES = 2**16  # A request of more is prepared after others of that kind, so that small ones find a free core


MOST_PREPARING = 1024  # requests that wait until they are prepared


class Preparing:
    """Does what a request needs before it runs in other threads: parsing, templates, tokens, grammars.

    One request of a client is prepared at a time, so that no client holds up the others.
    """

    def __init__(self) -> None:
        self._small, self._large = Admission(4, MOST_PREPARING, spare=3), Admission(1, MOST_PREPARING)
        self._threads = CapacityLimiter(5)

    async def run(self, request: Request, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """What `work` returns; `size`: bytes of the request. Raises ApiError if the client is gone before its turn."""
        client = request.state.client
        places = self._large if size > LARGE_BYTES else self._small

        async def prepared() -> Result:
            async with places.place(Client(client.name, client.weight)):  # without its quota of tokens
                working = asyncio.ensure_future(to_thread.run_sync(work, *arguments, limiter=self._threads))
                try:
                    return await asyncio.shield(working)
                finally:  # a thread cannot be ended, so it keeps its place after its client is gone
                    await asyncio.wait([working])

        return await unless_gone(request, prepared())


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


def parsed(kind: type[BaseModel], body: bytes) -> BaseModel:
    """The request that a body holds. Raises ApiError if it is no JSON, or no such request."""
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        deep = "recursion limit" in str(error)
        raise ApiError(400, "the body is nested too deep" if deep else "the body is not valid JSON") from None
    return validated(kind, document)


def validated(kind: type[Model], document: Any) -> Model:
    """The request that a document of JSON is. Raises ApiError if it is none."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise refused([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None


class ParsingRoute(APIRoute):
    """Parses bodies with `app.state.preparing`; FastAPI would do so on the event loop, and collect every error."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        kind = self.body_field.field_info.annotation if self.body_field is not None else None

        class Parsed(Request):
            async def json(self) -> Any:
                body = await self.body()
                return await self.app.state.preparing.run(self, len(body), parsed, kind, body)

        async def handle(request: Request) -> Response:
            # All bodies are JSON; `curl -d` and some clients of Ollama say something else, or nothing.
            others = [header for header in request.scope["headers"] if header[0] != b"content-type"]
            headers = [*others, (b"content-type", b"application/json")]
            return await handler(Parsed({**request.scope, "headers": headers}, request.receive))

        return handle
