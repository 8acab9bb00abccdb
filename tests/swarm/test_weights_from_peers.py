"""Peers without files get their blocks from other peers, and never from liars or from peers outside a closed swarm."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.transfer.weight_pieces import WeightFolder, weights_folder
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import ModelNotFound, SplitnetError
from splitnet.security.identity import Identity
from splitnet.security.swarm_key import SwarmKey
from splitnet.transport.addresses import peer_address
from tests.swarm.harness import SPANS, LocalSwarm, local_swarm
from tests.unit.gguf_writing import write_gguf
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "shared-llama", hidden=128)


@pytest.fixture(scope="module")
def swarm(folder: Path, node: DhtDirectory) -> Iterator[LocalSwarm]:
    with local_swarm(folder, SPANS, node=node, share_weights=True) as swarm:
        yield swarm


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def block_bytes_of(folder: Path, start: int, end: int) -> int:
    checkpoint = Checkpoint.open(folder)
    names = [tensor.name for block in checkpoint.block_tensors[start:end] for tensor in block]
    return sum(checkpoint.store.tensor_locations()[name].nbytes for name in names)


def computes_as(span: Span, folder: Path) -> bool:
    same = Span.load(Checkpoint.open(folder), span.start, span.end, weights=None)
    hidden = torch.randn(3, span.hidden_size, generator=torch.Generator().manual_seed(0))
    outputs = [one.forward(hidden.clone(), [RowChunk(one.new_row(), 0, 3)]) for one in (span, same)]
    return torch.equal(*outputs)


def sent_by(swarm: LocalSwarm) -> list[int]:
    return [peer.weights.sent for peer in swarm.peers]


def test_a_peer_without_files_gets_its_blocks_from_three_others(folder: Path, swarm: LocalSwarm) -> None:
    before = sent_by(swarm)
    with swarm.newcomer() as visitor:
        peer = visitor.add(1, 5, folder="shared-llama")
        visitor.peers.remove(peer)
        assert peer.checkpoint.fingerprint == swarm.peers[0].checkpoint.fingerprint
        assert computes_as(peer.span, folder)
        assert peer._fetcher is not None
        fetched = peer._fetcher.fetched
        needed = block_bytes_of(folder, 1, 5)
        assert needed <= sum(fetched.by_source.values()) <= 1.01 * needed and fetched.wasted <= 0.01 * needed
        assert len(fetched.by_source) == 3, "three sources at once"
        # The bytes sent are the blocks and the manifest.
        manifest = len(peer.checkpoint.manifest().pack())
        sent = sum(sent_by(swarm)) - sum(before)
        assert needed <= sent <= 1.01 * needed + manifest + 3 * 1024
        held = peer.checkpoint.held_pieces()
        assert isinstance(held, WeightFolder)
        peer.checkpoint.get_blocks(0, 6)  # A move does the same.
        assert computes_as(Span.load(peer.checkpoint, 0, 6, weights=None), folder)


def test_a_corrupt_source_is_named_and_left_out(
    folder: Path, swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    liar = swarm.peers[1]
    honest = liar.weights.held.read_piece

    def lie(name: bytes) -> bytes | None:
        data = honest(name)
        return None if data is None else bytes(len(data) - 1) + b"\x2a"

    monkeypatch.setattr(liar.weights.held, "read_piece", lie)
    caplog.set_level(logging.WARNING)
    with swarm.newcomer() as visitor:
        peer = visitor.add(0, 2, folder="shared-llama")
        visitor.peers.remove(peer)
        assert computes_as(peer.span, folder)
        assert peer._fetcher is not None
        assert peer._fetcher.fetched.left_out == [peer_address(liar.endpoint)]
        assert peer_address(liar.endpoint) not in peer._fetcher.fetched.by_source
    assert any(
        liar.endpoint.address in record.getMessage() and "corrupt" in record.getMessage() for record in caplog.records
    )


class Killed(BaseException):
    """Ends the process."""


def test_only_missing_and_damaged_pieces_are_fetched_again(
    folder: Path, swarm: LocalSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = WeightFolder.write_piece, list[bytes]()

    def some(self: WeightFolder, name: bytes, data: Any) -> None:
        if len(written) == 9:
            raise Killed
        write(self, name, data)
        written.append(name)

    with swarm.newcomer() as visitor:
        with monkeypatch.context() as patch:
            patch.setattr(WeightFolder, "write_piece", some)
            with pytest.raises(Killed):
                visitor.add(0, 2, folder="shared-llama")
        # One of the pieces on the disk is then damaged.
        fingerprint = swarm.peers[0].checkpoint.fingerprint
        checkpoint = Checkpoint.open(weights_folder(fingerprint))
        held = checkpoint.held_pieces()
        file, offset, size = held.where(int(held.slots_of(written[0])[0]))
        with (weights_folder(fingerprint) / file).open("r+b") as opened:
            opened.seek(offset)
            opened.write(bytes(size))
        peer = visitor.add(0, 2, folder="shared-llama")
        visitor.peers.remove(peer)
        assert computes_as(peer.span, folder)
        assert peer._fetcher is not None
        sizes = {name: n for pieces in peer.checkpoint.manifest().parts for name, _, n in pieces.each()}
        kept = sum(sizes[name] for name in written[1:])
        assert sum(peer._fetcher.fetched.by_source.values()) == block_bytes_of(folder, 0, 2) - kept


def test_missing_pieces_are_not_read_as_weights(folder: Path, swarm: LocalSwarm) -> None:
    with swarm.newcomer() as visitor:
        peer = visitor.add(0, 1, folder="shared-llama")
        visitor.peers.remove(peer)
        partial = Checkpoint.open(weights_folder(peer.checkpoint.fingerprint))
        assert partial.fingerprint == peer.checkpoint.fingerprint
        Span.load(partial, 0, 1)
        with pytest.raises(ModelNotFound, match=r"pieces of the weights in .* are missing"):
            Span.load(partial, 3, 4)


def test_a_peer_without_share_weights_sends_no_weights(
    node: DhtDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitnet.checkpoint.transfer.fetching.WAIT_LIMIT_S", 0.5)
    own = random_checkpoint("llama", tmp_path / "kept-llama", seed=2)
    # Any client may connect to this peer, so it does not share weights by default.
    with local_swarm(own, [(0, 6)], node=node) as swarm:
        with pytest.raises(ModelNotFound, match=r"at no source .*--share-weights"):
            swarm.add(0, 2, folder="kept-llama")
        assert swarm.peers[0].weights.sent == len(swarm.peers[0].checkpoint.manifest().pack())


def test_a_stranger_gets_nothing_of_a_closed_swarm(folder: Path, tmp_path: Path) -> None:
    """Refuses both a key that is not listed, and a listed key without the swarm key."""
    key = SwarmKey.generate()
    member, listed = Identity.generate(), Identity.generate()
    keys = tmp_path / "keys"
    keys.write_text("\n".join(one.public.text for one in (member, listed)))
    options: dict[str, Any] = {"swarm_key": key, "authorized_keys": keys}
    with local_swarm(folder, [], node=None) as swarm:
        first = swarm.add(0, 6, **options)
        address = [first.join_address]
        for stranger in ({"swarm_key": key}, {"identity": listed, "swarm_key": SwarmKey.generate()}):
            with pytest.raises(SplitnetError):
                swarm.add(0, 2, folder="shared-llama", join=address, **stranger)
        assert first.weights.sent == 0
        guest = swarm.add(0, 2, folder="shared-llama", join=address, identity=member, **options)
        assert computes_as(guest.span, folder)


def test_a_source_without_file_headers_is_skipped(folder: Path, node: DhtDirectory, tmp_path: Path) -> None:
    """The fingerprint does not cover the heads; nothing of this peer's manifest is kept."""
    file = write_gguf(folder, tmp_path / "some.gguf", GGMLQuantizationType.Q8_0)
    with local_swarm(file, [(0, 6)], node=node, share_weights=True) as swarm:
        liar = swarm.peers[0]
        manifest = liar.checkpoint.manifest()
        liar.weights._packed = replace(manifest, heads=()).pack()
        with pytest.raises(ModelNotFound, match="leaves out what stands before the tensors"):
            swarm.add(0, 2, folder="some")
        assert not weights_folder(manifest.fingerprint).exists()
        swarm.add(0, 6, share_weights=True)
        peer = swarm.add(0, 2, folder="some")
        assert computes_as(peer.span, file)


