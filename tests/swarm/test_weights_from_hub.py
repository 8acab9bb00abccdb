"""Peers get the byte ranges of their blocks from the hub; clients with some files learn the identity of their model
from peers."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from splitnet.checkpoint import safetensors
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.transfer.fetching import HubPieces
from splitnet.checkpoint.transfer.hashing import make_manifest
from splitnet.cli.connection import ModelConnection
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import ModelNotFound, WrongSwarm
from splitnet.hf.remote_model import learn_manifest
from splitnet.security.identity import Identity
from splitnet.session.options import ConnectionOptions
from tests.swarm.harness import local_swarm
from tests.swarm.test_weights_from_peers import block_bytes_of, computes_as
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

COMMIT = "ab" * 20
LARGE = 256 << 20


@dataclass
class Hub:
    """One repository, `someone/tiny`, over HTTP with ranges."""

    folder: Path
    ranges: int = 0
    """Bytes sent in ranges."""
    whole: list[str] = field(default_factory=list[str])
    """Names of files sent as a whole."""
    deaf: bool = False
    """Ignores ranges: files are sent as a whole, and are large."""
    large: int = 0
    """Bytes of large files sent as a whole."""
    read: int = 0
    """How often a file was opened to be read in parts."""

    def open(self, path: str, mode: str, **_: Any) -> Any:
        self.read += 1
        return (self.folder / path.removeprefix("someone/tiny/")).open("rb")


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        name = self.path.rpartition("/")[2]
        file = self.hub.folder / name
        if not self.path.startswith("/someone/tiny/resolve/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.hub.deaf and body and name.endswith(".safetensors"):
            self.send_response(200)
            self.send_header("Content-Length", str(LARGE))
            self.end_headers()
            with suppress(OSError):
                for _ in range(LARGE >> 20):
                    self.wfile.write(bytes(1 << 20))
                    self.hub.large += 1 << 20
            return
        data = file.read_bytes()
        wanted = self.headers.get("Range")
        if wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
            self.hub.ranges += len(data)
        else:
            self.send_response(200)
            self.hub.whole += [name] if body else []
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny", hidden=128, seed=3)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(safetensors, "HfFileSystem", lambda: hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub})) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        threading.Thread(target=server.serve_forever).start()
        yield hub
        server.shutdown()


def test_a_peer_gets_ranges_of_its_blocks_and_no_whole_files(folder: Path, node: DhtDirectory, hub: Hub) -> None:
    with local_swarm(folder, [], node=node) as swarm:
        first = swarm.add(0, 2, folder="someone/tiny", join=())
        assert computes_as(first.span, folder)
        assert first.checkpoint.fingerprint == Checkpoint.open(folder).fingerprint
        needed = block_bytes_of(folder, 0, 2)
        assert needed <= hub.ranges <= 1.01 * needed
        assert not [name for name in hub.whole if name.endswith(".safetensors")]
        read, hub.ranges = hub.read, 0
    # The identity of the model is now known, and the pieces are kept, too.
    with local_swarm(folder, [], node=node) as swarm:
        again = swarm.add(0, 3, folder="someone/tiny", join=())
        assert computes_as(again.span, folder)
        assert hub.ranges == block_bytes_of(folder, 2, 3)
        assert hub.read - read == len(set(weight_map(folder).values())), "headers alone"


def test_the_hub_and_peers_are_sources_at_once(folder: Path, node: DhtDirectory, hub: Hub) -> None:
    with local_swarm(folder, [(0, 6)], node=node, share_weights=True) as swarm:
        swarm.peers[0].checkpoint.name = "someone/tiny"
        swarm.peers[0]._announcer.publish()
        peer = swarm.add(0, 4, folder="someone/tiny")
        assert computes_as(peer.span, folder)
        assert peer._fetcher is not None
        fetched = peer._fetcher.fetched.by_source
        assert fetched["the hub"] == hub.ranges and len(fetched) == 2
        assert sum(fetched.values()) == block_bytes_of(folder, 0, 4)


def test_a_client_with_some_files_learns_the_fingerprint_of_its_model(
    folder: Path, node: DhtDirectory, hub: Hub
) -> None:
    with local_swarm(folder, [(0, 6)], node=node) as swarm:
        swarm.peers[0].checkpoint.name = "someone/tiny"
        swarm.peers[0]._announcer.publish()
        checkpoint = Checkpoint.open("someone/tiny")
        assert not checkpoint.knows_manifest
        learn_manifest(checkpoint, [swarm.peers[0].join_address], Identity.generate())
        assert (
            checkpoint.fingerprint
            == swarm.peers[0].checkpoint.fingerprint
            == make_manifest(Checkpoint.open(folder).store).fingerprint
        )
        assert Checkpoint.open("someone/tiny").knows_manifest, "it is asked once"


def test_a_client_refuses_peers_of_another_model(folder: Path, node: DhtDirectory, hub: Hub, tmp_path: Path) -> None:
    """Even a model with the same headers is refused, because all bytes of the local files are compared."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    shard = other / weight_map(folder)["model.embed_tokens.weight"]
    shard.write_bytes(shard.read_bytes()[:-5] + b"other")
    with local_swarm(other, [(0, 6)], node=node) as swarm:
        swarm.peers[0].checkpoint.name = "someone/tiny"
        swarm.peers[0]._announcer.publish()
        checkpoint = Checkpoint.open("someone/tiny")
        # A client that has loaded its embeddings has this file.
        safetensors.hf_hub_download("someone/tiny", shard.name)
        with pytest.raises(ModelNotFound, match="has other weights"):
            learn_manifest(checkpoint, [swarm.peers[0].join_address], Identity.generate())


