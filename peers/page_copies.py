"""Copies pages of sessions from other hops on request of clients, so that a replica can replace a hop that dies."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from peers.peer_links import ReplyTarget
from peers.prefixes import PageNamespace, PrefixStore, page_name, unpack
from peers.served import endpoint_of
from peers.service import SessionService
from splitnet.checkpoint.transfer.fetching import PeerQuestions
from splitnet.errors import ProtocolError
from splitnet.limits import FairAccount, Holding, Places
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OpenSwarm
from splitnet.wire.codecs import are_finite
from splitnet.wire.endpoints import Connection, Endpoint
from splitnet.wire.messages import MAX_PART_BYTES, CopiedPages, CopyPages, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

PER_KEY: Final = 8  # maximum number of requests of one key that wait or run
WAITING: Final = 64  # maximum number of requests of all keys that wait or run
AT_ONCE: Final = 4  # pages copied at the same time for sessions that wait; the same number for all other requests
AT_ONCE_OF_KEY: Final = 2  # the same for one key, so that slow sources of one key leave room for other keys
ANSWER_S: Final = 1.0  # the copy ends if the source does not answer for this time
TICK_S: Final = 0.02  # poll interval while all sources are silent
TRIED: Final = 4  # number of pages that are copied before the time of copying is compared with the time of computing
JOB_S: Final = 60.0  # a request ends after this time, with the pages that were copied


@dataclass(frozen=True)
class _CopyClient:
    curve: bytes
    weight: float = 1.0


@dataclass(eq=False)
class _CopyJob:
    """A request and its progress. turn: time of its last page. run: the generator that copies."""

    source: Connection
    message: CopyPages
    service: SessionService
    store: PrefixStore
    namespace: PageNamespace
    hop: Endpoint
    began: float = field(default_factory=time.monotonic)
    turn: float = field(default_factory=time.monotonic)
    copied: int = 0
    nbytes: int = 0
    run: Generator[None] | None = None

    @property
    def pages_here(self) -> int:
        """Number of the first pages of the text that this peer has without a gap."""
        return len(list(takewhile(lambda label: self.store.has_page(self.namespace, label), self.message.labels)))


class PageCopies:
    """Answers `CopyPages`. Thread-safe; close it when done. service: returns the service of the present blocks.

    One thread copies for all requests and waits for several sources at the same time, so a slow source does not delay
    other copies. The request of the key with the fewest pages under way comes first.
    """

    def __init__(
        self, service: Callable[[], SessionService], outbox: ReplyTarget, identity: Identity, swarm: OpenSwarm
    ) -> None:
        self._service = service
        self._outbox = outbox
        self._identity = identity
        self._swarm = swarm
        self._jobs: dict[_CopyJob, Holding] = {}
        self._waiting = FairAccount(WAITING, PER_KEY, newest_first=True)
        self._under_way = Places(2 * AT_ONCE, if_faster=AT_ONCE, key=AT_ONCE_OF_KEY)
        self._answers: dict[int, object] = {}  # received since the last round, by the number of the question
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def receive_request(self, source: Connection, message: CopyPages) -> None:
        """Accepts a request; a request that cannot be served, or exceeds the limits, is answered at once."""
        try:
            job = self._job(source, message)
        except Exception as error:  # a key that is not a point of the curve, a malformed address
            log.debug("pages cannot be copied: %s", error)
            job = None
        with self._changed:
            client, taken = _CopyClient(source.curve), self._waiting.holdings
            if job is not None and (place := self._waiting.make_holding(client, lambda: None, 1)) in taken:
                self._jobs[job] = place
                self._changed.notify()
                if self._thread is None and not self._closed:
                    self._thread = threading.Thread(target=self._run_jobs, name="splitnet-page-copies", daemon=True)
                    self._thread.start()
                return
        self._outbox.send(source, CopiedPages(message.session, message.number, 0, 0))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _job(self, source: Connection, message: CopyPages) -> _CopyJob | None:
        service = self._service()
        store = service.sessions.prefixes
        if store is None or not (namespace := service.rows.namespace(store, source.curve, message)).name:
            return None
        hop = endpoint_of(message.source_key, message.source_address, message.source_relays, "the source")
        return _CopyJob(source, message, service, store, namespace, hop)

    def _run_jobs(self) -> None:
        with PeerQuestions(self._identity, self._swarm) as asking:
            while jobs := self._jobs_in_turn():
                copied = sum(job.copied for job in jobs)
                for job in jobs:
                    job.run = job.run or self._copy(asking, job)
                    self._go_on(job, job.run)
                goes_on = sum(job.copied for job in jobs) > copied  # with another page
                self._answers.clear()
                with suppress(queue.Empty):
                    while True:
                        _, answer = asking.answers.get(timeout=0 if goes_on or self._answers else TICK_S)
                        self._answers[getattr(answer, "number", 0)] = answer

    def _jobs_in_turn(self) -> list[_CopyJob]:
        """All requests, in the order in which they may copy; none: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            jobs = [] if self._closed else list(self._jobs)
        return sorted(jobs, key=lambda job: (self._under_way.places_of("key", job.source.curve), job.turn))

    def _go_on(self, job: _CopyJob, run: Generator[None]) -> None:
        try:
            if self._jobs[job] in self._waiting.holdings and time.monotonic() < job.began + JOB_S:
                return next(run)
        except StopIteration:
            pass
        except Exception as error:
            log.info("pages could not be copied: %s", error)
        run.close()
        with self._changed:
            self._jobs.pop(job).release()
        self._outbox.send(job.source, CopiedPages(job.message.session, job.message.number, job.pages_here, job.nbytes))

    def _copy(self, asking: PeerQuestions, job: _CopyJob) -> Generator[None]:
        """Copies the missing pages in order; yields while it waits, and after each page."""
        message, names, due = job.message, list[bytes](), 0.0
        place = {"if_faster": message.if_faster, "key": job.source.curve}
        for label in message.labels:
            name = page_name(job.namespace, label)
            if not job.store.has_page(job.namespace, label):
                while time.monotonic() < due or not self._under_way.take_place(**place):
                    yield
                try:
                    data = yield from self._bytes_of(asking, job, name)
                finally:
                    self._under_way.leave_place(**place)
                if data is None:
                    return
                page = unpack(name, data)
                job.service.served.check_page(page, message.start, message.end, message.codec, first=not names)
                if not are_finite(page.tensors.values()):
                    raise ProtocolError("a page has values that are not finite")
                if not job.store.put_copied(job.namespace, page, names) and not job.store.has_page(
                    job.namespace, label
                ):
                    return  # there is no room
                job.copied += 1
                job.turn = time.monotonic()
                due = job.began + min(JOB_S, job.nbytes / message.rate)
                page_ms = job.service.page_ms(message.end - message.start)
                took_ms = (job.turn - job.began) * 1000
                if message.if_faster and job.copied >= TRIED and took_ms / job.copied > page_ms:
                    return
                yield
            names.append(name)

    def _bytes_of(self, asking: PeerQuestions, job: _CopyJob, name: bytes) -> Generator[None, None, bytearray | None]:
        """The bytes of a page; None: the hop lacks the page, or does not answer. A short part is an error: a page
        in parts of single bytes would take days."""
        data, total = bytearray(), 1
        while len(data) < total:
            number = asking.ask_peer(job.hop, WeightsKind.PAGE, name + bytes(len(name)), len(data))
            until = time.monotonic() + ANSWER_S
            try:
                while (part := self._answers.get(number)) is None:
                    if time.monotonic() > until or asking.is_gone(job.hop):
                        return None
                    yield
            finally:
                asking.forget_question(number)
            if not isinstance(part, WeightsPart):
                return None
            total = part.total
            left = total - len(data)
            if not 0 < total <= job.service.rows.most_page_bytes or len(part.payload) != min(left, MAX_PART_BYTES):
                raise ProtocolError("the received bytes are not a page")
            data += part.payload
            job.nbytes += len(part.payload)
        return data