def test_the_model_id_distinguishes_two_models_of_the_same_name(
    folder: Path, node: DhtDirectory, tmp_path: Path
) -> None:
    other = random_checkpoint("llama", tmp_path / "other" / "shared-llama", hidden=128, seed=1)
    with local_swarm(folder, [(0, 6)], node=node, share_weights=True) as swarm:
        second = swarm.add(0, 6, folder=other, share_weights=True)
        with pytest.raises(ModelNotFound, match=r"2 models of this swarm are called shared-llama: give --model-id"):
            swarm.add(0, 1, folder="shared-llama")
        peer = swarm.add(0, 1, folder="shared-llama", model_id=second.checkpoint.fingerprint)
        assert computes_as(peer.span, other)


def test_an_invited_peer_shares_no_local_model(folder: Path, tmp_path: Path) -> None:
    """The model may be a local folder that exists nowhere else: it is no model of the swarm, and is not shared."""
    private = random_checkpoint("llama", tmp_path / "private", hidden=128, seed=7)
    key = SwarmKey.generate()
    with local_swarm(folder, [(0, 6)], node=None, swarm_key=key) as swarm:
        address = [swarm.peers[0].join_address]
        with pytest.raises(ModelNotFound, match="give it as MODEL"):
            swarm.add(0, 2, folder=private, join=address, swarm_key=key, invited=True)
        guest = swarm.add(0, 2, join=address, swarm_key=key, invited=True)
        assert not guest.weights.shares() and swarm.peers[0].weights.shares()
        # A stranger may know the fingerprint and name it in an invitation.
        expected = Checkpoint.open(private).fingerprint
        guest = swarm.add(0, 2, folder=private, join=address, swarm_key=key, invited=True, model_id=expected)
        assert not guest.weights.shares()
