"""Copies pages of sessions from the hops that have them, as clients ask: a replica goes on where a hop has died."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from typing import Final

from peers.links import Answering
from peers.prefixes import PrefixStore, Space, page_name, unpack
from peers.service import SessionService
from splitnet.checkpoint.transfer.fetching import Asking
from splitnet.errors import ProtocolError
from splitnet.security.identity import Identity, PublicKey
from splitnet.security.swarm_key import OpenSwarm
from splitnet.wire.endpoints import Connection, Endpoint, is_address
from splitnet.wire.messages import CopiedPages, CopyPages, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

PER_KEY: Final = 2  # requests of a key that wait or run
WAITING: Final = 64
ANSWER_S: Final = 3.0  # a hop that does not answer for this time has nothing more
TICK_S: Final = 0.1
JOB_S: Final = 60.0  # a request ends then, with what has come


class PageCopies:
    """Answers `CopyPages`. Thread-safe; close it when done. service: of the blocks that the peer serves now."""

    def __init__(
        self, service: Callable[[], SessionService], outbox: Answering, identity: Identity, swarm: OpenSwarm
    ) -> None:
        self._service = service
        self._outbox = outbox
        self._identity = identity
        self._swarm = swarm
        self._jobs: queue.Queue[tuple[Connection, CopyPages] | None] = queue.Queue()
        self._waiting: Counter[bytes] = Counter()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def receive(self, source: Connection, message: CopyPages) -> None:
        """Takes a request, unless there are too many; a client that gets no answer asks again."""
        if self._waiting[source.curve] >= PER_KEY or self._waiting.total() >= WAITING or self._closed.is_set():
            return
        self._waiting[source.curve] += 1
        self._jobs.put((source, message))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="splitnet-page-copies", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        with Asking(self._identity, self._swarm) as asking:
            while (job := self._jobs.get()) is not None and not self._closed.is_set():
                source, message = job
                try:
                    pages, nbytes = self._copy(asking, source, message)
                    self._outbox.send(source, CopiedPages(message.session, message.number, pages, nbytes))
                except Exception as error:
                    log.info("pages could not be copied: %s", error)
                finally:
                    self._waiting[source.curve] -= 1
                    if not self._waiting[source.curve]:
                        del self._waiting[source.curve]

    def _copy(self, asking: Asking, source: Connection, message: CopyPages) -> tuple[int, int]:
        """Gets the pages that are missing, the first ones first; returns how many are here now, and bytes that came."""
        service = self._service()
        store, space = service.sessions.prefixes, service.space(source.curve, message)
        if store is None or not space.name:
            return 0, 0
        if not all(map(is_address, (message.source_address, *(each.address for each in message.source_relays)))):
            raise ProtocolError("the source's address is not tcp://IP:PORT: names of others are not looked up")
        hop = Endpoint(message.source_address, PublicKey(message.source_key), message.source_relays)
        most = service.most_page_bytes
        began, nbytes, copied = time.monotonic(), 0, 0
        names = [page_name(space, label) for label in message.labels]
        for index, (name, label) in enumerate(zip(names, message.labels, strict=True)):
            if store.has(space, label):
                continue
            data, total = bytearray(), 1
            while len(data) < total:
                if self._closed.wait(max(0.0, nbytes / message.rate - (time.monotonic() - began))):
                    return 0, nbytes
                part = self._ask(asking, hop, name, len(data))
                if part is None or time.monotonic() - began > JOB_S:
                    return _held(store, space, message), nbytes
                total = part.total
                if not 0 < total <= most or not 0 < len(part.payload) <= total - len(data):
                    raise ProtocolError("what came is no page")
                data += part.payload
                nbytes += len(part.payload)
            store.put_copied(space, unpack(name, data), names[:index])
            took_ms = (time.monotonic() - began) * 1000
            if message.if_faster and took_ms / (copied := copied + 1) > service.page_ms(message.end - message.start):
                return _held(store, space, message), nbytes
        return _held(store, space, message), nbytes

    def _ask(self, asking: Asking, hop: Endpoint, name: bytes, offset: int) -> WeightsPart | None:
        """A part of a page; None: the hop does not have it, or does not answer."""
        number = asking.ask(hop, WeightsKind.PAGE, name + bytes(len(name)), offset)
        until = time.monotonic() + ANSWER_S
        while (left := until - time.monotonic()) > 0 and not self._closed.is_set():
            try:
                _, message = asking.answers.get(timeout=min(left, TICK_S))
            except queue.Empty:
                if asking.is_gone(hop):
                    break
                continue
            if getattr(message, "number", 0) == number:
                return message if isinstance(message, WeightsPart) else None
        asking.forget(number)
        return None


def _held(store: PrefixStore, space: Space, message: CopyPages) -> int:
    return len(list(takewhile(lambda label: store.has(space, label), message.labels)))
