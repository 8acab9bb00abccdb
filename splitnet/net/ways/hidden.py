"""A hidden peer's ends: streams to helpers through which it can be called, and tunnels from them to its ZeroMQ port."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial

from splitnet.errors import SplitnetError
from splitnet.net.endpoints import Relay
from splitnet.net.identity import Identity, PublicKey
from splitnet.net.ways import pair
from splitnet.net.ways.bounds import Places
from splitnet.net.ways.helper import BEAT_S
from splitnet.net.ways.loop import CARRYING, WaysLoop
from splitnet.net.ways.messages import Beat, Called, Join, Joined, Purpose, Reserve, Reserved
from splitnet.net.ways.punching import Claim, lines, punch
from splitnet.net.ways.streams import (
    STREAM_ERRORS,
    RefusedError,
    address_of,
    bound,
    dial,
    host_and_port,
    meet,
    prove,
    receive,
    send,
)

log = logging.getLogger(__name__)

WANTED = 3
"""Helpers at the same time."""
DIAL_S = 3.0
JOIN_S = 6.0
FIRST_PAUSE_S, MOST_PAUSE_S = 2.0, 120.0
"""After which a helper that failed is tried again."""
LOOK_S = 10.0
"""How often others are looked for while there are too few."""
RETRY_S = 1.0

STREAMS, STREAMS_OF_KEY, STREAMS_OF_HOST, STREAMS_OF_RELAY = 512, 16, 64, 256
"""That others may have here: in all, of one key, of one address (as a helper tells it), and through one helper."""


class Hidden:
    """Makes a peer reachable through helpers, from `start` on. Thread-safe; it ends with its loop at the latest.

    Args:
        loop: runs it.
        identity: of the peer.
        inside: `tcp://IP:port` where its own ZeroMQ listens, for this process.
        behind: is told, by host and port of a connection to `inside`, who is at its other end.
        find: looks up helpers; it may take seconds.
        changed: called, in a thread of its own, when `relays` has changed.

    Attributes:
        relays: by which the peer can be called now, those that were there first in front.
    """

    def __init__(
        self,
        loop: WaysLoop,
        identity: Identity,
        inside: str,
        behind: MutableMapping[tuple[str, int], str],
        find: Callable[[], Sequence[Relay]],
        changed: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._identity = identity
        self._inside = inside
        self._behind = behind
        self._find = find
        self._changed = changed
        self._places = Places(STREAMS, key=STREAMS_OF_KEY, host=STREAMS_OF_HOST, relay=STREAMS_OF_RELAY)
        self._keeping: dict[Relay, asyncio.Task[None]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._pauses: dict[Relay, tuple[float, float]] = {}
        """Of helpers that failed: until when they are left alone, and how long that is."""
        self._task: asyncio.Task[None] | None = None
        self.relays: tuple[Relay, ...] = ()

    def start(self) -> None:
        """Looks for helpers, now and whenever there are too few. Does nothing if it does already."""
        if self._task is None:
            self._task = self._loop.begin(self._run())

    def stop(self) -> None:
        """Lets all helpers go, and what goes through them."""
        task, self._task = self._task, None
        if task is not None:
            self._loop.end(task)

    @property
    def streams(self) -> int:
        """Through all helpers."""
        return self._places.taken

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        found: Sequence[Relay] = ()
        looked_at = -math.inf
        try:
            while True:
                lacks = len(self._keeping) < WANTED
                if lacks and time.monotonic() - looked_at >= LOOK_S:
                    with suppress(SplitnetError):
                        found = await loop.run_in_executor(None, self._find)
                    looked_at = time.monotonic()
                if lacks:
                    self._begin(found)
                if self._keeping:
                    keeping = self._keeping.values()
                    await asyncio.wait(keeping, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(RETRY_S)
        finally:
            tasks = [*self._keeping.values(), *self._answering]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.relays = ()

    def _begin(self, found: Sequence[Relay]) -> None:
        now = time.monotonic()
        self._pauses = {relay: pause for relay, pause in self._pauses.items() if now < pause[0] + MOST_PAUSE_S}
        free = [
            relay
            for relay in dict.fromkeys(found)
            if relay not in self._keeping
            and relay.key != self._identity.public.raw
            and now >= self._pauses.get(relay, (0.0, 0.0))[0]
        ]
        random.shuffle(free)
        for relay in free[: WANTED - len(self._keeping)]:
            task = self._keeping[relay] = asyncio.get_running_loop().create_task(self._keep(relay))
            task.add_done_callback(lambda _, relay=relay: self._keeping.pop(relay, None))

    async def _keep(self, relay: Relay) -> None:
        """Is there for calls through a helper, until that is lost."""
        try:
            with await dial(relay.address, DIAL_S) as sock:
                async with asyncio.timeout(JOIN_S):
                    proof = await prove(sock, self._identity, PublicKey(relay.key), Purpose.RESERVE)
                    await send(sock, proof, Reserve())
                    await receive(sock, Reserved)
                self._pauses.pop(relay, None)
                self._set((*self.relays, relay))
                beating = asyncio.ensure_future(_beat(sock))
                try:
                    while True:
                        async with asyncio.timeout(3 * BEAT_S):
                            message = await receive(sock, Beat, Called)
                        if isinstance(message, Called):
                            task = asyncio.get_running_loop().create_task(self._answer(relay, message), name=CARRYING)
                            self._answering.add(task)
                            task.add_done_callback(self._answering.discard)
                finally:
                    beating.cancel()
                    await asyncio.gather(beating, return_exceptions=True)
        except STREAM_ERRORS as error:
            log.info("the helper at %s is lost: %s", relay.address, error or "it is silent")
            pause_s = min(max(2 * self._pauses.get(relay, (0.0, 0.0))[1], FIRST_PAUSE_S), MOST_PAUSE_S)
            self._pauses[relay] = time.monotonic() + pause_s, pause_s
        finally:
            if relay in self.relays:
                self._set(tuple(other for other in self.relays if other != relay))

    def _set(self, relays: tuple[Relay, ...]) -> None:
        self.relays = relays
        asyncio.get_running_loop().run_in_executor(None, self._changed)

    async def _answer(self, relay: Relay, called: Called) -> None:
        """Takes a call: joins the caller to the ZeroMQ port here."""
        host = host_and_port(called.seen)[0] if called.seen else ""
        names = {"key": called.caller, "host": host, "relay": relay}
        if not self._places.take(**names):
            return
        name: tuple[str, int] | None = None
        try:
            with await dial(relay.address, DIAL_S) as outer:
                better: pair.Better | None = None
                try:
                    async with asyncio.timeout(JOIN_S):
                        proof = await prove(outer, self._identity, PublicKey(relay.key), Purpose.JOIN)
                        own = outer.getsockname()[:2]
                        await send(outer, proof, Join(called.token, address_of(own)))
                        joined = await receive(outer, Joined)
                        better = asyncio.ensure_future(
                            punch(own, lines(address_of(own), joined), partial(self._check, called))
                        )
                        await meet(outer, self._identity, called.token, only=called.caller)
                    inside = host_and_port(self._inside)
                    family = socket.AF_INET6 if ":" in inside[0] else socket.AF_INET
                    with bound(family, (inside[0], 0), again=False) as inner:
                        self._behind[name := inner.getsockname()[:2]] = f"{host}, through a helper"
                        await asyncio.get_running_loop().sock_connect(inner, inside)
                        await pair.join(inner, outer, better, lambda _: None)
                finally:
                    pair.give_up(better)
        except STREAM_ERRORS as error:
            log.debug("a call through %s has ended: %s", relay.address, error or type(error).__name__)
        finally:
            self._places.leave(**names)
            if name is not None:
                self._behind.pop(name, None)

    async def _check(self, called: Called, sock: socket.socket, claim: Claim) -> None:
        await meet(sock, self._identity, called.token, only=called.caller)
        if not claim():
            raise RefusedError("another stream was faster")


async def _beat(sock: socket.socket) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        await send(sock, Beat())
