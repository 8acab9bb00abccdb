"""The entry and exit of every request: checks of its host, origin and API key, its body, and errors."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
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
from splitnet.serve.admission import Admission, ApiClient, client_at
from splitnet.serve.answer_records import AnswerRecords
from splitnet.serve.failures import ApiError, api_error_of, validation_error
from splitnet.serve.shared_state import digest_of
from splitnet.serve.trace import ROUTE_HEADER, TIMING_HEADER, TRACE, Trace


class ApiKeys:
    """The accepted API keys, each with its options; without any key, every request is accepted."""

    def __init__(self, keys: Mapping[str, KeyOptions]) -> None:
        self._clients = [
            (
                key.encode(),
                ApiClient(
                    f"key {number}", options.weight, options.tokens_per_minute, key_digest=digest_of("API key", key)
                ),
            )
            for number, (key, options) in enumerate(keys.items(), start=1)
        ]

    @classmethod
    def from_file(cls, file: Path | None) -> ApiKeys:
        """The keys of a file, one per line, with options before or after the key; # begins a comment.

        Raises KeyFileError if the file cannot be read, holds no key, or has a wrong line.
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
                    raise KeyFileError("this key is listed twice: leave one out")
            except KeyFileError as error:
                raise KeyFileError(f"{file}, line {number}: {error}") from None
        if not keys:
            raise KeyFileError(f"{file} holds no API key: write one per line, or leave out --api-key-file")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def clients(self) -> list[ApiClient]:
        return [client for _, client in self._clients]

    def client_of(self, given: bytes) -> ApiClient | None:
        """The client of a key; None: the key is not accepted. The duration of a call reveals nothing about the keys."""
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

# Estimated memory of a parsed JSON value, without the text of strings, and of a parsed JSON object. Two bytes of a body
# can define an object, and objects occupy the event loop longest.
VALUE_BYTES, OBJECT_BYTES = 64, 512
MAX_PARSED_BYTES = 48 * 2**20  # Maximum memory of one parsed body
ALL_PARSED_BYTES = 128 * 2**20  # Maximum memory of the parsed bodies of all unanswered requests
BODY_S = 60.0  # Time within which a body must arrive


class Body:
    """The body of a request while it arrives. `account`: the memory of the bodies of all unanswered requests."""

    def __init__(self, account: FairAccount, client: ApiClient, receive: Receive) -> None:
        self._receive = receive
        self._timer = asyncio.timeout(BODY_S)
        self._given_up = False
        self._holding = account.make_holding(client, self._give_up)

    def _give_up(self) -> None:
        self._given_up = True
        self._timer.reschedule(0)

    @asynccontextmanager
    async def read_whole(self) -> AsyncIterator[tuple[bytes, Receive]]:
        """Waits for the whole body. Yields it, and a function that within the `with` receives it in one message.

        Raises ApiError if the body is too long, has too many values, arrives too slowly, or memory is lacking.
        """
        try:
            messages = [await self._arrived()]
            self._holding.is_pinned = True

            async def received() -> Message:
                return messages.pop() if messages else await self._receive()

            yield messages[0].get("body", b""), received
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
            raise ApiError(429, "the server has no memory left for this body: try again in a moment", code="overloaded")
        return {"type": "http.request", "body": bytes(body), "more_body": False}


REQUEST_S = 10.0  # Time for the head of a request, counted from the connection or from the last answer
# A client is disconnected if it reads less than `READ_BYTES` of its waiting answer within this time
UNREAD_S = 30.0
READ_BYTES = 2**14

IDLE_CONNECTIONS = 256
"""Maximum number of connections without a whole request. If one more arrives, the client that has the most such
connections loses its oldest one."""


