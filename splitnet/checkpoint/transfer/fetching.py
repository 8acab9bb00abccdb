"""Fetches pieces of weights from peers and from the hub, several at once, and plans the source of each piece."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Generic, TypeVar

import numpy as np
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from scheduler.liveness import SOURCE_SILENT_S
from splitnet.checkpoint.store import TensorStore
from splitnet.checkpoint.transfer.hashing import forget_manifest
from splitnet.checkpoint.transfer.manifest import Manifest, digest
from splitnet.checkpoint.transfer.weight_pieces import HeldPieces, WeightFolder
from splitnet.errors import DirectoryError, ModelNotFound, WrongSwarm
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.swarm.client_links import Links
from splitnet.transport.addresses import peer_address
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import MAX_PART_BYTES, AskWeights, Failure, FailureCode, Message, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

LOOK_S: Final = 5.0  # interval of directory look-ups while pieces are missing
WAIT_LIMIT_S: Final = 30.0  # wait while no source has a missing piece, before the fetch fails
FIRST_LISTS_S: Final = 0.5  # wait at the start for the peers' lists of pieces, so that all peers are asked
TICK_S: Final = 0.1
MAX_HUB_ERRORS: Final = 32  # consecutive errors after which the hub is left out
HUB_TIMEOUT_S: Final = 30.0
FIRST_BYTES: Final = 2 << 20  # bytes that are requested at once from a source without a measured rate
MAX_BYTES: Final = 32 << 20
MAX_PIECES: Final = 48  # maximum pieces that are requested at once from one source
HORIZON_S: Final = 0.25
"""A source has as many bytes under way as it sends in twice this time, or in twice the shortest time of a piece, if the
latter is longer."""
REST_S: Final = 10.0  # pause after which a silent source is asked again
BUSY_S: Final = 1.0  # pause after which a busy source is asked again
MAX_STRIKES: Final = 3  # silences after which a source is left out
SLOW_S: Final = 5.0
"""If a piece is under way for this time, and for a multiple of the time that an idle source would take, the piece is
also requested from the idle source."""
_FORGET: Final = 0.9  # decay of earlier observations per piece

HUB: Final = "the hub"
Report = Callable[[str, int, int], None]


Source = TypeVar("Source", bound=Hashable)


@dataclass
class _SourceState:
    """The state of one source."""

    held: set[bytes] = field(default_factory=set[bytes])  # needed pieces that the source has
    # Pieces to request from the source, the next piece at the end. Some of them may already be requested from other
    # sources.
    queue: list[bytes] = field(default_factory=list[bytes])
    # Pieces under way from the source: time of the request, and bytes.
    asked: dict[bytes, tuple[float, int]] = field(default_factory=dict[bytes, tuple[float, int]])
    asked_bytes: int = 0
    last_answer_at: float = 0.0
    received_bytes: float = 0.0  # bytes received in `took_s`, with decay
    took_s: float = 0.0
    least_s: float = 0.0  # the shortest time of a piece; 0: none arrived
    rests_until: float = 0.0
    strikes: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second; 0: unknown."""
        return self.received_bytes / self.took_s if self.took_s > 0 else 0.0

    def has_room(self, now: float) -> bool:
        """Whether more pieces may be requested from the source."""
        most = min(MAX_BYTES, max(FIRST_BYTES, 2 * self.rate * max(HORIZON_S, self.least_s)))
        return self.rests_until <= now and self.asked_bytes < most and len(self.asked) < MAX_PIECES


