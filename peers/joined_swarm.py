"""The start of a peer: it joins or begins a swarm, and finds its model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peers.peer_options import PeerOptions, Report
from splitnet.blocks.block_sizes import check_file_bytes
from splitnet.checkpoint.checkpoint import Checkpoint, open_store
from splitnet.checkpoint.gguf.gguf_store import is_of_gguf
from splitnet.checkpoint.transfer.fetching import Fetcher, HubPieces, PeerQuestions
from splitnet.checkpoint.transfer.manifest import Manifest
from splitnet.checkpoint.transfer.manifest_search import differs, find_manifest, headers_differ
from splitnet.checkpoint.transfer.weight_pieces import (
    HeldPieces,
    make_folder,
    model_file,
    read_manifest,
    weights_folder,
)
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.joining import join, part_of
from splitnet.directory.mdns import LanNode, LocalNetwork, is_lan_address, what_was_found
from splitnet.errors import DirectoryError, LanError, ModelNotFound, ProtocolError, UnsupportedModel, WrongSwarm
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import OPEN
from splitnet.swarm.client_links import Links
from splitnet.transport.addresses import dht_addresses
from splitnet.wire.endpoints import Endpoint

log = logging.getLogger(__name__)

FILE_TIMEOUT_S = 180.0  # longest wait for the file with the address of the first peer


class LanPresence:
    """Announces a node of the DHT on the local network, and connects it to the DHTs of other peers there.

    Peers that start at the same time begin separate DHTs, so the search continues. `close` may be called repeatedly.
    """

    def __init__(self, directory: DhtDirectory, checkpoint: Checkpoint) -> None:
        self._directory = directory
        self._network = LocalNetwork(checkpoint.fingerprint)
        self.close = self._network.close
        self._announced = frozenset[str]()

    @classmethod
    def start(
        cls, directory: DhtDirectory, checkpoint: Checkpoint, *, has_joined: bool, report: Report
    ) -> LanPresence | None:
        """Announces the node and connects it to others; None: this machine has no local network.

        has_joined: the node is in a swarm already, so the start does not wait for a search.
        """
        with ExitStack() as on_failure:
            try:
                presence = cls(directory, checkpoint)
                on_failure.callback(presence.close)
                presence._announce_and_join(checkpoint.name, has_joined, report)
            except LanError as error:
                log.warning("others find this peer by --join only: %s", error)
                return None
            on_failure.pop_all()
        return presence

    def of_model(self, checkpoint: Checkpoint) -> LanPresence | None:
        """Replaces this presence with one for another model."""
        self.close()
        return LanPresence.start(self._directory, checkpoint, has_joined=True, report=lambda *_: None)

    def announce_addresses(self) -> None:
        """Announces changed addresses of the node; may take seconds."""
        addresses = self._directory.addresses
        now = frozenset(filter(is_lan_address, addresses))
        if not now or now == self._announced:  # while the network is down, the last addresses remain
            return
        self._announced = now
        try:
            self._network.begin_again(addresses=addresses)
        except LanError as error:
            log.warning("others find this peer by --join only: %s", error)

    def _announce_and_join(self, model: str, has_joined: bool, report: Report) -> None:
        # Before the search, so that at least one of two peers that start together finds the other.
        addresses = self._directory.addresses
        self._network.announce_node(addresses)
        self._announced = frozenset(filter(is_lan_address, addresses))
        if not has_joined:
            nodes = self._network.search()
            if nodes:
                report(f"{what_was_found(nodes)}: joining", 0, 0)
                if not self._directory.meet([address for node in nodes for address in node.addresses]):
                    log.warning("no peer that was found on this network answers: starting a swarm")
            else:
                report(f"no swarm for {model} on this network: starting one", 0, 0)
        self._network.watch_nodes(self._meet_nodes)

    def _meet_nodes(self, nodes: Sequence[LanNode]) -> None:
        try:
            if met := self._directory.meet([address for node in nodes for address in node.addresses]):
                log.info("met %d of %d peers on the local network", met, len(nodes))
        except DirectoryError as error:
            log.info("could not meet a peer on the local network: %s", error)


@dataclass
class JoinedSwarm:
    """A swarm and its model. Close it, or close its directory and presence."""

    checkpoint: Checkpoint
    directory: SwarmDirectory
    lan: LanPresence | None  # None: the peer is not announced on the local network
    fetcher: Fetcher | None  # gets missing weights; None: no weight is missing

    def close(self) -> None:
        if self.lan is not None:
            self.lan.close()
        self.directory.close()


def join_swarm(
    options: PeerOptions,
    model: str | Path | None,
    checkpoint: Checkpoint | None,
    identity: Identity,
    report: Report,
    choose: Callable[[SwarmDirectory], Found] | None = None,
) -> JoinedSwarm:
    """Joins a swarm with `options`, and identifies a model that may lack files here.

    model: the user's name of the model; None: `choose` finds a model. checkpoint: the local or hub files; None: no
    file.

    Raises the errors of `join`; SplitnetError: `options.join_file` does not appear, or options of the DHT are given
    without a DHT; ModelNotFound: the model is missing here, and no peer of the swarm offers it.
    """
    if checkpoint is not None and checkpoint.is_whole:
        checkpoint.manifest(partial(report, "check the weights"))
        _check_expected(checkpoint, options)
    with ExitStack() as on_failure:
        directory = _join(options, identity, report)
        on_failure.callback(directory.close)
        if checkpoint is None or not checkpoint.is_whole:
            _meet_local_network(options, directory, report)
        if model is None:
            assert choose is not None
            checkpoint, fetcher = choose(directory)
        else:
            checkpoint, fetcher = find_model(options, model, checkpoint, directory, identity, report)
        node = part_of(directory, DhtDirectory)
        lan = None
        if node is not None and options.lan:
            has_joined = bool(options.initial_peers or options.join_file)
            lan = LanPresence.start(node, checkpoint, has_joined=has_joined, report=report)
        on_failure.pop_all()
    return JoinedSwarm(checkpoint, directory, lan, fetcher)


Found = tuple[Checkpoint, Fetcher | None]
"""A model, and the fetcher of its missing weights; None: no weight is missing."""


def find_model(
    options: PeerOptions,
    model: str | Path,
    checkpoint: Checkpoint | None,
    directory: SwarmDirectory,
    identity: Identity,
    report: Report,
) -> Found:
    """Identifies a model, even if files of the model are missing here. Arguments and errors as in `join_swarm`."""
    if checkpoint is None or not checkpoint.is_whole:
        return _find_missing(options, model, checkpoint, directory, identity, report)
    if options.invited and options.model_id is None:
        # A local model that an invitation names is only served if the swarm has the same model.
        own, joined = checkpoint.fingerprint, options.initial_peers

        def accept(one: Manifest, heads: Sequence[bytes]) -> str:
            return "" if one.fingerprint == own else f"{model} on this machine is another model"

        with PeerQuestions(identity, options.swarm_key or OPEN) as asking:
            told = find_manifest(directory, asking, model, joined=joined, accept=accept, report=report)
        if told is None:
            raise ModelNotFound(
                f"the invitation names {model}, which is on this machine and not in the swarm: give it as MODEL, "
                "in addition to --invite, if you want to serve it there"
            )
    return checkpoint, None


def _join(options: PeerOptions, identity: Identity, report: Report) -> SwarmDirectory:
    initial_peers = list(options.initial_peers)
    if initial_peers or options.join_file:
        stage = "join the swarm"
    else:
        stage = "look for a swarm on this network" if options.lan else "start a swarm"
    waiting = partial(report, stage, 0, 0)
    waiting()
    if options.join_file is not None:
        initial_peers.append(_read_when_there(options.join_file, waiting))
    listen = options.dht_listen if options.dht_listen is not None else dht_addresses(options.listen)
    swarm = options.swarm_key or OPEN
    directory = join(initial_peers, lambda: Links(identity), listen=listen, swarm=swarm, waiting=waiting)
    try:
        node = part_of(directory, DhtDirectory)
        if node is None and (options.dht_listen is not None or options.lan):
            reason = "it joins through peers" if initial_peers else "hivemind is not installed"
            if options.dht_listen is not None:
                raise DirectoryError(f"this peer does not join a DHT, because {reason}: leave --dht-listen out")
            raise LanError(
                f"this peer does not join a DHT, because {reason}, and is not found on a network: leave --lan out"
            )
        return directory
    except BaseException:
        directory.close()
        raise


def _meet_local_network(options: PeerOptions, directory: SwarmDirectory, report: Report) -> None:
    """Connects a peer that does not know its model to the peers on the local network, which may know it."""
    node = part_of(directory, DhtDirectory)
    if node is None or not options.lan or options.initial_peers or options.join_file:
        return
    try:
        with LocalNetwork("") as network:
            nodes = network.search()
    except LanError:
        return
    if nodes:
        report("ask peers on this network", 0, 0)
        node.meet([address for one in nodes for address in one.addresses])


def _find_missing(
    options: PeerOptions,
    model: str | Path,
    checkpoint: Checkpoint | None,
    directory: SwarmDirectory,
    identity: Identity,
    report: Report,
) -> tuple[Checkpoint, Fetcher]:
    swarm = options.swarm_key or OPEN
    store = checkpoint.store if checkpoint is not None else None
    hashing = partial(report, "check the weights")

    def has_no_folder(fingerprint: str) -> bool:
        return read_manifest(weights_folder(fingerprint)) is None

    def accept(one: Manifest, heads: Sequence[bytes]) -> str:
        """Compares a manifest with the local files, and makes its folder; returns the reason of a failure."""
        if store is not None and (reason := differs(one, store, hashing)):
            return reason
        if has_no_folder(one.fingerprint):
            try:
                make_folder(one, heads, lambda path: _check_layout(one, path))
            except (ModelNotFound, UnsupportedModel, ProtocolError) as error:
                return str(error)
        return ""

    with PeerQuestions(identity, swarm) as asking:
        known = None
        if checkpoint is not None and checkpoint.knows_manifest and not options.invited:
            known = checkpoint.manifest(hashing)
        if known is not None and options.model_id in (None, known.fingerprint):
            manifest, name = known, str(model)
        elif options.model_id is not None and (kept := read_manifest(weights_folder(options.model_id))) is not None:
            manifest, name = kept, str(model)
        else:
            found = None
            try:
                found = find_manifest(
                    directory,
                    asking,
                    model,
                    expected=options.model_id,
                    joined=options.initial_peers,
                    wants_heads=has_no_folder,
                    accept=accept,
                    report=report,
                )
            except ModelNotFound as error:
                if checkpoint is None or options.invited:
                    raise
                log.warning("%s: reading all weights from the hub", error)
            if found is not None:
                manifest, name = found
            elif checkpoint is not None and not options.invited:  # no peer has the model: this peer makes the manifest
                name = str(model)
                manifest = checkpoint.manifest(partial(report, "read the weights once"))
                _check_expected(checkpoint, options)
            else:
                raise ModelNotFound(
                    f"{model} is neither on this machine nor at the hub, and no peer of this swarm "
                    "serves a model of this name: check the name and --join, or give --model-id"
                )
    if checkpoint is not None:
        checkpoint.adopt(manifest)
    if has_no_folder(manifest.fingerprint):
        make_folder(manifest, (), lambda path: _check_layout(manifest, path))
    files = open_store(model_file(weights_folder(manifest.fingerprint), manifest))
    folder = files.folder
    assert folder is not None

    def peers() -> Sequence[Endpoint]:
        return [one.endpoint for one in directory.peers(manifest.fingerprint) if one.key != identity.public]

    hub = None
    if store is not None:
        try:
            hub = HubPieces(manifest, store, store.commit.rpartition("@")[2])
        except ModelNotFound as error:  # the hub is unreachable, and the manifest is already known
            log.warning("weights come only from peers: %s", error)
    fetcher = Fetcher(folder, peers, identity, swarm, hub, report)
    folder.fetch = fetcher.fetch
    filled = Checkpoint.of(files)  # the configs of some files depend on tensors
    check_file_bytes(filled)
    filled.name = name
    return filled, fetcher


def _check_layout(manifest: Manifest, path: Path) -> None:
    """Checks the heads of files against the manifest, because the fingerprint does not cover heads. Raises
    ModelNotFound: they differ."""
    store = open_store(path)
    if reason := headers_differ(manifest, store):
        raise ModelNotFound(
            f"a peer's list of the files of this model does not fit the model ({reason}): join another peer"
        )
    if not manifest.heads and is_of_gguf(manifest.config):
        raise ModelNotFound("a peer leaves out what stands before the tensors in the files of this model")
    HeldPieces(manifest, store)  # raises an error if pieces overlap or leave gaps


def _check_expected(checkpoint: Checkpoint, options: PeerOptions) -> None:
    if options.model_id not in (None, checkpoint.fingerprint):
        raise WrongSwarm(
            f"--model-id is {options.model_id}, and {checkpoint.name} here is {checkpoint.fingerprint}: use the same "
            "files on all machines"
        )


def _read_when_there(file: Path, waiting: Callable[[], None]) -> str:
    deadline = time.monotonic() + FILE_TIMEOUT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise DirectoryError(f"no peer has written its address to {file} in {FILE_TIMEOUT_S:.0f} s")
        waiting()
        time.sleep(0.05)
    return file.read_text(encoding="utf-8").strip()