def test_the_hub_decides_the_fingerprint_of_its_model(
    folder: Path, node: DhtDirectory, hub: Hub, tmp_path: Path
) -> None:
    """Peers that give the same name to another model with the same headers are detected by the first piece."""
    other = random_checkpoint("llama", tmp_path / "other", hidden=128, seed=4)
    shutil.copy(folder / "config.json", other)
    with local_swarm(other, [(0, 6)], node=node, share_weights=True) as swarm:
        swarm.peers[0].checkpoint.name = "someone/tiny"
        swarm.peers[0]._announcer.publish()
        with pytest.raises(WrongSwarm, match="the hub has other weights"):
            swarm.add(0, 2, folder="someone/tiny")
    assert not Checkpoint.open("someone/tiny").knows_manifest, "what they said is not believed again"


def test_a_hub_without_ranges_sends_no_whole_files(folder: Path, hub: Hub) -> None:
    store = Checkpoint.open("someone/tiny").store
    manifest = make_manifest(Checkpoint.open(folder).store)
    pieces = HubPieces(manifest, store)
    name, _, size = next(manifest.tensors[0].pieces.each())
    assert len(pieces.download_piece(name)) == size
    hub.deaf = True
    with pytest.raises(ModelNotFound, match="does not support range requests"):
        pieces.download_piece(name)
    assert hub.large < LARGE // 4


def test_a_model_id_overrides_an_earlier_fingerprint(
    folder: Path, node: DhtDirectory, hub: Hub, tmp_path: Path
) -> None:
    """Another swarm may have named a model with the same headers."""
    other = random_checkpoint("llama", tmp_path / "other", hidden=128, seed=4)
    shutil.copy(folder / "config.json", other)
    told = make_manifest(Checkpoint.open(other).store)
    with local_swarm(folder, [(0, 6)], node=node, share_weights=True) as swarm:
        right = swarm.peers[0].checkpoint.fingerprint
        checkpoint = Checkpoint.open("someone/tiny")
        checkpoint.adopt(told)
        assert Checkpoint.open("someone/tiny").fingerprint == told.fingerprint
        options = ConnectionOptions(
            initial_peers=[swarm.peers[0].join_address], key_file=tmp_path / "key", model_id=right
        )
        connection = ModelConnection("someone/tiny", options)
        assert connection.facts_of(Checkpoint.open("someone/tiny")).fingerprint == right
        checkpoint.adopt(told)
        peer = swarm.add(0, 2, folder="someone/tiny", model_id=right)
        assert computes_as(peer.span, folder)


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