class FetchPlan(Generic[Source]):
    """Decides which piece is requested from which source: a state machine without clock, sockets and files.

    Its methods report events with the time in seconds, and `asks` returns the next requests. Each source has as many
    bytes under way as it sends in half a second: so a fast source never waits for requests, and a slow one delays few
    pieces. Pieces that few sources have are requested first.

    Args:
        pieces: digest -> bytes, in the order in which they are wanted.

    Attributes:
        left: pieces that are still needed, digest -> bytes.
        done_bytes: bytes of the pieces that have arrived.
        sources: the sources that are not left out.
    """

    def __init__(self, pieces: Mapping[bytes, int]) -> None:
        self.left = dict(pieces)
        self.done_bytes = 0
        self.sources: dict[Source, _SourceState] = {}
        self._excluded: set[Source] = set()
        self._holders: Counter[bytes] = Counter()
        self._askers: dict[bytes, set[Source]] = {}  # the sources from which a piece is under way
        self._queues_are_old = False

    @property
    def is_done(self) -> bool:
        return not self.left

    def add_source(self, source: Source, held: Collection[bytes]) -> None:
        """Adds a source with these pieces, or updates its pieces. A source that was left out stays out."""
        if source in self._excluded:
            return
        state = self.sources.setdefault(source, _SourceState())
        self._holders.subtract(state.held)
        state.held = self.left.keys() & set(held)
        self._holders.update(state.held)
        self._queues_are_old = True

    def asks(self, now: float) -> list[tuple[Source, bytes]]:
        """The requests to send now."""
        self._give_up_silent(now)
        if self._queues_are_old:
            self._queues_are_old = False
            order = list(self.left)
            order.reverse()
            order.sort(key=lambda name: -self._holders[name])
            for state in self.sources.values():
                state.queue = [name for name in order if name in state.held]
        asks: list[tuple[Source, bytes]] = []
        free = [source for source, state in self.sources.items() if state.has_room(now)]
        while free:  # round robin, so that the first source does not get all requests
            for source in list(free):
                state = self.sources[source]
                name = self._next_piece(state) or self._slow(source, state, now)
                if name is None:
                    free.remove(source)
                    continue
                if not state.asked:
                    state.last_answer_at = now
                state.asked[name] = now, self.left[name]
                state.asked_bytes += self.left[name]
                self._askers.setdefault(name, set()).add(source)
                asks.append((source, name))
                if not state.has_room(now):
                    free.remove(source)
        return asks

    def arrived(self, source: Source, name: bytes, now: float) -> bool:
        """Records a verified piece; returns False if it is no longer needed."""
        state = self.sources.get(source)
        if state is not None and name in state.asked:
            since, size = state.asked[name]
            took = now - since
            state.least_s = min(state.least_s or took, took)
            state.received_bytes = state.received_bytes * _FORGET + size
            state.took_s = state.took_s * _FORGET + max(now - max(state.last_answer_at, since), 1e-6)
            state.last_answer_at, state.strikes = now, 0
        for other in list(self._askers.get(name, ())):
            self._release_pieces(other, name)  # copies from other sources are wasted, and no longer awaited
        size = self.left.pop(name, 0)
        self.done_bytes += size
        return size > 0

    def refused(self, source: Source, name: bytes, now: float) -> None:
        """Records that a source lacks a piece that it had announced."""
        state = self.sources.get(source)
        if state is not None and name in state.asked:
            state.last_answer_at = now
            state.held.discard(name)
            self._holders[name] -= 1
            self._release_pieces(source, name)
            self._queues_are_old = True

    def busy(self, source: Source, name: bytes, now: float) -> None:
        """Records that a source is busy and sends nothing for some time."""
        state = self.sources.get(source)
        if state is not None and name in state.asked:
            state.last_answer_at, state.rests_until = now, now + BUSY_S
            self._release_pieces(source, name)
            self._queues_are_old = True

    def lost(self, source: Source) -> None:
        """Removes a source that is gone; it may be added again."""
        state = self.sources.get(source)
        if state is not None:
            for name in list(state.asked):
                self._release_pieces(source, name)
            self._holders.subtract(state.held)
            del self.sources[source]
            self._queues_are_old = True

    def exclude(self, source: Source) -> None:
        """Leaves out a source that has sent wrong data: nothing more is requested from it."""
        self.lost(source)
        self._excluded.add(source)

    def is_stuck(self, now: float) -> bool:
        """Whether nothing is under way, and no source has any of the missing pieces."""
        self._give_up_silent(now)
        if self.is_done or any(state.asked for state in self.sources.values()):
            return False
        return not any(name in self.left for state in self.sources.values() for name in state.held)

    def _give_up_silent(self, now: float) -> None:
        for source, state in list(self.sources.items()):
            if state.asked and now - state.last_answer_at > SOURCE_SILENT_S:
                for name in list(state.asked):
                    self._release_pieces(source, name)
                self._queues_are_old = True
                state.strikes += 1
                state.rests_until = now + REST_S
                if state.strikes >= MAX_STRIKES:
                    self.exclude(source)

    def _next_piece(self, state: _SourceState) -> bytes | None:
        """The next piece of the source's queue that is under way from no source."""
        while state.queue:
            name = state.queue.pop()
            if name in self.left and name not in self._askers:
                return name
        return None

    def _slow(self, source: Source, state: _SourceState, now: float) -> bytes | None:
        """A piece that is slow to arrive from another source, for an idle source."""
        if state.asked or not state.rate:
            return None
        for name, askers in self._askers.items():
            if len(askers) == 1 and source not in askers and name in state.held:
                since, size = self.sources[next(iter(askers))].asked[name]
                if now - since > max(SLOW_S, 3 * size / state.rate):
                    return name
        return None

    def _release_pieces(self, source: Source, name: bytes) -> None:
        state = self.sources[source]
        state.asked_bytes -= state.asked.pop(name)[1]
        self._askers[name].discard(source)
        if not self._askers[name]:
            del self._askers[name]


