"""Gets pieces of weights from peers and from the hub, several at once, and plans which is asked of which source."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Generic, TypeVar

import numpy as np
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from scheduler.liveness import SOURCE_SILENT_S
from splitnet.checkpoint.store import TensorStore
from splitnet.checkpoint.transfer.hashing import forget_manifest
from splitnet.checkpoint.transfer.held import HeldPieces, WeightFolder
from splitnet.checkpoint.transfer.manifest import Manifest, digest
from splitnet.errors import DirectoryError, ModelNotFound, WrongSwarm
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.swarm.links import Links
from splitnet.transport.addresses import peer_address
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import MAX_PART_BYTES, AskWeights, Failure, FailureCode, Message, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

LOOK_S: Final = 5.0  # how often others are looked for while pieces are missing
WAIT_LIMIT_S: Final = 30.0  # how long others are waited for while nobody has what is missing
GATHER_S: Final = 0.5  # how long what peers have is waited for, so that it is asked of all of them
TICK_S: Final = 0.1
MAX_HUB_ERRORS: Final = 32  # one after the other; then the hub is left out
HUB_TIMEOUT_S: Final = 30.0
FIRST_BYTES: Final = 2 << 20  # that are asked of a source that has brought nothing yet
MAX_BYTES: Final = 32 << 20
MAX_PIECES: Final = 48  # under way from one source
HORIZON_S: Final = 0.25
"""Twice that of what a source brings is under way from it; twice the least time that a piece took, if that is more."""
REST_S: Final = 10.0  # a source that was silent is asked again after that
BUSY_S: Final = 1.0  # so is one that says that it is busy, after that
MAX_STRIKES: Final = 3  # silences after which a source is left out
SLOW_S: Final = 5.0
"""A piece that is under way for so long, and long for who has nothing else to do, is asked of that one, too."""
_FORGET: Final = 0.9  # what stays of earlier observations with each piece

HUB: Final = "the hub"
Report = Callable[[str, int, int], None]


Source = TypeVar("Source", bound=Hashable)


@dataclass
class _State:
    """One source."""

    held: set[bytes] = field(default_factory=set[bytes])  # pieces that it has and that are needed
    # What to ask of it, the next at the end; some of it may be asked of others meanwhile.
    queue: list[bytes] = field(default_factory=list[bytes])
    # What is under way from it: since when, and bytes.
    asked: dict[bytes, tuple[float, int]] = field(default_factory=dict[bytes, tuple[float, int]])
    asked_bytes: int = 0
    heard_at: float = 0.0
    brought: float = 0.0  # bytes, and in which time; older ones count less
    took_s: float = 0.0
    least_s: float = 0.0  # the shortest time that a piece took; 0: none came
    rests_until: float = 0.0
    strikes: int = 0

    @property
    def rate(self) -> float:
        """Bytes per second; 0: not known."""
        return self.brought / self.took_s if self.took_s > 0 else 0.0

    def has_room(self, now: float) -> bool:
        """Whether more may be asked of it."""
        most = min(MAX_BYTES, max(FIRST_BYTES, 2 * self.rate * max(HORIZON_S, self.least_s)))
        return self.rests_until <= now and self.asked_bytes < most and len(self.asked) < MAX_PIECES


class FetchPlan(Generic[Source]):
    """Which piece is asked of which source: a state machine without clock, sockets and files.

    It is told what happens, with the time in seconds, and answers with what to ask. Every source has as many bytes
    under way as it brings in half a second: so a fast one never waits for questions, and a slow one holds up few
    pieces. What few sources have is asked for first.

    Args:
        pieces: digest -> bytes, in the order in which they are wanted.

    Attributes:
        left: pieces that are still needed, likewise.
        done_bytes: of those that have come.
        sources: those that are not left out.
    """

    def __init__(self, pieces: Mapping[bytes, int]) -> None:
        self.left = dict(pieces)
        self.done_bytes = 0
        self.sources: dict[Source, _State] = {}
        self._excluded: set[Source] = set()
        self._holders: Counter[bytes] = Counter()
        self._askers: dict[bytes, set[Source]] = {}  # of whom a piece is asked now
        self._queues_are_old = False

    @property
    def is_done(self) -> bool:
        return not self.left

    def add(self, source: Source, held: Collection[bytes]) -> None:
        """A source that has these pieces; again, if it has others now. One that was left out stays out."""
        if source in self._excluded:
            return
        state = self.sources.setdefault(source, _State())
        self._holders.subtract(state.held)
        state.held = self.left.keys() & set(held)
        self._holders.update(state.held)
        self._queues_are_old = True

    def asks(self, now: float) -> list[tuple[Source, bytes]]:
        """What to ask now, of whom."""
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
        while free:  # in turns, so that the first does not get all there is
            for source in list(free):
                state = self.sources[source]
                name = self._next(state) or self._slow(source, state, now)
                if name is None:
                    free.remove(source)
                    continue
                if not state.asked:
                    state.heard_at = now
                state.asked[name] = now, self.left[name]
                state.asked_bytes += self.left[name]
                self._askers.setdefault(name, set()).add(source)
                asks.append((source, name))
                if not state.has_room(now):
                    free.remove(source)
        return asks

    def arrived(self, source: Source, name: bytes, now: float) -> bool:
        """A piece has come, and was verified; False: it is not needed any more."""
        state = self.sources.get(source)
        if state is not None and name in state.asked:
            since, size = state.asked[name]
            took = now - since
            state.least_s = min(state.least_s or took, took)
            state.brought = state.brought * _FORGET + size
            state.took_s = state.took_s * _FORGET + max(now - max(state.heard_at, since), 1e-6)
            state.heard_at, state.strikes = now, 0
        for other in list(self._askers.get(name, ())):
            self._release(other, name)  # what others send of it is waste, and is not waited for
        size = self.left.pop(name, 0)
        self.done_bytes += size
        return size > 0

    def refused(self, source: Source, name: bytes, now: float) -> None:
        """A source has not got a piece after all."""
        state = self.sources.get(source)
        if state is not None and name in state.asked:
            state.heard_at = now
            state.held.discard(name)
            self._holders[name] -= 1
            self._release(source, name)
            self._queues_are_old = True

    def busy(self, source: Source, name: bytes, now: float) -> None:
        """A source gives nothing now."""
        state = self.sources.get(source)
        if state is not None and name in state.asked:
            state.heard_at, state.rests_until = now, now + BUSY_S
            self._release(source, name)
            self._queues_are_old = True

    def lost(self, source: Source) -> None:
        """A source is gone; it may be added again."""
        state = self.sources.get(source)
        if state is not None:
            for name in list(state.asked):
                self._release(source, name)
            self._holders.subtract(state.held)
            del self.sources[source]
            self._queues_are_old = True

    def exclude(self, source: Source) -> None:
        """A source has given what is wrong: it is asked for nothing any more."""
        self.lost(source)
        self._excluded.add(source)

    def is_stuck(self, now: float) -> bool:
        """Nothing is under way, and nobody has any of what is left."""
        self._give_up_silent(now)
        if self.is_done or any(state.asked for state in self.sources.values()):
            return False
        return not any(name in self.left for state in self.sources.values() for name in state.held)

    def _give_up_silent(self, now: float) -> None:
        for source, state in list(self.sources.items()):
            if state.asked and now - state.heard_at > SOURCE_SILENT_S:
                for name in list(state.asked):
                    self._release(source, name)
                self._queues_are_old = True
                state.strikes += 1
                state.rests_until = now + REST_S
                if state.strikes >= MAX_STRIKES:
                    self.exclude(source)

    def _next(self, state: _State) -> bytes | None:
        """The next piece that nobody is asked for."""
        while state.queue:
            name = state.queue.pop()
            if name in self.left and name not in self._askers:
                return name
        return None

    def _slow(self, source: Source, state: _State, now: float) -> bytes | None:
        """A piece that another source is slow to bring, for one that has nothing else to do."""
        if state.asked or not state.rate:
            return None
        for name, askers in self._askers.items():
            if len(askers) == 1 and source not in askers and name in state.held:
                since, size = self.sources[next(iter(askers))].asked[name]
                if now - since > max(SLOW_S, 3 * size / state.rate):
                    return name
        return None

    def _release(self, source: Source, name: bytes) -> None:
        state = self.sources[source]
        state.asked_bytes -= state.asked.pop(name)[1]
        self._askers[name].discard(source)
        if not self._askers[name]:
            del self._askers[name]


class HubPieces:
    """Where the pieces of a manifest stand in the files of a repository. `read` may be called by several threads.
    store: of the repository, whose headers say the same (see `splitnet.checkpoint.transfer.matching`)."""

    at_once: Final = 16  # requests at the same time

    def __init__(self, manifest: Manifest, store: TensorStore, revision: str | None = None) -> None:
        self.store = store
        self._revision = revision
        self._pieces = HeldPieces(manifest, store)

    def read(self, name: bytes) -> bytes:
        """A piece, which the caller checks. Raises ModelNotFound: the hub does not give it. Exceptions of the HTTP
        library: it does not answer."""
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
                response.read()  # which says why
            hf_raise_for_status(response)
            if response.status_code != 206:  # the whole file, of which nothing is read
                raise ModelNotFound(f"the hub does not give ranges of {file}")
            data = response.read()
        if len(data) != size:
            raise ModelNotFound(f"the hub does not give ranges of {file}")
        return data


@dataclass(frozen=True)
class HubAnswer:
    """A piece from the hub, or why it did not come."""

    name: bytes
    data: bytes
    error: str = ""


class Asking(AbstractContextManager["Asking"]):
    """Questions to peers, and their answers; use it in a `with`. `answers`: those to questions that are open, one to
    each; what nobody asked for is dropped as it comes."""

    def __init__(self, identity: Identity, swarm: OpenSwarm = OPEN) -> None:
        self.swarm = swarm
        self.answers: queue.SimpleQueue[tuple[Endpoint | str, Message | HubAnswer]] = queue.SimpleQueue()
        self._numbers = count(1)
        self._open: dict[int, Endpoint] = {}  # the peer that was asked, by the number of the question
        self._links = Links(identity)
        self._links.on_answer = self._answered

    def __exit__(self, *_: object) -> None:
        self._links.close()

    def ask(self, peer: Endpoint, kind: WeightsKind, name: bytes, offset: int = 0) -> int:
        """Sends a question; returns its number."""
        number = next(self._numbers)
        self._open[number] = peer
        placed = name if kind is WeightsKind.PAGE else bytes.fromhex(self.swarm.place(name.hex()))
        self._links.send(peer, AskWeights(number, kind, placed, offset, MAX_PART_BYTES))
        return number

    def forget(self, number: int) -> None:
        """Waits for the answer no longer."""
        self._open.pop(number, None)

    def is_gone(self, peer: Endpoint) -> bool:
        """Whether no link to it comes up."""
        state = self._links.state(peer)
        return state is LinkState.DOWN or state.is_final

    def _answered(self, source: Endpoint, message: Message) -> None:
        """In the thread of the links."""
        number = getattr(message, "number", 0)
        if self._open.get(number) == source:
            del self._open[number]
            self.answers.put((source, message))


@dataclass
class Fetched:
    """Bytes that came, by source; those that were `wasted`, as they came twice or were corrupt; sources left out."""

    by_source: dict[str, int] = field(default_factory=dict[str, int])
    wasted: int = 0
    left_out: list[str] = field(default_factory=list[str])


@dataclass(eq=False)
class Fetcher:
    """Fills a folder. Use `fetch` as `WeightFolder.fetch`."""

    folder: WeightFolder
    find_peers: Callable[[], Sequence[Endpoint]]  # looks up the peers that may have pieces
    identity: Identity
    swarm: OpenSwarm = OPEN
    hub: HubPieces | None = None  # where the model is there too
    report: Report = lambda stage, done, total: None  # told what is going on; what it raises ends a fetch
    fetched: Fetched = field(default_factory=Fetched)  # what has come

    def fetch(self, missing: Mapping[bytes, int]) -> None:
        """Gets these pieces: digest -> bytes. Raises ModelNotFound: nobody has some of them; WrongSwarm: the hub has
        others; SplitnetError: they cannot be kept."""
        pool = ThreadPoolExecutor(HubPieces.at_once)  # which has no threads before they are needed
        try:
            with Asking(self.identity, self.swarm) as asking:
                _Fetch(self, asking, pool, missing).run()
        finally:
            pool.shutdown(cancel_futures=True)

    def peers(self) -> Sequence[Endpoint]:
        """Who may have pieces; nobody while the directory is silent."""
        try:
            return self.find_peers()
        except DirectoryError as error:
            log.info("no other peers are known now: %s", error)
            return ()


class _Fetch:
    """One call of `Fetcher.fetch`."""

    def __init__(
        self, fetcher: Fetcher, asking: Asking, pool: ThreadPoolExecutor, missing: Mapping[bytes, int]
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
        self._slots = np.concatenate(slots)  # of what is missing, in the manifest
        self._owners = np.repeat(np.arange(len(slots)), list(map(len, slots)))  # which of `_names` each is
        self._asked: dict[int, tuple[Endpoint, bytes]] = {}  # by number: peer and piece; empty: what it has
        self._known: set[Endpoint] = set()
        self._reasons: dict[Endpoint, str] = {}
        self._hub_errors = 0

    def run(self) -> None:
        if self._fetcher.hub is not None:
            self._plan.add(HUB, list(self._missing))
        stuck_since: float | None = None
        self._meet(self._fetcher.peers())
        found: Future[Sequence[Endpoint]] = Future()
        look_at = time.monotonic() + LOOK_S
        begin_at = time.monotonic() + GATHER_S
        while not self._plan.is_done:
            now = time.monotonic()
            if found.done():  # the directory may be slow, and nothing else waits for it
                self._meet(found.result())
                look_at = now + LOOK_S
                found = Future[Sequence[Endpoint]]()
            elif now >= look_at:
                look_at = math.inf
                found = self._pool.submit(self._fetcher.peers)
            if now >= begin_at or all(name for _, name in self._asked.values()):
                begin_at = now
                for source, name in self._plan.asks(now):
                    self._ask(source, name)
            self._report()
            self._take()
            self._drop_gone()
            now = time.monotonic()
            if not self._plan.is_stuck(now):
                stuck_since = None
            elif stuck_since is None:
                stuck_since = now
            elif now - stuck_since > WAIT_LIMIT_S:
                raise ModelNotFound(self._explanation())
        self._report()

    def _meet(self, peers: Sequence[Endpoint]) -> None:
        """Asks others what they have; those that have something again while pieces are missing that nobody has."""
        stuck = self._plan.is_stuck(time.monotonic())
        for peer in peers:
            if peer_address(peer) in self._fetcher.fetched.left_out or (peer in self._known and not stuck):
                continue
            self._known.add(peer)
            number = self._asking.ask(peer, WeightsKind.HELD, bytes.fromhex(self._folder.manifest.fingerprint))
            self._asked[number] = peer, b""

    def _ask(self, source: Endpoint | str, name: bytes) -> None:
        if isinstance(source, Endpoint):
            self._asked[self._asking.ask(source, WeightsKind.PIECE, name)] = source, name
        else:
            assert self._fetcher.hub is not None
            self._pool.submit(self._ask_hub, self._fetcher.hub, name)

    def _ask_hub(self, hub: HubPieces, name: bytes) -> None:
        try:
            self._asking.answers.put((HUB, HubAnswer(name, hub.read(name))))
        except Exception as error:  # of the HTTP library
            self._asking.answers.put((HUB, HubAnswer(name, b"", str(error) or type(error).__name__)))

    def _take(self) -> None:
        """Takes in what has come."""
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
            self._plan.add(peer, held)

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
                forget_manifest(self._fetcher.hub.store.commit)  # it is not believed at the next start
                raise WrongSwarm(
                    "the hub has other weights of this model than the peers of this swarm say: they serve another "
                    "model by its name; join another swarm, or give --model-id"
                )
            log.warning("%s has sent a corrupt piece of weights: it is left out", called)
            fetched.left_out.append(called)
            fetched.wasted += len(data)
            self._plan.exclude(source)
            return
        if name in self._plan.left:
            self._folder.write(name, data)
        if self._plan.arrived(source, name, now):
            fetched.by_source[called] = fetched.by_source.get(called, 0) + len(data)
        else:
            fetched.wasted += len(data)

    def _drop_gone(self) -> None:
        for source in list(self._plan.sources):
            if isinstance(source, Endpoint) and self._asking.is_gone(source):
                log.info("%s is gone, which gave weights", source.address)
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
            f"{lacking / 2**20:.1f} MiB of the weights are at nobody who gives them ({asked}): wait for peers that "
            "serve these blocks with --share-weights, or download the model"
        )