class BoundedHttp(H11Protocol):
    """A connection of uvicorn with bounds on the time for a request's head and for reading the answer.

    idle: counts the connections that have no whole request.
    """

    def __init__(self, idle: FairAccount, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._all_idle = idle
        self._idle: Holding | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._set_timeout(REQUEST_S)
        self._count_as_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timeout(None)
        self._uncount_idle()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self._answering:
            if not self.flow.write_paused:
                self._set_timeout(None)
            if not self.cycle.more_body:
                self._uncount_idle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering:
            self._set_timeout(UNREAD_S if self.flow.write_paused else REQUEST_S)
            self._count_as_idle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_timeout(UNREAD_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_timeout(None if self._answering else REQUEST_S)

    @property
    def _answering(self) -> bool:
        # Before the first request, uvicorn's `cycle` is None.
        return self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _set_timeout(self, seconds: float | None) -> None:
        """Disconnects the client after this time unless the client has read `READ_BYTES`; None: sets no limit."""
        if self._timer is not None:
            self._timer.cancel()
        self._unread = self.transport.get_write_buffer_size()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._check_reading)

    def _check_reading(self) -> None:
        if self.transport.get_write_buffer_size() <= self._unread - READ_BYTES:
            self._set_timeout(UNREAD_S)
        else:
            self.transport.abort()

    def _count_as_idle(self) -> None:
        if self._idle is None and not self.transport.is_closing():
            client = client_at(self.client[0] if self.client else "")
            self._idle = self._all_idle.make_holding(client, self.transport.abort, 1)

    def _uncount_idle(self) -> None:
        if self._idle is not None:
            self._idle.release()
            self._idle = None


ON_THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # Origins whose pages may always use the server
REQUEST_ID = r"[\w.:-]{1,128}"  # Valid ids in the header of a request; other requests get an id from the server
REQUEST_ID_HEADERS = (
    b"x-request-id",
    b"request-id",
)  # Headers of answers: OpenAI's clients read the first one, Anthropic's the second one
WITHOUT_VERSION = ("/chat/completions", "/completions", "/models", "/embeddings", "/responses", "/messages", "/rerank")
"""Paths that also work without `/v1`, because users of some programs enter only the address of the server."""
PROTECTED = ("/dashboard/", "/metrics")  # Prefixes of paths that need a key, besides the paths of protocols


@dataclass(frozen=True)
class Api:
    """An HTTP protocol of the server, such as OpenAI's."""

    paths: tuple[str, ...]  # prefixes of the protocol's paths
    router: Callable[[Any], APIRouter]  # makes the protocol's paths for a `splitnet.serve.gateway.Gateway`
    error_body: Callable[[ApiError], dict[str, Any]]  # the JSON of an error
    key_of: Callable[[Headers], str]  # the API key in the headers of a request
    key_header: str  # the header that holds the key, for the message that refuses a wrong key
    challenge: str  # the header WWW-Authenticate of that message
    error: type[BaseModel]  # the type of `error_body`
    # A header that only clients of this protocol send, so that it selects the protocol if several share a path.
    header: str | None = None


def api_of(path: str, headers: Headers, apis: Sequence[Api]) -> Api:
    """The protocol whose `header` was sent, else the protocol with the longest matching prefix, else the first one."""

    def fits(api: Api) -> tuple[bool, int]:
        longest = max((len(begin) for begin in api.paths if path.startswith(begin)), default=0)
        return api.header is not None and api.header in headers, longest

    return max(apis, key=fits)


# Callbacks of a request's task, called once the request is answered
REQUEST_CALLBACKS: ContextVar[ExitStack] = ContextVar("ENDS")


@dataclass(eq=False)
class Gate:
    """ASGI middleware that checks requests and adds an `ApiClient` to the state of each accepted request.

    If there are keys, the paths of protocols and the `PROTECTED` paths need a key. If there are no keys, web pages of
    other sites must not use the server. Such a page could point its own host name at this machine (DNS rebinding), so
    requests must name an IP address, localhost, or one of `hosts`. Such a page could also send requests whose answers
    it cannot read, so the header `Origin` must name the server itself, this machine, or one of `origins`.
    """

    app: ASGIApp
    apis: Sequence[Api]
    keys: ApiKeys
    hosts: Collection[str] = ()
    origins: Collection[str] = ()
    records: AnswerRecords = field(default_factory=AnswerRecords)
    names_route: bool = True  # whether answers name the peers that have served them

    def __post_init__(self) -> None:
        self._hosts = {"localhost", *(host.lower() for host in self.hosts)}
        self._protected = *PROTECTED, *(begin for api in self.apis for begin in api.paths)
        # A client can use at most half of the memory.
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
        begun, trace = False, Trace()
        TRACE.set(trace)  # for this task and the tasks that it starts

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                told = [(name, own_id.encode()) for name in REQUEST_ID_HEADERS]
                told += [(name.encode(), value.encode()) for name, value in self._traced(trace, headers)]
                message = {**message, "headers": [*message["headers"], *told]}
            await send(message)

        try:
            if not self.keys:
                self._check_host(headers)
                self._check_origin(headers)
            client = self._client_of(scope, api, headers)
            scope.setdefault("state", {})["client"] = client
            with ExitStack() as ends:
                ends.callback(REQUEST_CALLBACKS.reset, REQUEST_CALLBACKS.set(ends))
                async with (
                    Body(self._parsed, client, receive).read_whole() as (body, received),
                    self.records.recorded(client, headers, scope["path"], body),
                ):
                    await self.app(scope, received, noting_send)
        except Exception as error:
            failure = api_error_of(error)
            if not begun:
                response = JSONResponse(api.error_body(failure), failure.status, failure.headers)
                await response(scope, receive, noting_send)

    def _traced(self, trace: Trace, headers: Headers) -> Iterator[tuple[str, str]]:
        """The headers of an answer that tell its times and its route."""
        yield TIMING_HEADER, trace.timing()
        if self.names_route and (route := trace.route()):
            yield ROUTE_HEADER, route
        if (origin := headers.get("origin")) is not None and self._is_allowed(origin):
            yield "Timing-Allow-Origin", origin

    def _check_host(self, headers: Headers) -> None:
        given = headers.get("host")
        if given is None:  # the request is not from a browser: browsers always send this header
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
        if origin is None or self._is_allowed(origin):
            return
        # A proxy may change the header Host. Over TLS, browsers also send Sec-Fetch-Site, which scripts cannot set.
        if origin.partition("://")[2] != headers.get("host") and headers.get("sec-fetch-site") != "same-origin":
            unknown = "pages of this site may not use the server: start it with --allow-origin ORIGIN"
            raise ApiError(403, unknown, code="unknown_origin")

    def _is_allowed(self, origin: str) -> bool:
        return not {origin, "*"}.isdisjoint(self.origins) or re.fullmatch(ON_THIS_MACHINE, origin) is not None

    def _client_of(self, scope: Scope, api: Api, headers: Headers) -> ApiClient:
        if not self.keys or not scope["path"].startswith(self._protected):
            return client_at(scope["client"][0] if scope.get("client") else "")
        client = self.keys.client_of(api.key_of(headers).encode())
        if client is None:
            wrong = f"wrong API key: send one of the server's keys as `{api.key_header}`"
            raise ApiError(401, wrong, code="wrong_key", headers={"WWW-Authenticate": api.challenge})
        return client


Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)

