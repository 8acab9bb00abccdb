"""The way in and out of every request: the host that it names, its key, its body, and errors that nobody expected."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitnet.serve.bodies import Bodies
from splitnet.serve.failures import ApiError, failure_of
from splitnet.serve.keys import ApiKeys
from splitnet.serve.shares import Client, client_at

ON_THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""Origins whose pages may use the server, whatever else may."""

PROTECTED = ("/v1", "/dashboard/", "/metrics")
"""Paths that need a key begin with one of these."""


class Gate:
    """ASGI middleware; the paths that are `PROTECTED` need a key, if there are keys.

    Without keys, a page of another site must not reach the server by giving its own name the address of this machine:
    requests name an IP address, localhost, or one of `hosts`. Nor may it send requests of which it could not read the
    answers: they come from the server's own page, from one of this machine, or from one of `origins`. What is let in
    has a `Client` in its state.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, hosts: Collection[str] = (), origins: Collection[str] = ()) -> None:
        self._app = app
        self._keys = keys
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._origins = origins
        self._bodies = Bodies()

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
            headers = Headers(scope=scope)
            if not self._keys.required:
                self._check_host(headers)
                self._check_origin(headers)
            client = self._client_of(scope, headers)
            scope.setdefault("state", {})["client"] = client
            async with self._bodies.read(receive, client) as received:
                await self._app(scope, received, noting_send)
        except Exception as error:
            failure = failure_of(error)
            if not begun:
                await JSONResponse(failure.reply(), failure.status, failure.headers)(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        given = headers.get("host")
        if given is None:  # browsers always tell it
            return
        host = given.lower()
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if host.removesuffix(".") not in self._hosts and not _is_address(host):
            raise ApiError(
                403, "the server does not know this host name: start it with --allow-host NAME", code="unknown_host"
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self._origins or re.fullmatch(ON_THIS_MACHINE, origin):
            return
        # A proxy may name another host than the browser did, which says so itself over TLS; no script can.
        if origin.partition("://")[2] != headers.get("host") and headers.get("sec-fetch-site") != "same-origin":
            raise ApiError(
                403,
                "pages of this site may not use the server: start it with --allow-origin ORIGIN",
                code="unknown_origin",
            )

    def _client_of(self, scope: Scope, headers: Headers) -> Client:
        if not self._keys.required or not scope["path"].startswith(PROTECTED):
            return client_at(scope["client"][0] if scope.get("client") else "")
        kind, _, given = headers.get("authorization", "").partition(" ")
        client = self._keys.client_of(given.strip().encode()) if kind.lower() == "bearer" else None
        if client is None:
            raise ApiError(
                401, "wrong API key: send one of the server's as `Authorization: Bearer KEY`", code="wrong_key"
            )
        return client


def client_of(request: Request) -> Client:
    """Who has sent a request that the gate has let in."""
    return request.state.client


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
