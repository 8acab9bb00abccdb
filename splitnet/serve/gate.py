"""The way in and out of every request: the host that it names, its key, its body, and errors that nobody expected."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitnet.serve.bodies import Bodies
from splitnet.serve.failures import ApiError, failure_of
from splitnet.serve.keys import ApiKeys
from splitnet.serve.shares import Client, client_at

PROTECTED = ("/v1", "/dashboard/", "/metrics")
"""Paths that need a key begin with one of these."""


class Gate:
    """ASGI middleware; the paths that are `PROTECTED` need a key, if there are keys.

    Without keys, a page of another site must not reach the server by giving its own name the address of this machine:
    requests name an IP address, localhost, or one of `hosts`. What is let in has a `Client` in its state.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._keys = keys
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
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
            self._check_host(headers)
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
        if self._keys.required or given is None:  # browsers always tell it
            return
        host = given.lower()
        host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if host.removesuffix(".") not in self._hosts and not _is_address(host):
            raise ApiError(
                403, "the server does not know this host name: start it with --allow-host NAME", code="unknown_host"
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
