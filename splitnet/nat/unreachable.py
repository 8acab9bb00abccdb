"""The unreachable peer's side: reservations at relays, and streams of callers to its ZeroMQ port."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import random
import socket
import time
from collections.abc import Callable, Coroutine, MutableMapping, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from splitnet.errors import SplitnetError
from splitnet.limits import Places, most_connections
from splitnet.nat import tunnel
from splitnet.nat.punch import Claim, attempts_of, punch
from splitnet.nat.relay import BEAT_S
from splitnet.nat.relay_messages import (
    Beat,
    Call,
    Called,
    Join,
    Joined,
    Reserve,
    Reserved,
    StreamPurpose,
    Tried,
    Try,
)
from splitnet.nat.stream import (
    COPYING_TASK,
    STREAM_ERRORS,
    RefusedError,
    StreamLoop,
    answer_handshake,
    begin_stream,
    bind_socket,
    dial,
    end_all,
    receive,
    send,
)
from splitnet.security.identity import Identity, PublicKey
from splitnet.wire.endpoints import Relay, address_of, host_and_port

log = logging.getLogger(__name__)

WANTED = 3  # number of relays that a peer keeps reservations at
DIAL_S = 3.0  # longest wait for a connection to a relay
JOIN_S = 6.0  # longest wait for the answers of a relay, and for the handshake with a caller
FIRST_PAUSE_S, MOST_PAUSE_S = 2.0, 120.0  # before a relay that failed is tried again
LOOK_S = 10.0  # between two searches while there are too few relays
RETRY_S = 1.0  # between two rounds without any relay
SEEN_S = 0.5  # how long a relay's test connection stays open, so that the listener notices it

STREAMS, STREAMS_OF_KEY, STREAMS_OF_HOST = 512, 16, 64
"""Bounds on callers' streams: in all, of one key, and of one address as the relay reports it. The total is divided
equally among the relays."""
DESCRIPTORS = 3  # for one stream: to the relay, to ZeroMQ, and a better way; without the connection that ZeroMQ accepts
MESSAGES_PER_S, MESSAGES_AT_ONCE = 50.0, 100.0
"""Rate and burst at which messages of one relay are read, so that a flood only delays its sender."""

TEST_S = 60.0  # between two test calls through a relay
HELD_S = 120.0  # if a relay worked for longer before it fails, its pause is `FIRST_PAUSE_S` again
MOST_WORKED = 32  # largest number of remembered relays that have passed on calls
UNUSED_S = 900.0  # a relay without calls of other peers for this time may be replaced by another relay


@dataclass(eq=False)
class UnreachablePeer:
    """Makes a peer reachable through relays, from `start` until `stop_relaying` or the end of `loop`. Thread-safe.

    Args:
        inside: `tcp://IP:port` at which this process reaches its own ZeroMQ port.
        behind: gets a name of the caller for the host and port of each connection to `inside`.
        find: looks relays up; it may take seconds.
        changed: called in the loop's thread when `relays` has changed, and must return at once.
        vouched: whether the user or a friend has named a relay; these relays are preferred.

    Attributes:
        relays: relays through which a test call has reached this peer, the oldest first.
        streams: places of callers' streams through all relays.
    """

    loop: StreamLoop
    identity: Identity
    inside: str
    behind: MutableMapping[tuple[str, int], str]
    find: Callable[[], Sequence[Relay]]
    changed: Callable[[], object]
    vouched: Callable[[Relay], bool] = lambda _: False

    def __post_init__(self) -> None:
        streams = max(WANTED, min(STREAMS, most_connections() // 2 // DESCRIPTORS))
        self.streams = Places(streams, key=STREAMS_OF_KEY, host=STREAMS_OF_HOST, relay=streams // WANTED)
        self._tested: dict[tuple[Relay, bytes], asyncio.Future[None]] = {}
        """Test calls of this peer to itself, by relay and caller's key; done when the call has arrived."""
        self._used_at: dict[Relay, float] = {}  # when a relay last passed on a call of another peer, or was reserved
        self._worked: dict[Relay, None] = {}  # relays that have passed on calls of other peers, the latest last
        self._keeping: dict[Relay, asyncio.Task[None]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._pauses: dict[Relay, tuple[float, float]] = {}
        """For relays that failed: the time until which they are not tried, and the length of this pause."""
        self._task: asyncio.Task[None] | None = None
        self.relays: tuple[Relay, ...] = ()

    def start(self) -> None:
        """Starts to look for relays whenever there are too few. May be called twice."""
        if self._task is None:
            self._task = self.loop.start_task(self._keep_relays())

    def stop_relaying(self) -> bool:
        """Ends all reservations and streams; returns whether `start` had been called."""
        task, self._task = self._task, None
        if task is not None:
            self.loop.cancel_task(task)
        return task is not None

    def reached_by(self, address: str, helpers: Sequence[Relay]) -> list[bool]:
        """Asks relays to connect to an address of this machine, and returns their answers. Takes at most some seconds.
        The connections stay open for a moment, so that the listener can check whether the answers are true."""
        asking = [self.loop.run(self._ask_relay(relay, address)) for relay in helpers]
        wait(asking, timeout=DIAL_S + 2 * JOIN_S)
        return [said for each in asking if each.done() and not each.cancelled() and (said := each.result()) is not None]

    async def _keep_relays(self) -> None:
        loop = asyncio.get_running_loop()
        found: Sequence[Relay] = ()
        looked_at = -math.inf
        try:
            while True:
                # Relays in one network count as one. More relays are also looked for if one passes on no calls.
                lacks = len(set(map(network_of, self._keeping))) < WANTED or any(map(self._is_unused, self._keeping))
                often = len(self._keeping) < WANTED
                if lacks and time.monotonic() - looked_at >= (LOOK_S if often else 6 * LOOK_S):
                    with suppress(SplitnetError):
                        found = await loop.run_in_executor(None, self.find)
                    looked_at = time.monotonic()
                self._make_room(found)
                if lacks:
                    self._begin_reservations(found)
                if self._keeping:
                    keeping = self._keeping.values()
                    await asyncio.wait(keeping, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(RETRY_S)
        finally:
            await end_all([*self._keeping.values(), *self._answering])
            self.relays = ()

    def _begin_reservations(self, found: Sequence[Relay]) -> None:
        now = time.monotonic()
        self._pauses = {relay: pause for relay, pause in self._pauses.items() if now < pause[0] + MOST_PAUSE_S}
        while len(self._keeping) < WANTED and (free := self._free(found)):
            kept = {network_of(relay) for relay in self._keeping}
            relay = min(free, key=lambda one: (*self._rank(one), network_of(one) in kept, random.random()))
            task = self._keeping[relay] = asyncio.get_running_loop().create_task(self._keep_reservation(relay))
            task.add_done_callback(lambda _, relay=relay: self._keeping.pop(relay, None))

    def _free(self, found: Sequence[Relay]) -> list[Relay]:
        """Relays that may be tried: not paused, and with a key that is not in use."""
        now, keys = time.monotonic(), {self.identity.public.raw, *(relay.key for relay in self._keeping)}
        new = [relay for relay in dict.fromkeys(found) if relay.key not in keys]
        return [relay for relay in new if now >= self._pauses.get(relay, (0.0, 0.0))[0]]

    def _rank(self, relay: Relay) -> tuple[bool, bool, bool]:
        """Order of preference, lower is better: vouched relays, relays without a failure, relays that have worked."""
        return not self.vouched(relay), relay in self._pauses, relay not in self._worked

    def _is_unused(self, relay: Relay) -> bool:
        used_at = self._used_at.get(relay)
        is_old = used_at is not None and time.monotonic() - used_at > UNUSED_S
        return is_old and not self.streams.places_of("relay", relay) and not self.vouched(relay)

    def _make_room(self, found: Sequence[Relay]) -> None:
        """Ends one reservation if another relay is better: for an unused relay, or for a second one in a network."""
        if len(self._keeping) < WANTED:
            return
        free, networks = self._free(found), [network_of(relay) for relay in self._keeping]
        elsewhere = [relay for relay in free if network_of(relay) not in networks]
        for relay in reversed(list(self._keeping)):
            doubled = networks.count(network_of(relay)) > 1 and not self.vouched(relay)
            if (doubled and elsewhere) or (self._is_unused(relay) and free):
                self._pauses[relay] = time.monotonic() + MOST_PAUSE_S, MOST_PAUSE_S
                self._keeping[relay].cancel()
                return

    async def _keep_reservation(self, relay: Relay) -> None:
        """Holds a reservation at a relay until it is lost."""
        began = time.monotonic()
        try:
            with await dial(relay.address, DIAL_S) as sock:
                async with asyncio.timeout(JOIN_S):
                    await begin_stream(sock, self.identity, PublicKey(relay.key), StreamPurpose.RESERVE, Reserve())
                    await receive(sock, Reserved)
                self._used_at[relay] = time.monotonic()
                await _until_one_ends(_beat(sock), self._hear(relay, sock), self._test(relay))
        except STREAM_ERRORS as error:
            log.info("the relay at %s is lost: %s", relay.address, error or "no answer")
            before_s = self._pauses.get(relay, (0.0, 0.0))[1] if time.monotonic() - began < HELD_S else 0.0
            pause_s = min(max(2 * before_s, FIRST_PAUSE_S), MOST_PAUSE_S)
            self._pauses[relay] = time.monotonic() + pause_s, pause_s
        finally:
            self._used_at.pop(relay, None)
            if relay in self.relays:
                self._set(tuple(other for other in self.relays if other != relay))

    def _set(self, relays: tuple[Relay, ...]) -> None:
        self.relays = relays
        self.changed()

    def _used(self, relay: Relay) -> None:
        """Notes that a relay has passed on a call of another peer."""
        if relay in self._used_at:
            self._used_at[relay] = time.monotonic()
        self._worked = dict.fromkeys([*(other for other in self._worked if other != relay), relay][-MOST_WORKED:])

    async def _hear(self, relay: Relay, sock: socket.socket) -> None:
        """Handles the messages of a relay, at most `MESSAGES_PER_S`."""
        loop = asyncio.get_running_loop()
        due = 0.0
        while True:
            async with asyncio.timeout(3 * BEAT_S):
                message = await receive(sock, Beat, Called)
            if isinstance(message, Called):
                task = loop.create_task(self._join_caller(relay, message), name=COPYING_TASK)
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            due = max(due, loop.time() - MESSAGES_AT_ONCE / MESSAGES_PER_S) + 1.0 / MESSAGES_PER_S
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _test(self, relay: Relay) -> None:
        """Makes test calls through a relay, and adds it to `relays` when one has arrived. Raises STREAM_ERRORS."""
        while True:
            try:
                await self._call_self(relay)
            except STREAM_ERRORS:
                if relay not in self.relays:
                    raise
                await asyncio.sleep(FIRST_PAUSE_S)
                await self._call_self(relay)
            if relay not in self.relays:
                self._set((*self.relays, relay))
            await asyncio.sleep(TEST_S)

    async def _call_self(self, relay: Relay) -> None:
        """Calls this peer through a relay, with a new key like a stranger, until both keys are proven."""
        try:
            await self._call_as(relay, Identity.generate())
        except RefusedError:  # the relay may accept only authorized keys
            await self._call_as(relay, self.identity)

    async def _call_as(self, relay: Relay, caller: Identity) -> None:
        arrived = self._tested[relay, caller.public.raw] = asyncio.get_running_loop().create_future()
        try:
            with await dial(relay.address, DIAL_S) as sock:
                async with asyncio.timeout(JOIN_S):
                    call = Call(self.identity.public.raw, "")
                    await begin_stream(sock, caller, PublicKey(relay.key), StreamPurpose.CALL, call)
                    joined = await receive(sock, Joined)
                    await begin_stream(sock, caller, self.identity.public, StreamPurpose.TUNNEL, token=joined.token)
                    await arrived
        finally:
            del self._tested[relay, caller.public.raw]

    async def _ask_relay(self, relay: Relay, address: str) -> bool | None:
        """Whether a relay can connect to an address; None: it does not answer."""
        try:
            with await dial(relay.address, DIAL_S) as sock:
                async with asyncio.timeout(JOIN_S):
                    await begin_stream(sock, self.identity, PublicKey(relay.key), StreamPurpose.TRY, Try(address))
                    said = (await receive(sock, Tried)).is_reachable
                await asyncio.sleep(SEEN_S * said)
                return said
        except STREAM_ERRORS as error:
            log.info("the relay at %s does not try to connect: %s", relay.address, error or "no answer")
            return None

    async def _join_caller(self, relay: Relay, called: Called) -> None:
        """Accepts a call, and joins the caller's stream to this peer's ZeroMQ port."""
        host = host_and_port(called.seen)[0] if called.seen else ""
        names = {"key": called.caller, "host": host, "relay": relay}
        if not self.streams.take_place(**names):
            return
        name: tuple[str, int] | None = None
        try:
            with await dial(relay.address, DIAL_S) as outer:
                better: tunnel.Better | None = None
                try:
                    async with asyncio.timeout(JOIN_S):
                        own = outer.getsockname()[:2]
                        join = Join(called.token, address_of(own))
                        await begin_stream(outer, self.identity, PublicKey(relay.key), StreamPurpose.JOIN, join)
                        joined = await receive(outer, Joined)
                        await answer_handshake(outer, self.identity, called.token, only=called.caller)
                    if (arrived := self._tested.get((relay, called.caller))) is not None:
                        if not arrived.done():
                            arrived.set_result(None)
                        return
                    self._used(relay)
                    # Begins only when the caller has proven its key, because few attempts may run at the same time.
                    better = asyncio.ensure_future(
                        punch(own, attempts_of(address_of(own), joined), partial(self._check_stream, called))
                    )
                    inside = host_and_port(self.inside)
                    with bind_socket((inside[0], 0), again=False) as inner:
                        self.behind[name := inner.getsockname()[:2]] = f"{host}, through a relay"
                        await asyncio.get_running_loop().sock_connect(inner, inside)
                        await tunnel.join(inner, outer, better, lambda _: None)
                finally:
                    tunnel.give_up(better)
        except STREAM_ERRORS as error:
            log.debug("a call through %s has ended: %s", relay.address, error or type(error).__name__)
        finally:
            self.streams.leave_place(**names)
            if name is not None:
                self.behind.pop(name, None)

    async def _check_stream(self, called: Called, sock: socket.socket, claim: Claim) -> None:
        await answer_handshake(sock, self.identity, called.token, only=called.caller)
        if not claim():
            raise RefusedError("another stream was faster")


def network_of(relay: Relay) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """The network of a relay's address. The owner of one address usually owns others in the same network."""
    host = ipaddress.ip_address(host_and_port(relay.address)[0])
    return ipaddress.ip_network(f"{host}/{24 if host.version == 4 else 48}", strict=False)


async def _until_one_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await end_all(tasks)


async def _beat(sock: socket.socket) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        await send(sock, Beat())
