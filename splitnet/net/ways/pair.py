"""A connection of ZeroMQ on loopback, and the way that its bytes take; a better way takes over without a gap.

ZeroMQ is never told of a move: each side sends its next bytes by the better way, says there how many the first has
carried, and ends that one. The other side reads the first to its end, and goes on with the better one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from splitnet.errors import ProtocolError
from splitnet.net.ways.messages import Moved
from splitnet.net.ways.punching import Way
from splitnet.net.ways.streams import copy, end, receive, send

_LAST_BYTES_S = 1.0

Better = asyncio.Task[tuple[socket.socket, Way] | None]


async def join(inner: socket.socket, outer: socket.socket, better: Better, moved: Callable[[Way], None]) -> None:
    """Copies in both directions until one side ends. Closes nothing but the better way.

    Args:
        inner: to ZeroMQ.
        outer: to the other side, through a helper.
        better: finds another way, or None; it is cancelled at the end.
        moved: told when bytes begin to go that way.

    Raises:
        STREAM_ERRORS
    """
    way = outer

    async def pick(sent: int) -> socket.socket:
        nonlocal way
        if way is outer and better.done() and not better.cancelled() and (found := better.result()):
            await send(found[0], Moved(sent))
            end(outer)
            way = found[0]
            moved(found[1])
        return way

    async def to_inner(_: int) -> socket.socket:
        return inner

    async def outward() -> None:
        await copy(inner, pick)
        end(way)

    async def inward() -> None:
        got = await copy(outer, to_inner)
        found = await asyncio.shield(better)
        if found is not None:
            if (await receive(found[0], Moved)).sent != got:
                raise ProtocolError("bytes were lost between two ways")
            await copy(found[0], to_inner)
        end(inner)

    copying = [asyncio.ensure_future(outward()), asyncio.ensure_future(inward())]
    try:
        done, left = await asyncio.wait(copying, return_when=asyncio.FIRST_COMPLETED)
        if left and all(task.exception() is None for task in done):
            await asyncio.wait(left, timeout=_LAST_BYTES_S)
        for task in copying:
            if task.done():
                task.result()
    finally:
        for task in copying:
            task.cancel()
        await asyncio.gather(*copying, return_exceptions=True)
        give_up(better)


def give_up(better: Better | None) -> None:
    """Wants no better way any more: what looks for one ends, and closes what it finds."""
    if better is None:
        return
    if not better.done():
        better.cancel()
    elif not better.cancelled() and better.exception() is None and (found := better.result()):
        found[0].close()