class HubPieces:
    """Reads the pieces of a manifest from the files of a repository. Several threads may call `read`. store: the files
    of the repository, whose headers equal the manifest (see `splitnet.checkpoint.transfer.manifest_search`)."""

    at_once: Final = 16  # concurrent requests

    def __init__(self, manifest: Manifest, store: TensorStore, revision: str | None = None) -> None:
        self.store = store
        self._revision = revision
        self._pieces = HeldPieces(manifest, store)

    def download_piece(self, name: bytes) -> bytes:
        """Reads a piece, which the caller checks. Raises ModelNotFound: the hub refuses the piece. Exceptions of the
        HTTP library: the hub does not answer."""
        file, offset, size = self._pieces.where(int(self._pieces.slots_of(name)[0]))
        if self.store.local_file(file) is not None:  # downloaded before
            with self.store.open_file(file) as opened:
                opened.seek(offset)
                return opened.read(size)
        url = hf_hub_url(self.store.source, file, revision=self._revision)
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", url, headers=headers, timeout=HUB_TIMEOUT_S, follow_redirects=True
        ) as response:
            if response.is_error:
                response.read()  # the body has the reason
            hf_raise_for_status(response)
            if response.status_code != 206:  # the response is the whole file, and its body is not read
                raise ModelNotFound(f"the hub does not support range requests for {file}")
            data = response.read()
        if len(data) != size:
            raise ModelNotFound(f"the hub does not support range requests for {file}")
        return data


@dataclass(frozen=True)
class HubAnswer:
    """A piece from the hub, or the error."""

    name: bytes
    data: bytes
    error: str = ""


class PeerQuestions(AbstractContextManager["PeerQuestions"]):
    """Sends questions to peers and receives their answers; use it in a `with`. `answers`: one answer to each open
    question; unsolicited answers are dropped."""

    def __init__(self, identity: Identity, swarm: OpenSwarm = OPEN) -> None:
        self.swarm = swarm
        self.answers: queue.SimpleQueue[tuple[Endpoint | str, Message | HubAnswer]] = queue.SimpleQueue()
        self._numbers = count(1)
        self._open: dict[int, Endpoint] = {}  # the peer that was asked, by the number of the question
        self._links = Links(identity)
        self._links.on_answer = self._answered

    def __exit__(self, *_: object) -> None:
        self._links.close()

    def ask_peer(self, peer: Endpoint, kind: WeightsKind, name: bytes, offset: int = 0) -> int:
        """Sends a question; returns its number."""
        number = next(self._numbers)
        self._open[number] = peer
        placed = name if kind is WeightsKind.PAGE else bytes.fromhex(self.swarm.place(name.hex()))
        self._links.send(peer, AskWeights(number, kind, placed, offset, MAX_PART_BYTES))
        return number

    def answer_of(self, peer: Endpoint, question: Callable[[int], Message], within_s: float) -> Message | None:
        """Sends a question with a number, and waits for its answer; None: the peer is gone, or silent for `within_s`
        seconds. For one thread without other open questions."""
        number = next(self._numbers)
        self._open[number] = peer
        self._links.send(peer, question(number))
        until = time.monotonic() + within_s
        while time.monotonic() < until and not self.is_gone(peer):
            with suppress(queue.Empty):
                _, answer = self.answers.get(timeout=TICK_S)
                if getattr(answer, "number", 0) == number and not isinstance(answer, HubAnswer):
                    return answer
        self.forget_question(number)
        return None

    def forget_question(self, number: int) -> None:
        """Closes a question: its answer will be dropped."""
        self._open.pop(number, None)

    def is_gone(self, peer: Endpoint) -> bool:
        """Whether no link to a peer can be established."""
        state = self._links.link_state(peer)
        return state is LinkState.DOWN or state.is_final

    def _answered(self, source: Endpoint, message: Message) -> None:
        """Called in the thread of the links."""
        number = getattr(message, "number", 0)
        if self._open.get(number) == source:
            del self._open[number]
            self.answers.put((source, message))


@dataclass
class Fetched:
    """Bytes that arrived, by source; bytes `wasted` because they were duplicates or corrupt; sources that were left
    out."""

    by_source: dict[str, int] = field(default_factory=dict[str, int])
    wasted: int = 0
    left_out: list[str] = field(default_factory=list[str])


