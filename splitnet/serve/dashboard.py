"""The dashboard: a static page, and the stream of what it shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from splitnet.errors import SplitnetError
from splitnet.net.records import PeerRecord
from splitnet.serve.admission import Admission
from splitnet.serve.events import EventStream
from splitnet.serve.gate import client_of
from splitnet.serve.generation import Generations
from splitnet.serve.presence import PAUSE_S, Presence
from splitnet.serve.shares import Client, Shares
from splitnet.serve.snapshot import snapshot
from splitnet.serve.sse import framed

SNAPSHOT_S = 1.0
LOOKUP_S = 3.0
"""Between two looks into the directory, while somebody looks at the page."""

MAX_STREAMS = 32
"""Of the page, for all who look."""

TICK_S = 0.25
"""How soon events are told, and how soon a stream ends with the server."""

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    # Whatever a peer says of itself, no browser runs or loads it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Dashboard:
    """Watches the swarm and the answers, only while somebody looks; all who look see the same.

    Args:
        name: by which the chat asks for the model.
    """

    def __init__(self, generations: Generations, admission: Admission, name: str) -> None:
        self._name = name
        self._generations = generations
        self._admission = admission
        self._swarm = generations.model.swarm
        self._presence = Presence(self._swarm)
        self._records: list[PeerRecord] = []
        self._problem: str | None = None
        self._lookup: asyncio.Task[None] | None = None
        self._looked_up_at = float("-inf")
        self._shown: Any = None
        self._shown_at = float("-inf")
        self._showing = asyncio.Lock()
        self._streams = Shares(MAX_STREAMS)

    async def stream(self, client: Client) -> AsyncGenerator[str]:
        """Server-sent events: snapshots, and what has happened; at first all that is known to have happened lately.

        The oldest stream of who has most of them ends where there are more than `MAX_STREAMS`.
        """
        over = asyncio.Event()
        looks = self._streams.hold(client, over.set)
        looks.grow(1)
        try:
            async for text in self._told(over):
                yield text
        finally:
            looks.release()

    async def _told(self, over: asyncio.Event) -> AsyncGenerator[str]:
        clock = asyncio.get_running_loop().time
        number, shown_at = -1, float("-inf")
        while True:
            if clock() - shown_at >= SNAPSHOT_S:
                shown_at = clock()
                yield framed({"type": "snapshot", **await self._snapshot()})
            events = self._swarm.events.since(max(number, 0))
            if events or number < 0:
                yield framed({"type": "events", "events": [asdict(event) for event in events]})
                number = events[-1].number if events else 0
            if self._generations.draining or over.is_set():
                return
            await asyncio.sleep(TICK_S)

    async def _snapshot(self) -> Any:
        clock = asyncio.get_running_loop().time
        async with self._showing:
            if clock() - self._shown_at >= SNAPSHOT_S / 2:
                await self._look_up()
                self._shown = await run_in_threadpool(self._look)
                self._shown_at = clock()
            return self._shown

    async def _look_up(self) -> None:
        """Keeps the records fresh; only who looks after a pause waits for them, as a directory can be slow."""
        now = asyncio.get_running_loop().time()
        age_s = now - self._looked_up_at
        if (self._lookup is None or self._lookup.done()) and age_s >= LOOKUP_S:
            self._looked_up_at = now
            self._lookup = asyncio.create_task(self._read_records())
            if age_s > PAUSE_S:
                await asyncio.shield(self._lookup)  # others look, too, when this one goes

    async def _read_records(self) -> None:
        try:
            self._records = await run_in_threadpool(self._swarm.peers, fresh=True)
            self._problem = None
        except SplitnetError as error:  # none is left that counts, see `KnownPeers.look`
            self._records, self._problem = [], str(error)

    def _look(self) -> Any:
        seen = self._presence.look(self._records, self._generations.progress.working_peers())
        return snapshot(self._name, self._generations, self._admission, seen, self._problem)


def dashboard_router(dashboard: Dashboard) -> APIRouter:
    """The paths of the page, which need no key, and the one of its data."""
    router = APIRouter(include_in_schema=False)
    files = {file.name: file.read_bytes() for file in (resources.files("splitnet.serve") / "page").iterdir()}

    def page_file(name: str) -> Response:
        media_type = MEDIA_TYPES.get(name[name.rfind(".") :])
        if name not in files or media_type is None:
            raise HTTPException(404)
        return Response(files[name], media_type=media_type, headers=HEADERS)

    @router.get("/")
    async def page() -> Response:
        """The page."""
        return page_file("dashboard.html")

    @router.get("/page/{name}")
    async def part_of_page(name: str) -> Response:
        """What it is made of."""
        return page_file(name)

    @router.get("/dashboard/events")
    async def stream(request: Request) -> Response:
        """What it shows."""
        events = dashboard.stream(client_of(request))
        return EventStream(events, events)

    return router
