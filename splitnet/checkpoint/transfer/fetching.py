"""Gets pieces of weights from peers and from the hub, several at once."""

from __future__ import annotations

import logging
import math
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import numpy as np
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from splitnet.checkpoint.store import TensorStore
from splitnet.checkpoint.transfer.hashing import forget_manifest
from splitnet.checkpoint.transfer.held import HeldPieces, WeightFolder
from splitnet.checkpoint.transfer.manifest import Manifest, digest
from splitnet.checkpoint.transfer.plan import FetchPlan
from splitnet.errors import DirectoryError, ModelNotFound, WrongSwarm
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OPEN, OpenSwarm
from splitnet.swarm.links import Links
from splitnet.transport.addresses import peer_address
from splitnet.wire.endpoints import Endpoint, LinkState
from splitnet.wire.messages import MAX_PART_BYTES, AskWeights, Failure, FailureCode, Message, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

LOOK_S: Final = 5.0
"""How often others are looked for while pieces are missing."""
WAIT_LIMIT_S: Final = 30.0
"""How long others are waited for while nobody has what is missing."""
GATHER_S: Final = 0.5
"""How long what peers have is waited for, so that it is asked of all of them."""
TICK_S: Final = 0.1
MAX_HUB_ERRORS: Final = 32
"""One after the other; then the hub is left out."""

HUB_TIMEOUT_S: Final = 30.0

HUB: Final = "the hub"
Report = Callable[[str, int, int], None]
FindPeers = Callable[[], Sequence[Endpoint]]


class HubPieces:
    """Where the pieces of a manifest stand in the files of a repository. `read` may be called by several threads.

    Args:
        manifest: of the model.
        store: of the repository, whose headers say the same (see `splitnet.checkpoint.transfer.matching`).
        revision: of the repository.

    Attributes:
        at_once: requests at the same time.
    """

    at_once: Final = 16

    def __init__(self, manifest: Manifest, store: TensorStore, revision: str | None = None) -> None:
        self._store = store
        self._repository = store.source
        self._revision = revision
        self._pieces = HeldPieces(manifest, store)

    def differs(self) -> None:
        """Says that the repository has other weights than the manifest, which is not believed at the next start."""
        forget_manifest(self._store.commit)

    def read(self, name: bytes) -> bytes:
        """A piece, which the caller checks.

        Raises:
            ModelNotFound: the hub does not give it. Exceptions of the HTTP library: it does not answer.
        """
        file, offset, size = self._pieces.where(int(self._pieces.slots_of(name)[0]))
        if self._store.local_file(file) is not None:  # downloaded before
            with self._store.open_file(file) as opened:
                opened.seek(offset)
                return opened.read(size)
        url = hf_hub_url(self._repository, file, revision=self._revision)
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


class Asking:
    """Questions to peers, and their answers. Close it when done.

    Attributes:
        answers: those to questions that are open, one to each; what nobody asked for is dropped as it comes.
    """

    def __init__(self, identity: Identity, swarm: OpenSwarm = OPEN) -> None:
        self.swarm = swarm
        self.answers: queue.SimpleQueue[tuple[Endpoint | str, Message | HubAnswer]] = queue.SimpleQueue()
        self._numbers = count(1)
        self._open: dict[int, Endpoint] = {}
        """Who was asked, by the number of the question."""
        self._links = Links(identity)
        self._links.on_answer = self._answered

    def close(self) -> None:
        self._links.close()

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, peer: Endpoint, kind: WeightsKind, name: bytes, offset: int = 0) -> int:
        """Sends a question; returns its number."""
        number = next(self._numbers)
        self._open[number] = peer
        placed = bytes.fromhex(self.swarm.place(name.hex()))
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
    """Bytes that came, by source, and those that left out a source.

    Attributes:
        wasted: bytes that came twice or were corrupt.
    """

    by_source: dict[str, int] = field(default_factory=dict[str, int])
    wasted: int = 0
    left_out: list[str] = field(default_factory=list[str])


class Fetcher:
    """Fills a folder. Use `fetch` as `WeightFolder.fetch`.

    Args:
        folder: to fill.
        peers: looks up who may have pieces.
        identity: to show them.
        swarm: the key of a closed one.
        hub: where the model is there too.
        report: told what is going on; what it raises ends a fetch.

    Attributes:
        fetched: what has come.
        wait_limit_s: how long others are waited for while nobody has what is missing.
    """

    def __init__(
        self,
        folder: WeightFolder,
        peers: FindPeers,
        identity: Identity,
        swarm: OpenSwarm = OPEN,
        hub: HubPieces | None = None,
        report: Report = lambda stage, done, total: None,
    ) -> None:
        self.fetched = Fetched()
        self.wait_limit_s = WAIT_LIMIT_S
        self.report = report
        self._folder = folder
        self._peers = peers
        self._identity = identity
        self._swarm = swarm
        self._hub = hub

    def fetch(self, missing: Mapping[bytes, int]) -> None:
        """Gets these pieces: digest -> bytes.

        Raises:
            ModelNotFound: nobody has some of them.
            WrongSwarm: the hub has others.
            SplitnetError: they cannot be kept.
        """
        pool = ThreadPoolExecutor(HubPieces.at_once)  # which has no threads before they are needed
        try:
            with Asking(self._identity, self._swarm) as asking:
                _Fetch(self, asking, pool, missing).run()
        finally:
            pool.shutdown(cancel_futures=True)

    def peers(self) -> Sequence[Endpoint]:
        """Who may have pieces; nobody while the directory is silent."""
        try:
            return self._peers()
        except DirectoryError as error:
            log.info("no other peers are known now: %s", error)
            return ()