@dataclass(eq=False)
class Fetcher:
    """Fetches missing pieces into a folder. Use `fetch` as `WeightFolder.fetch`."""

    folder: WeightFolder
    find_peers: Callable[[], Sequence[Endpoint]]  # looks up the peers that may have pieces
    identity: Identity
    swarm: OpenSwarm = OPEN
    hub: HubPieces | None = None  # set if the model is on the hub
    # Called with the progress; an exception that it raises ends the fetch.
    report: Report = lambda stage, done, total: None
    fetched: Fetched = field(default_factory=Fetched)  # what has arrived

    def fetch(self, missing: Mapping[bytes, int]) -> None:
        """Fetches these pieces: digest -> bytes. Raises ModelNotFound: no source has some of them; WrongSwarm: the hub
        has other weights; SplitnetError: the pieces cannot be written."""
        pool = ThreadPoolExecutor(HubPieces.at_once)  # starts no threads before they are needed
        try:
            with PeerQuestions(self.identity, self.swarm) as asking:
                _Fetch(self, asking, pool, missing).fetch_all()
        finally:
            pool.shutdown(cancel_futures=True)

    def piece_holders(self) -> Sequence[Endpoint]:
        """The peers that may have pieces; empty while the directory does not answer."""
        try:
            return self.find_peers()
        except DirectoryError as error:
            log.info("no other peers are known now: %s", error)
            return ()