LARGE_BYTES = 2**16  # Larger requests are prepared one at a time, so that small requests find a free core


MOST_PREPARING = 1024  # Maximum number of requests that wait for their preparation


class PreparationQueue:
    """Prepares requests in separate threads before the model runs: parsing, templates, tokens, grammars.

    At any time, at most one small request per client and one large request in total are prepared, so that no client
    delays others.
    """

    def __init__(self) -> None:
        self._small, self._large = Admission(4, MOST_PREPARING, spare=3), Admission(1, MOST_PREPARING)
        self._threads = CapacityLimiter(5)

    async def run_in_turn(self, request: Request, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `work`; `size`: bytes of the request. Raises ApiError if the client disconnects meanwhile."""
        client = request.state.client
        places = self._large if size > LARGE_BYTES else self._small

        async def prepared() -> Result:
            async with places.admitted(ApiClient(client.name, client.weight)):  # without the client's quota of tokens
                working = asyncio.ensure_future(to_thread.run_sync(work, *arguments, limiter=self._threads))
                try:
                    return await asyncio.shield(working)
                finally:  # a thread cannot be stopped, so its place becomes free only when the thread ends
                    await asyncio.wait([working])

        return await cancel_on_disconnect(request, prepared())


async def cancel_on_disconnect(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`. If the client disconnects, cancels `work` and raises ApiError.

    The body of the request must have been read before.
    """

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
    """The request in a body. Raises ApiError if the body is not JSON, or not a request of this kind."""
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        deep = "recursion limit" in str(error)
        raise ApiError(400, "the body is nested too deep" if deep else "the body is not valid JSON") from None
    return validated(kind, document)


def validated(kind: type[Model], document: Any) -> Model:
    """The request in a JSON document. Raises ApiError if the document is not a request of this kind."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise validation_error([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None


class ParsingRoute(APIRoute):
    """Parses bodies with `app.state.preparing`, because FastAPI parses on the event loop and collects all errors."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        kind = self.body_field.field_info.annotation if self.body_field is not None else None

        class Parsed(Request):
            async def json(self) -> Any:
                body = await self.body()
                return await self.app.state.preparing.run_in_turn(self, len(body), parsed, kind, body)

        async def handle(request: Request) -> Response:
            # All bodies are JSON, but `curl -d` and some clients of Ollama send another content type or no such header.
            others = [header for header in request.scope["headers"] if header[0] != b"content-type"]
            headers = [*others, (b"content-type", b"application/json")]
            return await handler(Parsed({**request.scope, "headers": headers}, request.receive))

        return handle
