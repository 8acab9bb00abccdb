"""Finds the manifest of a model whose files are not all on this machine."""

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
from splitnet.checkpoint.transfer.fetching import TICK_S, HubAnswer, PeerQuestions, Report
from splitnet.checkpoint.transfer.hashing import hash_ranges
from splitnet.checkpoint.transfer.manifest import MAX_HEAD_BYTES, MAX_MANIFEST_BYTES, Manifest, digest
from splitnet.directory.interface import SwarmDirectory
from splitnet.errors import ModelNotFound, ProtocolError
from splitnet.security.identity import PublicKey
from splitnet.transport.addresses import check_peer_address, split_addresses
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import MAX_PART_BYTES, Failure, Message, WeightsKind, WeightsPart

log = logging.getLogger(__name__)

MAX_ASKED: Final = 8  # maximum peers that are asked for the manifest of one model
MAX_MODELS: Final = 8  # maximum models with one name that are requested; anybody may claim a name
NEXT_PEER_S: Final = 5.0  # time after which another peer is asked, too, if the first one is slow
ANSWER_LIMIT_S: Final = 40.0
"""A peer is slow if, at its measured rate, it would need longer than this to send everything. Peers share this
machine's link."""
ANSWER_S: Final = 10.0  # time limit of an answer
MAX_PEER_S: Final = 120.0  # time limit of all answers of a peer
# Maximum bytes of the manifests and heads that all asked peers together are sending.
MAX_ANSWER_BYTES: Final = MAX_MANIFEST_BYTES + MAX_HEAD_BYTES


def headers_differ(manifest: Manifest, store: TensorStore) -> str:
    """The difference between a manifest and the config and headers of files; empty: there is none."""
    here = {name: (place.stored, place.shape, place.nbytes) for name, place in store.tensor_locations().items()}
    told = {one.name: (one.stored, one.shape, one.pieces.nbytes) for one in manifest.tensors}
    if here != told:
        return f"{len(here.items() ^ told.items())} tensors differ"
    if manifest.config != store.told_config():
        return "the config differs"
    return ""


def differs(manifest: Manifest, store: TensorStore, progress: Progress | None = None) -> str:
    """The difference between a manifest and the files on this machine, and the headers of other files; empty: there is
    none."""
    if reason := headers_differ(manifest, store):
        return reason
    places = store.tensor_locations()
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
    """The names by which peers may call a model that the user calls `model`."""
    path = Path(model)
    return {str(model), path.name, path.stem if path.suffix == ".gguf" else path.name}