class _Fetch:
    """One call of `Fetcher.fetch`."""

    def __init__(
        self, fetcher: Fetcher, asking: Asking, pool: ThreadPoolExecutor, missing: Mapping[bytes, int]
    ) -> None:
        self._fetcher = fetcher
        self._folder = fetcher._folder
        self._asking = asking
        self._pool = pool
        self._missing = missing
        self._total = sum(missing.values())
        self._plan: FetchPlan[Endpoint | str] = FetchPlan(missing)
        self._names = list(missing)
        slots = [self._folder.slots_of(name) for name in missing]
        self._slots = np.concatenate(slots)
        """Where what is missing stands in the manifest."""
        self._owners = np.repeat(np.arange(len(slots)), list(map(len, slots)))
        """Which of `_names` it is."""
        self._asked: dict[int, tuple[Endpoint, bytes]] = {}
        """By number: whom, and what piece; empty: what it has."""
        self._known: set[Endpoint] = set()
        self._reasons: dict[Endpoint, str] = {}
        self._hub_errors = 0

    def run(self) -> None:
        if self._fetcher._hub is not None:
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
            self._take(TICK_S)
            self._drop_gone()
            now = time.monotonic()
            if not self._plan.is_stuck(now):
                stuck_since = None
            elif stuck_since is None:
                stuck_since = now
            elif now - stuck_since > self._fetcher.wait_limit_s:
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
            assert self._fetcher._hub is not None
            self._pool.submit(self._ask_hub, self._fetcher._hub, name)

    def _ask_hub(self, hub: HubPieces, name: bytes) -> None:
        try:
            self._asking.answers.put((HUB, HubAnswer(name, hub.read(name))))
        except Exception as error:  # of the HTTP library
            self._asking.answers.put((HUB, HubAnswer(name, b"", str(error) or type(error).__name__)))

    def _take(self, wait_s: float) -> None:
        """Takes in what has come."""
        try:
            source, message = self._asking.answers.get(timeout=wait_s)
            while True:
                self._heard(source, message)
                source, message = self._asking.answers.get_nowait()
        except queue.Empty:
            return

    def _heard(self, source: Endpoint | str, message: Message | HubAnswer) -> None:
        now = time.monotonic()
        if isinstance(message, HubAnswer):
            self._heard_of_hub(message, now)
            return
        asked = self._asked.get(getattr(message, "number", 0))
        if asked is None or asked[0] != source:
            return
        del self._asked[getattr(message, "number", 0)]
        peer, name = asked
        if isinstance(message, Failure):
            self._refused(peer, name, message, now)
        elif isinstance(message, WeightsPart) and name:
            self._piece(peer, peer_address(peer), name, message.payload, now)
        elif isinstance(message, WeightsPart):
            told = np.frombuffer(message.payload, np.uint8)
            bits = np.zeros(-(-len(self._folder) // 8), np.uint8)
            bits[: len(told)] = told[: len(bits)]
            here = bits[self._slots >> 3] >> (self._slots & 7).astype(np.uint8) & 1
            held = [self._names[owner] for owner in np.unique(self._owners[here != 0]).tolist()]
            self._plan.add(peer, held)

    def _refused(self, peer: Endpoint, name: bytes, message: Failure, now: float) -> None:
        if not name:
            self._reasons[peer] = message.text
        elif message.code == FailureCode.BUSY:
            self._plan.busy(peer, name, now)
        else:
            self._plan.refused(peer, name, now)

    def _heard_of_hub(self, answer: HubAnswer, now: float) -> None:
        if not answer.error:
            self._hub_errors = 0
            self._piece(HUB, HUB, answer.name, answer.data, now)
            return
        self._hub_errors += 1
        self._plan.busy(HUB, answer.name, now)
        if self._hub_errors > MAX_HUB_ERRORS:
            log.warning("the hub gives no weights (%s): it is left out", answer.error)
            self._plan.exclude(HUB)

    def _piece(self, source: Endpoint | str, called: str, name: bytes, data: bytes | memoryview, now: float) -> None:
        fetched = self._fetcher.fetched
        if called in fetched.left_out:
            return
        if len(data) != self._missing[name] or digest(data) != name:
            if source == HUB:
                assert self._fetcher._hub is not None
                self._fetcher._hub.differs()
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
        sources = len(self._plan.sources) - (HUB in self._plan.sources)
        words = [f"{sources} peer{'' if sources == 1 else 's'}"] if sources or HUB not in self._plan.sources else []
        words += [HUB] if HUB in self._plan.sources else []
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
