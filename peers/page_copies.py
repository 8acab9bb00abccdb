"""Copies pages of sessions from the hops that have them, as clients ask: a replica goes on where a hop has died."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from peers.links import Answering
from peers.prefixes import PrefixStore, Space, page_name, unpack
from peers.service import SessionService, endpoint_of
from splitnet.checkpoint.transfer.fetching import Asking
from splitnet.errors import ProtocolError
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OpenSwarm
from splitnet.wire.codecs import are_finite
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import CopiedPages, CopyPages, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

PER_KEY: Final = 8  # requests of a key that wait or run
WAITING: Final = 64
ANSWER_S: Final = 1.0  # a hop that does not answer for this time has nothing more
TICK_S: Final = 0.1
TRIED: Final = 4  # pages, before it is known whether copying is faster
JOB_S: Final = 60.0  # a request ends then, with what has come


@dataclass(eq=False)
class _Job:
    """A request, and how far it is. due: when its next page may be asked for."""

    source: Connection
    message: CopyPages
    service: SessionService
    store: PrefixStore
    space: Space
    hop: Endpoint
    names: Sequence[bytes]
    began: float = field(default_factory=time.monotonic)
    due: float = 0.0
    index: int = 0
    copied: int = 0
    nbytes: int = 0

    @property
    def held(self) -> int:
        """Pages in a row, from the first one on, that are here now."""
        return len(list(takewhile(lambda label: self.store.has(self.space, label), self.message.labels)))


class PageCopies:
    """Answers `CopyPages`. Thread-safe; close it when done. service: of the blocks that the peer serves now.

    Two threads copy page by page, the requests in turns: one for sessions that wait, one for all others.
    """

    def __init__(
        self, service: Callable[[], SessionService], outbox: Answering, identity: Identity, swarm: OpenSwarm
    ) -> None:
        self._service = service
        self._outbox = outbox
        self._waiting: Counter[bytes] = Counter()
        self._lock = threading.Lock()
        self._copiers = [_Copier(identity, swarm, self._ended) for _ in range(2)]

    def receive(self, source: Connection, message: CopyPages) -> None:
        """Takes a request; one too many, or of no use, is answered at once."""
        with self._lock:
            full = self._waiting[source.curve] >= PER_KEY or self._waiting.total() >= WAITING
            self._waiting[source.curve] += 1
        try:
            job = None if full else self._job(source, message)
        except Exception as error:  # a key that is no point of the curve, a malformed address
            log.debug("pages cannot be copied: %s", error)
            job = None
        if job is None:
            self._ended(source, message, 0, 0)
        else:
            self._copiers[message.if_faster].add(job)

    def close(self) -> None:
        for copier in self._copiers:
            copier.close()

    def _job(self, source: Connection, message: CopyPages) -> _Job | None:
        service = self._service()
        store, space = service.sessions.prefixes, service.space(source.curve, message)
        if store is None or not space.name:
            return None
        hop = endpoint_of(message.source_key, message.source_address, message.source_relays, "the source")
        names = [page_name(space, label) for label in message.labels]
        return _Job(source, message, service, store, space, hop, names)

    def _ended(self, source: Connection, message: CopyPages, pages: int, nbytes: int) -> None:
        with self._lock:
            self._waiting[source.curve] -= 1
            if not self._waiting[source.curve]:
                del self._waiting[source.curve]
        self._outbox.send(source, CopiedPages(message.session, message.number, pages, nbytes))


class _Copier:
    """A thread that copies, once there is something. ended: is told of each request."""

    def __init__(
        self, identity: Identity, swarm: OpenSwarm, ended: Callable[[Connection, CopyPages, int, int], None]
    ) -> None:
        self._identity = identity
        self._swarm = swarm
        self._ended = ended
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, job: _Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="splitnet-page-copies", daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        with Asking(self._identity, self._swarm) as asking:
            while (job := self._next()) is not None:
                try:
                    goes_on = self._copy_page(asking, job)
                except Exception as error:
                    log.info("pages could not be copied: %s", error)
                    goes_on = False
                if goes_on:
                    self.add(job)
                else:
                    self._ended(job.source, job.message, job.held, job.nbytes)

    def _next(self) -> _Job | None:
        """The request whose turn it is, once it is due; None: closed."""
        with self._changed:
            while not self._closed:
                job = min(self._jobs, key=lambda job: job.due, default=None)
                wait_s = None if job is None else job.due - time.monotonic()
                if job is not None and wait_s is not None and wait_s <= 0:
                    self._jobs.remove(job)
                    return job
                self._changed.wait(wait_s)
        return None

    def _copy_page(self, asking: Asking, job: _Job) -> bool:
        """Gets the next page that is missing; False: the request has ended."""
        message = job.message
        while job.index < len(job.names) and job.store.has(job.space, message.labels[job.index]):
            job.index += 1
        if job.index == len(job.names) or time.monotonic() > job.began + JOB_S:
            return False
        name, most = job.names[job.index], job.service.most_page_bytes
        data, total = bytearray(), 1
        while len(data) < total:
            part = self._ask(asking, job.hop, name, len(data))
            if part is None:
                return False
            total = part.total
            if not 0 < total <= most or not 0 < len(part.payload) <= total - len(data):
                raise ProtocolError("what came is no page")
            data += part.payload
            job.nbytes += len(part.payload)
        page = unpack(name, data)
        job.service.check_page(page, message.start, message.end, message.codec, first=job.index == 0)
        if not are_finite(page.tensors.values()):
            raise ProtocolError("a page has values that are no numbers")
        if not job.store.put_copied(job.space, page, job.names[: job.index]):
            return False  # there is no room
        job.copied += 1
        took_s = time.monotonic() - job.began
        job.due = job.began + min(JOB_S, job.nbytes / message.rate)
        page_ms = job.service.page_ms(message.end - message.start)
        return not message.if_faster or job.copied < TRIED or took_s * 1000 / job.copied <= page_ms

    def _ask(self, asking: Asking, hop: Endpoint, name: bytes, offset: int) -> WeightsPart | None:
        """A part of a page; None: the hop does not have it, or does not answer."""
        number = asking.ask(hop, WeightsKind.PAGE, name + bytes(len(name)), offset)
        until = time.monotonic() + ANSWER_S
        while (left := until - time.monotonic()) > 0 and not self._closed and not asking.is_gone(hop):
            try:
                _, message = asking.answers.get(timeout=min(left, TICK_S))
            except queue.Empty:
                continue
            if getattr(message, "number", 0) == number:
                return message if isinstance(message, WeightsPart) else None
        asking.forget(number)
        return None
