"""Streams whose clients do not read, and connections whose clients do nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request

from splitnet.limits import FairAccount
from splitnet.serve import request_gate
from splitnet.serve.admission import ApiClient
from splitnet.serve.apis.openai import error_body
from splitnet.serve.failures import ApiError
from splitnet.serve.request_gate import BoundedHttp
from splitnet.serve.responses import UNREAD, EventStream, ServedModel, framed, stream_parts


def test_a_source_ends_without_a_reader_and_unread_bytes_are_bounded() -> None:
    async def come() -> None:
        unread = FairAccount(1000)
        ended: list[str] = []

        async def source(name: str, events: int) -> AsyncGenerator[str]:
            try:
                for _ in range(events):
                    yield "x" * 100
                    await asyncio.sleep(0)
                ended.append(name)
            finally:
                ended.append(f"{name} closed")

        async def read(name: str, events: int, reading: asyncio.Event) -> bytes:
            body = source(name, events)
            sent: list[bytes] = []

            async def send(message: Any) -> None:
                sent.append(message.get("body", b""))
                if sent[-1]:
                    await reading.wait()

            async def receive() -> Any:
                await asyncio.Event().wait()

            stream = EventStream(body, body, unread, ApiClient(name), lambda: framed(error_body(UNREAD)))
            await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
            return b"".join(sent)

        later = asyncio.Event()
        greedy = asyncio.create_task(read("greedy", 1000, later))
        modest = asyncio.create_task(read("modest", 5, later))
        async with asyncio.timeout(10):
            while len(ended) < 3:
                await asyncio.sleep(0)
        assert sorted(ended) == ["greedy closed", "modest", "modest closed"]
        assert sum(holding.amount for holding in unread.holdings) == 400, "what the modest one has not read yet"
        later.set()
        assert await modest == b"x" * 500
        assert b"read faster" in await greedy
        assert not unread.holdings

    asyncio.run(come())


class Written:
    """An answer whose parts are its events."""

    id, media_type, alive = "1", "text/event-stream", ""

    async def whole_body(self, events: AsyncIterator[Any]) -> dict[str, Any]:
        return {"said": [event async for event in events]}

    async def event_stream(self, events: AsyncIterator[Any]) -> AsyncGenerator[str]:
        async for event in events:
            yield framed({"said": event})

    def error_event(self, failure: ApiError) -> str:
        return framed(error_body(failure))


@pytest.mark.parametrize("wrong", ["\ud800", float("nan")])
def test_values_that_json_cannot_have_are_an_error(wrong: Any) -> None:
    async def source() -> AsyncGenerator[Any]:
        yield "a"
        yield wrong
        yield "b"

    async def come() -> None:
        chunks = [chunk async for chunk in stream_parts(Written(), source())]
        assert chunks[0] == framed({"said": "a"}) and '"server_error"' in chunks[1] and len(chunks) == 2

        async def receive() -> Any:
            await asyncio.Event().wait()

        own: Any = None
        with pytest.raises(ApiError, match="JSON cannot have") as refused:
            await ServedModel.respond(own, Request({"type": "http"}, receive), source(), Written(), stream=False)
        assert refused.value.status == 502

    asyncio.run(come())


async def on_a_server(app: Any, does: Callable[[int], Awaitable[None]], idle: FairAccount | None = None) -> None:
    """Runs an app on a socket while a client does something with its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kind: Any = partial(BoundedHttp, FairAccount(100) if idle is None else idle)
        server = uvicorn.Server(uvicorn.Config(app, http=kind, lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(10):
                await does(listener.getsockname()[1])
        finally:
            server.should_exit = True
            await serving


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_gate, "UNREAD_S", 0.1)
    cut_off = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
            await asyncio.sleep(0)
        cut_off.set()

    async def does(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**12)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await cut_off.wait()
        writer.close()

    asyncio.run(on_a_server(app, does))


def test_a_client_that_sends_no_whole_head_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_gate, "REQUEST_S", 0.2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await asyncio.sleep(0.5)  # longer than a head may take
        await send({"type": "http.response.body", "body": b"ok"})

    async def does(port: int) -> None:
        idle, _ = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):  # one connection serves several requests
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(2) == b"ok"
        writer.write(b"GET /again HT")
        assert await idle.read() == b"" == await reader.read()

    asyncio.run(on_a_server(app, does))


def test_of_too_many_idle_connections_the_oldest_is_closed() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def does(port: int) -> None:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await opened[0][0].readexactly(1)
        for reader, writer in opened[1:]:
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")

    asyncio.run(on_a_server(app, does, FairAccount(3)))