def find_manifest(
    directory: SwarmDirectory,
    asking: PeerQuestions,
    model: str | Path,
    *,
    expected: str | None = None,
    joined: Sequence[str] = (),
    allows: Callable[[PublicKey], bool] = lambda key: True,
    wants_heads: Callable[[str], bool] = lambda fingerprint: False,
    accept: Callable[[Manifest, Sequence[bytes]], str] = lambda manifest, heads: "",
    report: Report = lambda stage, done, total: None,
) -> tuple[Manifest, str] | None:
    """Asks peers for the manifest of a model; returns it and the peers' name of the model.

    All models with this name are requested at once, each from one peer and, while that peer is slow, from another one;
    so silent or slow peers delay the result for at most seven minutes.

    Args:
        directory: the swarm's directory.
        model: the user's name of the model.
        expected: the model's fingerprint; None: the fingerprint of the only model with this name, or of the only such
            model at a peer that was joined through.
        joined: addresses that were joined through.
        allows: whether a peer with this key may be asked.
        wants_heads: whether the bytes before the tensors in GGUF files are needed, too, for a fingerprint.
        accept: returns the fault of a manifest and its heads, or "".

    Returns:
        None if no peer serves a model with this name.

    Raises:
        ModelNotFound: several models have this name, or no peer sends the manifest.
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
            "%d models of this swarm are called %s: the one of the peer joined through is taken", len(found), model
        )
    if race.manifest is None:
        raise ModelNotFound(f"no peer sends the manifest of {model} ({'; '.join(race.reasons) or 'none answers'})")
    return race.manifest, called[race.manifest.fingerprint]


def _joined_through(addresses: Sequence[str]) -> Callable[[Endpoint], bool]:
    """A test whether a peer was joined through, by its key or by the host of a node of the DHT."""
    multiaddrs, of_peers = split_addresses(addresses)
    keys = {check_peer_address(address).text for address in of_peers}
    hosts = {address.split("/")[2] for address in multiaddrs}

    def is_joined(peer: Endpoint) -> bool:
        host = peer.address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        return peer.key.text in keys or host in hosts

    return is_joined


Question = tuple[WeightsKind, bytes, int]  # kind, name, and first byte of the answer
ManifestFetch = Generator[Question, Message, tuple[Manifest, list[bytes]]]


def tell(fingerprint: str, with_heads: bool) -> ManifestFetch:
    """A generator that requests the manifest of a model from one peer and, with `with_heads`, the bytes before the
    tensors in the model's files. The generator yields questions, and the caller sends the answers into it. Returns the
    checked manifest and heads. Raises ModelNotFound, with the reason to leave the peer out."""
    data = yield from whole(WeightsKind.MANIFEST, bytes.fromhex(fingerprint))
    try:
        manifest = Manifest.unpack(data)
    except ProtocolError as error:
        raise ModelNotFound(f"it sends no valid manifest ({error})") from error
    del data
    if manifest.fingerprint != fingerprint:
        raise ModelNotFound("it sends the manifest of another model")
    heads: list[bytes] = []
    for head in manifest.heads if with_heads else ():
        joined = bytearray()
        for name, _, size in head.pieces.each():
            piece = yield from whole(WeightsKind.PIECE, name)
            if len(piece) != size or digest(piece) != name:
                raise ModelNotFound("it sends a corrupt piece")
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
            raise ModelNotFound("its answer is invalid")
        part = message.payload
        left = message.total - len(data)
        if message.total > MAX_MANIFEST_BYTES or len(part) != min(left, MAX_PART_BYTES):
            raise ModelNotFound("its answer is invalid")
        data += part
        if len(part) == left:
            return memoryview(data)


@dataclass
class _AskedPeer:
    """A peer that is sending a manifest."""

    model: str
    peer: Endpoint
    telling: ManifestFetch
    began: float
    heard: float  # time of its last answer, in seconds as `began`
    nbytes: int = 0  # bytes that it has sent
    total: int = 0  # bytes of the whole of the last requested item

    def is_quick(self, now: float) -> bool:
        """Whether no other peer must be asked yet."""
        took = now - self.began
        return took < NEXT_PEER_S or (self.nbytes > 0 and took * max(1, self.total / self.nbytes) < ANSWER_LIMIT_S)


@dataclass(eq=False)
class _Race:
    """Asks `peers` of several models, by fingerprint, in order. found: for each model, the peer whose manifest was
    accepted. manifest: the last manifest from a peer that was joined through; the first manifest if there is no such
    peer. reasons: why other peers were left out."""

    asking: PeerQuestions
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
        self._asked: dict[int, _AskedPeer] = {}  # by the number of the open question

    def run(self) -> None:
        while self._ask_next_peers() or self._asked:
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

    def _ask_next_peers(self) -> bool:
        """Asks the next peer of each model without a quick peer; returns whether peers are left."""
        now = time.monotonic()
        for fingerprint, left in self._left.items():
            quick = any(one.model == fingerprint and one.is_quick(now) for one in self._asked.values())
            if left and not quick:
                peer = left.pop(0)
                one = _AskedPeer(fingerprint, peer, tell(fingerprint, self.wants_heads(fingerprint)), now, now)
                self._ask_question(one, next(one.telling))
        return any(self._left.values())

    def _ask_question(self, one: _AskedPeer, question: Question) -> None:
        self._asked[self.asking.ask_peer(one.peer, *question)] = one

    def _answered(self, one: _AskedPeer, message: Message) -> None:
        now = one.heard = time.monotonic()
        one.nbytes += len(getattr(message, "payload", b""))
        one.total = getattr(message, "total", 0)
        try:
            self._ask_question(one, one.telling.send(message))
        except ModelNotFound as error:
            self.reasons.append(f"{one.peer.address}: {error}")
        except StopIteration as told:
            self._accept_manifest(one, *told.value)
        self._bound()
        took = time.monotonic() - now
        for other in self._asked.values():  # no answers were read during the check
            other.began += took
            other.heard += took

    def _accept_manifest(self, one: _AskedPeer, manifest: Manifest, heads: Sequence[bytes]) -> None:
        reason = self.accept(manifest, heads)
        if reason:  # the fingerprint does not include heads, so the next peer may send valid ones
            self.reasons.append(f"{one.model[:12]} of {one.peer.address}: {reason}")
            return
        self.found[one.model] = one.peer
        if self.manifest is None or self.is_joined(one.peer):
            self.manifest = manifest
        self._left[one.model].clear()
        for number, other in list(self._asked.items()):
            if other.model == one.model:
                self._drop_question(number)

    def _bound(self) -> None:
        """While all peers together have sent more than the limit, drops the peer that has sent the most bytes."""
        while sum(one.nbytes for one in self._asked.values()) > MAX_ANSWER_BYTES:
            self._drop_question(
                max(self._asked, key=lambda number: self._asked[number].nbytes), "it has sent too many bytes"
            )

    def _end_slow(self) -> None:
        now = time.monotonic()
        for number, one in list(self._asked.items()):
            if self.asking.is_gone(one.peer):
                self._drop_question(number, "it cannot be reached, or does not accept this key")
            elif now - one.began > MAX_PEER_S:
                self._drop_question(number, "it takes too long")
            elif now - one.heard > ANSWER_S:
                self._drop_question(number, "it does not answer about weights: it is older than version 0.3, or hangs")

    def _drop_question(self, number: int, reason: str = "") -> None:
        self.asking.forget_question(number)
        one = self._asked.pop(number)
        if reason:
            self.reasons.append(f"{one.peer.address}: {reason}")