class _Fetch:
    """One call of `Fetcher.fetch`."""

    def __init__(
        self, fetcher: Fetcher, asking: PeerQuestions, pool: ThreadPoolExecutor, missing: Mapping[bytes, int]
    ) -> None:
        self._fetcher = fetcher
        self._folder = fetcher.folder
        self._asking = asking
        self._pool = pool
        self._missing = missing
        self._total = sum(missing.values())
        self._plan: FetchPlan[Endpoint | str] = FetchPlan(missing)
        self._names = list(missing)
        slots = [self._folder.slots_of(name) for name in missing]
        self._slots = np.concatenate(slots)  # of the missing pieces, in the manifest
        self._owners = np.repeat(np.arange(len(slots)), list(map(len, slots)))  # for each slot, the index in `_names`
        # By number of the question: peer and piece; an empty piece asks for the peer's list of pieces.
        self._asked: dict[int, tuple[Endpoint, bytes]] = {}
        self._known: set[Endpoint] = set()
        self._reasons: dict[Endpoint, str] = {}
        self._hub_errors = 0

    def fetch_all(self) -> None:
        if self._fetcher.hub is not None:
            self._plan.add_source(HUB, list(self._missing))
        stuck_since: float | None = None
        self._ask_what_is_held(self._fetcher.piece_holders())
        found: Future[Sequence[Endpoint]] = Future()
        look_at = time.monotonic() + LOOK_S
        begin_at = time.monotonic() + FIRST_LISTS_S
        while not self._plan.is_done:
            now = time.monotonic()
            if found.done():  # the look-up has a thread, because the directory may be slow
                self._ask_what_is_held(found.result())
                look_at = now + LOOK_S
                found = Future[Sequence[Endpoint]]()
            elif now >= look_at:
                look_at = math.inf
                found = self._pool.submit(self._fetcher.piece_holders)
            if now >= begin_at or all(name for _, name in self._asked.values()):
                begin_at = now
                for source, name in self._plan.asks(now):
                    self._ask_for_piece(source, name)
            self._report()
            self._take_answers()
            self._drop_gone()
            now = time.monotonic()
            if not self._plan.is_stuck(now):
                stuck_since = None
            elif stuck_since is None:
                stuck_since = now
            elif now - stuck_since > WAIT_LIMIT_S:
                raise ModelNotFound(self._explanation())
        self._report()

    def _ask_what_is_held(self, peers: Sequence[Endpoint]) -> None:
        """Asks new peers for their lists of pieces; asks known peers again while no source has a missing piece."""
        stuck = self._plan.is_stuck(time.monotonic())
        for peer in peers:
            if peer_address(peer) in self._fetcher.fetched.left_out or (peer in self._known and not stuck):
                continue
            self._known.add(peer)
            number = self._asking.ask_peer(peer, WeightsKind.HELD, bytes.fromhex(self._folder.manifest.fingerprint))
            self._asked[number] = peer, b""

    def _ask_for_piece(self, source: Endpoint | str, name: bytes) -> None:
        if isinstance(source, Endpoint):
            self._asked[self._asking.ask_peer(source, WeightsKind.PIECE, name)] = source, name
        else:
            assert self._fetcher.hub is not None
            self._pool.submit(self._ask_hub, self._fetcher.hub, name)

    def _ask_hub(self, hub: HubPieces, name: bytes) -> None:
        try:
            self._asking.answers.put((HUB, HubAnswer(name, hub.download_piece(name))))
        except Exception as error:  # the HTTP library raises exceptions of many types
            self._asking.answers.put((HUB, HubAnswer(name, b"", str(error) or type(error).__name__)))

    def _take_answers(self) -> None:
        """Handles the answers that have arrived."""
        try:
            _, message = self._asking.answers.get(timeout=TICK_S)
            while True:
                self._heard(message)
                _, message = self._asking.answers.get_nowait()
        except queue.Empty:
            return

    def _heard(self, message: Message | HubAnswer) -> None:
        now = time.monotonic()
        if isinstance(message, HubAnswer):
            self._heard_of_hub(message, now)
            return
        asked = self._asked.pop(getattr(message, "number", 0), None)
        if asked is None:
            return
        peer, name = asked
        if isinstance(message, Failure):
            if not name:
                self._reasons[peer] = message.text
            elif message.code == FailureCode.BUSY:
                self._plan.busy(peer, name, now)
            else:
                self._plan.refused(peer, name, now)
        elif isinstance(message, WeightsPart) and name:
            self._piece(peer, name, message.payload, now)
        elif isinstance(message, WeightsPart):
            told = np.frombuffer(message.payload, np.uint8)
            bits = np.zeros(-(-len(self._folder) // 8), np.uint8)
            bits[: len(told)] = told[: len(bits)]
            here = bits[self._slots >> 3] >> (self._slots & 7).astype(np.uint8) & 1
            held = [self._names[owner] for owner in np.unique(self._owners[here != 0]).tolist()]
            self._plan.add_source(peer, held)

    def _heard_of_hub(self, answer: HubAnswer, now: float) -> None:
        if not answer.error:
            self._hub_errors = 0
            self._piece(HUB, answer.name, answer.data, now)
            return
        self._hub_errors += 1
        self._plan.busy(HUB, answer.name, now)
        if self._hub_errors > MAX_HUB_ERRORS:
            log.warning("the hub gives no weights (%s): it is left out", answer.error)
            self._plan.exclude(HUB)

    def _piece(self, source: Endpoint | str, name: bytes, data: bytes | memoryview, now: float) -> None:
        fetched = self._fetcher.fetched
        called = source if isinstance(source, str) else peer_address(source)
        if called in fetched.left_out:
            return
        if len(data) != self._missing[name] or digest(data) != name:
            if source == HUB:
                assert self._fetcher.hub is not None
                forget_manifest(self._fetcher.hub.store.commit)  # so the next start does not trust this manifest
                raise WrongSwarm(
                    "the hub has other weights of this model than the peers of this swarm: they serve another "
                    "model with its name; join another swarm, or give --model-id"
                )
            log.warning("%s has sent a corrupt piece of weights: it is left out", called)
            fetched.left_out.append(called)
            fetched.wasted += len(data)
            self._plan.exclude(source)
            return
        if name in self._plan.left:
            self._folder.write_piece(name, data)
        if self._plan.arrived(source, name, now):
            fetched.by_source[called] = fetched.by_source.get(called, 0) + len(data)
        else:
            fetched.wasted += len(data)

    def _drop_gone(self) -> None:
        for source in list(self._plan.sources):
            if isinstance(source, Endpoint) and self._asking.is_gone(source):
                log.info("%s, a source of weights, is gone", source.address)
                self._plan.lost(source)
                self._known.discard(source)

    def _report(self) -> None:
        hub = [HUB] if HUB in self._plan.sources else []
        peers = len(self._plan.sources) - len(hub)
        words = [f"{peers} peer{'' if peers == 1 else 's'}", *hub] if peers or not hub else hub
        self._fetcher.report(f"fetch weights; {' and '.join(words)}", self._plan.done_bytes, self._total)

    def _explanation(self) -> str:
        lacking = sum(self._plan.left.values())
        reasons = [f"{peer.address}: {reason}" for peer, reason in self._reasons.items()]
        reasons += [f"{called}: sent a corrupt piece" for called in self._fetcher.fetched.left_out]
        asked = "; ".join(reasons) or (
            f"{len(self._known)} peers were asked" if self._known else "no other peer is known"
        )
        return (
            f"{lacking / 2**20:.1f} MiB of the weights are at no source ({asked}): wait for peers that "
            "serve these blocks with --share-weights, or download the model"
        )
