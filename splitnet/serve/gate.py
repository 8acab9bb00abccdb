"""The way in and out of every request: the key, the size of the body, and errors that nobody expected."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitnet.serve.failures import ApiError, failure_of
from splitnet.serve.keys import ApiKeys

MAX_BODY_BYTES = 16 * 2**20

PROTECTED = ("/v1", "/dashboard/", "/metrics")
"""Paths that need a key begin with one of these."""


class Gate:
    """ASGI middleware; the paths that are `PROTECTED` need a key, if there are keys."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, _bounded(receive), noting_send)
        except Exception as error:
            failure = failure_of(error)
            if not begun:
                await JSONResponse(failure.reply(), failure.status, failure.headers)(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys.required or not scope["path"].startswith(PROTECTED):
            return
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not self._keys.accept(given.strip().encode()):
            raise ApiError(
                401, "wrong API key: send one of the server's as `Authorization: Bearer KEY`", code="wrong_key"
            )


def _bounded(receive: Receive) -> Receive:
    """Refuses to read a body that is too long."""
    length = 0

    async def bounded() -> Message:
        nonlocal length
        message = await receive()
        length += len(message.get("body", b""))
        if length > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
        return message

    return bounded
