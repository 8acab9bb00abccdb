"""Which manifest is that of a model of which not all files are here."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from splitnet.checkpoint.store import Progress, TensorStore
from splitnet.checkpoint.transfer.fetching import TICK_S, Asking, HubAnswer, Report
from splitnet.checkpoint.transfer.hashing import hash_ranges
from splitnet.checkpoint.transfer.manifest import MAX_HEAD_BYTES, MAX_MANIFEST_BYTES, Manifest, digest
from splitnet.directory.interface import SwarmDirectory
from splitnet.errors import ModelNotFound, ProtocolError
from splitnet.security.identity import PublicKey
from splitnet.transport.addresses import check_peer_address, split_addresses
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import MAX_PART_BYTES, Failure, Message, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

MAX_ASKED: Final = 8  # peers that are asked for the manifest of one model
MAX_MODELS: Final = 8  # of one name that are asked about, as names are what anybody claims
NEXT_S: Final = 5.0  # after which another peer is asked, too, while one tells slowly
ANSWER_LIMIT_S: Final = 40.0
"""A peer tells slowly if it is not done by then, or will not be at its rate: peers share the link of this machine."""
ANSWER_S: Final = 10.0  # in which a peer answers
WHOLE_S: Final = 120.0  # in which it has told all
MAX_TOLD_BYTES: Final = MAX_MANIFEST_BYTES + MAX_HEAD_BYTES  # of manifests and heads that several peers are telling


def headers_differ(manifest: Manifest, store: TensorStore) -> str:
    """What in a manifest is other than in the config and the headers of files; empty: nothing."""
    here = {name: (place.stored, place.shape, place.nbytes) for name, place in store.places().items()}
    told = {one.name: (one.stored, one.shape, one.pieces.nbytes) for one in manifest.tensors}
    if here != told:
        return f"{len(here.items() ^ told.items())} tensors are others"
    if manifest.config != store.told_config():
        return "the config is another"
    return ""


def differs(manifest: Manifest, store: TensorStore, progress: Progress | None = None) -> str:
    """What in a manifest is other than in the files that are here, and in the headers of the others; empty: nothing."""
    if reason := headers_differ(manifest, store):
        return reason
    places = store.places()
    ranges: dict[str, list[tuple[int, int]]] = {}
    for place in places.values():
        if store.local_file(place.file) is not None:
            ranges.setdefault(place.file, []).append((place.offset, place.nbytes))
    digests = hash_ranges(store, {file: sorted(set(some)) for file, some in ranges.items()}, progress)
    for one in manifest.tensors:
        place = places[one.name]
        if place.file in digests and digests[place.file][place.offset, place.nbytes] != one.pieces.digests:
            return f"{one.name} has other weights"
    return ""


def names_of(model: str | Path) -> set[str]:
    """How peers may call a model that is given so."""
    path = Path(model)
    return {str(model), path.name, path.stem if path.suffix == ".gguf" else path.name}


def find_manifest(
    directory: SwarmDirectory,
    asking: Asking,
    model: str | Path,
    *,
    expected: str | None = None,
    joined: Sequence[str] = (),
    allows: Callable[[PublicKey], bool] = lambda key: True,
    wants_heads: Callable[[str], bool] = lambda fingerprint: False,
    accept: Callable[[Manifest, Sequence[bytes]], str] = lambda manifest, heads: "",
    report: Report = lambda stage, done, total: None,
) -> tuple[Manifest, str] | None:
    """The manifest of a model as its peers tell it, and the name of the model there.

    All models of its name are asked about at once, each of one peer and, while that is slow, of another one; so who
    tells nothing, or slowly, holds this up for seven minutes at most.

    Args:
        directory: of the swarm.
        model: as the user calls it.
        expected: its fingerprint; None: that of the only model of this name, or of the only one that a peer tells
            which was joined through.
        joined: addresses that were joined through.
        allows: tells which peers may be asked, by their keys.
        wants_heads: tells of a fingerprint whether what stands before the tensors in GGUF files is needed, too.
        accept: says what is wrong with a manifest and with those heads, if something is.

    Returns:
        None if no peer serves a model of this name.

    Raises:
        ModelNotFound: several models are called so, or no peer tells of the one.
    """
    report("ask peers", 0, 0)
    is_joined = _joined_through(joined)
    if expected is not None:
        called = {expected: str(model)}
    else:
        names = names_of(model)
        listed = [one for one in directory.records("") if one.is_of_model and one.model_name in names]
        listed.sort(key=lambda one: not is_joined(one.endpoint))
        called = {one.model: one.model_name for one in listed[:MAX_MODELS]}
    if not called:
        return None
    with ThreadPoolExecutor(len(called)) as pool:
        records = dict(zip(called, pool.map(directory.peers, called), strict=True))
    peers = dict[str, list[Endpoint]]()
    for fingerprint, some in records.items():
        allowed = [record for record in some if allows(record.key)]
        peers[fingerprint] = sorted((one.endpoint for one in allowed), key=lambda one: not is_joined(one))[:MAX_ASKED]
        if allowed and expected is not None:
            called[expected] = allowed[0].model_name
    race = _Race(asking, peers, is_joined, wants_heads, accept, report)
    race.run()
    found = race.found
    if len(found) > 1:
        near = [fingerprint for fingerprint, teller in found.items() if is_joined(teller)]
        if len(near) != 1:
            raise ModelNotFound(
                f"{len(found)} models of this swarm are called {model}: give --model-id with the one that you mean "
                f"({', '.join(found)})"
            )
        log.warning(
            "%d models of this swarm are called %s: that of the peer joined through is taken", len(found), model
        )
    if race.manifest is None:
        raise ModelNotFound(f"no peer tells what {model} is ({'; '.join(race.reasons) or 'none answers'})")
    return race.manifest, called[race.manifest.fingerprint]


def _joined_through(addresses: Sequence[str]) -> Callable[[Endpoint], bool]:
    """Tells whether a peer is one that was joined through: by its key, or by the host of a node of the DHT."""
    multiaddrs, of_peers = split_addresses(addresses)
    keys = {check_peer_address(address).text for address in of_peers}
    hosts = {address.split("/")[2] for address in multiaddrs}

    def is_joined(peer: Endpoint) -> bool:
        host = peer.address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        return peer.key.text in keys or host in hosts

    return is_joined


Question = tuple[WeightsKind, bytes, int]  # of what kind, by which name, and where the answer begins
Telling = Generator[Question, Message, tuple[Manifest, list[bytes]]]


def tell(fingerprint: str, with_heads: bool) -> Telling:
    """Asks one peer for the manifest of a model and, if wanted, for what stands before the tensors in its files. Yields
    questions and is sent the answers; returns both, checked. Raises ModelNotFound: why the peer is left out."""
    data = yield from whole(WeightsKind.MANIFEST, bytes.fromhex(fingerprint))
    try:
        manifest = Manifest.unpack(data)
    except ProtocolError as error:
        raise ModelNotFound(f"what it gives is no manifest ({error})") from error
    del data
    if manifest.fingerprint != fingerprint:
        raise ModelNotFound("it gives the manifest of another model")
    heads: list[bytes] = []
    for head in manifest.heads if with_heads else ():
        joined = bytearray()
        for name, _, size in head.pieces.each():
            piece = yield from whole(WeightsKind.PIECE, name)
            if len(piece) != size or digest(piece) != name:
                raise ModelNotFound("it gives a corrupt piece")
            joined += piece
        heads.append(bytes(joined))
    return manifest, heads


def whole(kind: WeightsKind, name: bytes) -> Generator[Question, Message, memoryview]:
    data = bytearray()
    while True:
        message = yield kind, name, len(data)
        if isinstance(message, Failure):
            raise ModelNotFound(message.text)
        if not isinstance(message, WeightsPart):
            raise ModelNotFound("it answers what cannot be")
        part = message.payload
        left = message.total - len(data)
        if message.total > MAX_MANIFEST_BYTES or len(part) != min(left, MAX_PART_BYTES):
            raise ModelNotFound("it answers what cannot be")
        data += part
        if len(part) == left:
            return memoryview(data)


@dataclass
class _Asked:
    """A peer that is telling a manifest."""

    model: str
    peer: Endpoint
    telling: Telling
    began: float
    heard: float  # when it has last answered, in seconds as `began`
    nbytes: int = 0  # that it has told
    total: int = 0  # bytes of what it was asked for last

    def is_quick(self, now: float) -> bool:
        """Whether no other peer needs to be asked yet."""
        took = now - self.began
        return took < NEXT_S or (self.nbytes > 0 and took * max(1, self.total / self.nbytes) < ANSWER_LIMIT_S)


@dataclass(eq=False)
class _Race:
    """Asks `peers` of several models, by fingerprint, in their order. found: the peer of each that has told a manifest
    that was accepted. manifest: of the last of those that was joined through; of the first, if none was. reasons: why
    others have not."""

    asking: Asking
    peers: Mapping[str, Sequence[Endpoint]]
    is_joined: Callable[[Endpoint], bool]
    wants_heads: Callable[[str], bool]
    accept: Callable[[Manifest, Sequence[bytes]], str]
    report: Report

    def __post_init__(self) -> None:
        self.found: dict[str, Endpoint] = {}
        self.manifest: Manifest | None = None
        self.reasons: list[str] = []
        self._left = {fingerprint: list(some) for fingerprint, some in self.peers.items()}
        self._asked: dict[int, _Asked] = {}  # by the number of the question that is open

    def run(self) -> None:
        while self._begin() or self._asked:
            self.report("ask peers", max((one.nbytes for one in self._asked.values()), default=0), 0)
            try:
                source, message = self.asking.answers.get(timeout=TICK_S)
            except queue.Empty:
                self._end_slow()
                continue
            one = self._asked.pop(getattr(message, "number", 0), None)
            if one is not None and one.peer == source and not isinstance(message, HubAnswer):
                self._answered(one, message)
            self._end_slow()

    def _begin(self) -> bool:
        """Asks the next peer of each model that nobody tells quickly; whether some are left."""
        now = time.monotonic()
        for fingerprint, left in self._left.items():
            quick = any(one.model == fingerprint and one.is_quick(now) for one in self._asked.values())
            if left and not quick:
                peer = left.pop(0)
                one = _Asked(fingerprint, peer, tell(fingerprint, self.wants_heads(fingerprint)), now, now)
                self._ask(one, next(one.telling))
        return any(self._left.values())

    def _ask(self, one: _Asked, question: Question) -> None:
        self._asked[self.asking.ask(one.peer, *question)] = one

    def _answered(self, one: _Asked, message: Message) -> None:
        now = one.heard = time.monotonic()
        one.nbytes += len(getattr(message, "payload", b""))
        one.total = getattr(message, "total", 0)
        try:
            self._ask(one, one.telling.send(message))
        except ModelNotFound as error:
            self.reasons.append(f"{one.peer.address}: {error}")
        except StopIteration as told:
            self._told(one, *told.value)
        self._bound()
        took = time.monotonic() - now
        for other in self._asked.values():  # nobody was listened to meanwhile
            other.began += took
            other.heard += took

    def _told(self, one: _Asked, manifest: Manifest, heads: Sequence[bytes]) -> None:
        reason = self.accept(manifest, heads)
        if reason:  # the fingerprint covers no heads, so the next peer may tell better ones
            self.reasons.append(f"{one.model[:12]} of {one.peer.address}: {reason}")
            return
        self.found[one.model] = one.peer
        if self.manifest is None or self.is_joined(one.peer):
            self.manifest = manifest
        self._left[one.model].clear()
        for number, other in list(self._asked.items()):
            if other.model == one.model:
                self._drop(number)

    def _bound(self) -> None:
        """Ends who has told most while all together have told more than is kept."""
        while sum(one.nbytes for one in self._asked.values()) > MAX_TOLD_BYTES:
            self._drop(max(self._asked, key=lambda number: self._asked[number].nbytes), "it tells more than others")

    def _end_slow(self) -> None:
        now = time.monotonic()
        for number, one in list(self._asked.items()):
            if self.asking.is_gone(one.peer):
                self._drop(number, "it is not reached, or does not accept this key")
            elif now - one.began > WHOLE_S:
                self._drop(number, "it takes too long")
            elif now - one.heard > ANSWER_S:
                self._drop(number, "it does not answer about weights: it is older than version 0.3, or hangs")

    def _drop(self, number: int, reason: str = "") -> None:
        self.asking.forget(number)
        one = self._asked.pop(number)
        if reason:
            self.reasons.append(f"{one.peer.address}: {reason}")
