"""Manifests, their fingerprints, cached digests, and files with holes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from peers.joined_swarm import _check_layout
from splitnet.blocks.block_sizes import check_file_bytes
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint, open_store
from splitnet.checkpoint.transfer import hashing
from splitnet.checkpoint.transfer.hashing import make_manifest
from splitnet.checkpoint.transfer.manifest import (
    MAX_HEAD_BYTES,
    PIECE_BYTES,
    FileHead,
    Manifest,
    Pieces,
    Tensor,
    digest,
)
from splitnet.checkpoint.transfer.manifest_search import headers_differ
from splitnet.checkpoint.transfer.weight_pieces import WeightFolder, make_folder
from splitnet.errors import ModelNotFound, ProtocolError, SplitnetError
from splitnet.wire.fields import packb, unpack_array
from tests.unit.checkpoint.test_gguf_architectures import LLAMA_3
from tests.unit.gguf_writing import write_gguf
from tests.unit.random_models import random_checkpoint


def pieces_of(data: bytes) -> Pieces:
    return Pieces(len(data), b"".join(digest(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)))


sizes = st.one_of(st.integers(0, 64), st.sampled_from([PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES]))
pieces = st.builds(lambda size, byte: pieces_of(bytes([byte]) * size), sizes, st.integers(0, 255))
tensors = st.builds(
    Tensor, st.text("ab.", min_size=1, max_size=4), st.sampled_from(["F32", "BF16"]), st.just((2, 3)), pieces
)
manifests = st.builds(
    lambda config, some, heads: Manifest(config, tuple(sorted(some, key=lambda one: one.name)), tuple(heads)),
    st.text(max_size=9),
    st.lists(tensors, unique_by=lambda one: one.name, max_size=4),
    st.lists(st.builds(lambda one: FileHead(one.nbytes + 5, one), pieces), max_size=2),
)


@given(manifests)
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    again = Manifest.unpack(manifest.pack())
    assert again == manifest and again.fingerprint == manifest.fingerprint
    for one in manifest.parts:
        assert sum(size for _, _, size in one.each()) == one.nbytes
        assert b"".join(name for name, _, _ in one.each()) == one.digests


@given(manifests, st.data())
def test_a_manifest_from_a_stranger_is_refused_or_another_one(manifest: Manifest, data: st.DataObject) -> None:
    packed = bytearray(manifest.pack())
    where = data.draw(st.integers(0, len(packed) - 1))
    packed[where : where + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        changed = Manifest.unpack(bytes(packed))
    except ProtocolError:
        return
    same = dataclasses.replace(changed, heads=()) == dataclasses.replace(manifest, heads=())
    assert (changed.fingerprint == manifest.fingerprint) == same


def test_a_fingerprint_covers_all_of_a_tensor_and_is_stable() -> None:
    one = Tensor("a", "F16", (2, 3), pieces_of(b"1234"))
    changes: list[dict[str, Any]] = [
        {},
        {"name": "b"},
        {"stored": "BF16"},
        {"shape": (3, 2)},
        {"pieces": pieces_of(b"1235")},
    ]
    manifests = [Manifest("{}", (dataclasses.replace(one, **change),)) for change in changes]
    assert len({each.fingerprint for each in [*manifests, Manifest("{ }", (one,))]}) == len(manifests) + 1
    assert manifests[0].fingerprint == "62de952fd4bd1d93a8a0bc659b0a850d8ef1eea64cc01eeade18733332076391"


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.reverse(),
        lambda rows: rows.append(rows[-1]),
        lambda rows: rows[0].__setitem__(0, "line\nbreak"),
        lambda rows: rows[0].__setitem__(2, [-1]),
        lambda rows: rows[0].__setitem__(3, 1 << 60),
        lambda rows: rows[0].__setitem__(4, b"short"),
        lambda rows: rows[0].__setitem__(0, []),
        lambda rows: rows[0].__setitem__(2, [[]]),
        lambda rows: rows[0].append([]),
        lambda rows: rows.__setitem__(0, 7),
    ],
)
def test_invalid_manifests_are_refused(change: Callable[[Any], Any]) -> None:
    some = (Tensor("a", "F32", (1,), pieces_of(b"1234")), Tensor("b", "F32", (1,), pieces_of(b"5678")))
    values = unpack_array(Manifest("{}", some).pack(), most_items=9, most_text=99, most_bytes=99)
    change(values[2])
    with pytest.raises(ProtocolError):
        Manifest.unpack(packb(values))


def test_heads_are_bounded() -> None:
    """These bytes are fetched into memory; the same piece may occur any number of times."""
    pieces = Pieces(MAX_HEAD_BYTES // 2 + PIECE_BYTES, bytes(32) * (MAX_HEAD_BYTES // 2 // PIECE_BYTES + 1))
    head = FileHead(1 << 40, pieces)
    assert Manifest.unpack(Manifest("{}", (), (head,)).pack()).heads == (head,)
    with pytest.raises(ProtocolError, match="before the tensors"):
        Manifest.unpack(Manifest("{}", (), (head, head)).pack())


def test_models_of_many_experts_have_manifests() -> None:
    """Kimi K2: 60 blocks, 384 experts, 3 matrices, and in NVFP4 4 tensors each."""
    count = 60 * 384 * 3 * 4
    packed = packb(["splitnet weights 1", "{}", [], []])
    tensors = b"\xdd" + count.to_bytes(4, "big")  # no tensor follows
    with pytest.raises(ProtocolError) as told:
        Manifest.unpack(packed[:-2] + tensors)
    with pytest.raises(ProtocolError) as too_many:
        Manifest.unpack(packed[:-2] + tensors.replace(count.to_bytes(4, "big"), (1 << 30).to_bytes(4, "big")))
    assert str(told.value) != str(too_many.value)


@pytest.mark.parametrize("where", ["name", "shape", "row", "tensors"])
def test_lists_of_lists_from_a_stranger_take_no_memory(where: str) -> None:
    many = 1 << 20
    row: list[Any] = ["a", "F32", [1], 4, bytes(32)]
    packed = packb(["splitnet weights 1", "{}", [row], []])
    lists = b"\xdd" + many.to_bytes(4, "big") + b"\x90" * many
    was = {"name": packb(["a"])[1:], "shape": packb([1]), "row": packb(row), "tensors": packb([row])}[where]
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            Manifest.unpack(packed.replace(was, lists, 1))
        assert tracemalloc.get_traced_memory()[1] < 8 * many
    finally:
        tracemalloc.stop()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "tiny")


def test_every_byte_counts(folder: Path, tmp_path: Path) -> None:
    """The byte may be at the beginning, in the middle or at the end of a tensor."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    store = open_store(folder)
    place = max(store.tensor_locations().values(), key=lambda one: one.nbytes)
    shard = copy / place.file
    data = bytearray(shard.read_bytes())
    data[place.offset + place.nbytes // 2] ^= 1
    shard.write_bytes(data)
    assert Checkpoint.open(copy).fingerprint != Checkpoint.open(folder).fingerprint


def test_digests_are_kept_until_a_file_changes(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "KEPT_BYTES", 1)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first = make_manifest(open_store(copy))
    assert first.fingerprint == make_manifest(open_store(folder)).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(hashing._FileHasher, "_hash", lambda *_: pytest.fail("a file was read again"))
        assert make_manifest(open_store(copy)) == first
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(1, 1))
    assert make_manifest(open_store(copy)).fingerprint != first.fingerprint
    for kept in (cache / "digests").iterdir():
        kept.write_text(kept.read_text().replace('"ranges"', '"other"'))  # damaged
    assert make_manifest(open_store(copy)).fingerprint != first.fingerprint


def test_digests_of_a_file_that_changes_meanwhile_are_not_kept(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a file is, for example, still being downloaded."""
    monkeypatch.setattr(hashing, "KEPT_BYTES", 1)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    honest, changed = hashing._FileHasher._hash, set[Path]()

    def hash_and_change(self: Any, opened: Any, file: str, offset: int, size: int) -> bytes:
        found = honest(self, opened, file, offset, size)
        shard = copy / file
        if shard not in changed:
            changed.add(shard)
            with shard.open("r+b") as writing:
                writing.seek(offset)
                writing.write(bytes(size))
            os.utime(shard, ns=(1, 1))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hashing._FileHasher, "_hash", hash_and_change)
        make_manifest(open_store(copy))
    found = make_manifest(open_store(copy))
    shutil.rmtree(cache)
    assert make_manifest(open_store(copy)) == found


def test_progress_is_reported_for_many_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    make_manifest(open_store(folder), lambda *both: told.append(both))
    assert not told
    monkeypatch.setattr(hashing, "SHOWN_BYTES", 1)
    manifest = make_manifest(open_store(folder), lambda *both: told.append(both))
    assert told[-1] == (manifest.nbytes, manifest.nbytes) and told == sorted(told)


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "split"])
def test_a_folder_with_holes_is_the_same_model(kind: str, folder: Path, tmp_path: Path, cache: Path) -> None:
    """Its blocks can be read as soon as their pieces are present, and not before."""
    path = folder
    if kind != "safetensors":
        split = 20 if kind == "split" else 0
        path = write_gguf(folder, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0, split=split)
    whole = Checkpoint.open(path)
    manifest, source = whole.manifest(), whole.held_pieces()
    store = whole.store
    heads = [store.open_file(file).read(nbytes) for file, nbytes in store.file_heads().items()]
    made = make_folder(manifest, heads, lambda new: assert_same(manifest, new))
    filled = Checkpoint.open(made)
    assert filled.fingerprint == whole.fingerprint and filled.store.tensor_names
    held = filled.store.folder
    assert isinstance(held, WeightFolder)
    with pytest.raises(ModelNotFound, match=r"are missing"):
        Span.load(filled, 0, 1)
    asked: dict[bytes, int] = {}

    def fetch(missing: Any) -> None:
        asked.update(missing)
        for name in missing:
            data = source.read_piece(name)
            assert data is not None
            held.write_piece(name, data)

    held.fetch = fetch
    Span.load(filled, 2, 4)
    names = {tensor.name for block in whole.block_tensors[2:4] for tensor in block}
    needed = sum(facts.nbytes for facts in whole.store.tensor_facts(names).values())
    assert sum(asked.values()) == needed == held.fetched
    assert sum(bits.bit_count() for bits in held.bits()) < sum(bits.bit_count() for bits in source.bits())


def test_tensors_that_are_part_of_a_config_are_not_read_from_holes(tmp_path: Path, cache: Path) -> None:
    """An example is the factors of Llama 3's rotary embedding."""
    folder = random_checkpoint("llama", tmp_path / "tiny", rope_parameters=LLAMA_3, max_position_embeddings=131_072)
    whole = Checkpoint.open(write_gguf(folder, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0))
    manifest, source, store = whole.manifest(), whole.held_pieces(), whole.store
    heads = [store.open_file(file).read(nbytes) for file, nbytes in store.file_heads().items()]
    made = make_folder(manifest, heads, lambda new: assert_same(manifest, new))
    with pytest.raises(ModelNotFound, match=r"are missing"):
        Checkpoint.open(made)
    files = open_store(made)
    held = files.folder
    assert held is not None

    def fetch(missing: Any) -> None:
        for name in missing:
            data = source.read_piece(name)
            assert data is not None
            held.write_piece(name, data)

    held.fetch = fetch
    assert Checkpoint.of(files).config.rope_parameters == whole.config.rope_parameters
    assert Checkpoint.open(made).config.rope_parameters == whole.config.rope_parameters


def test_pieces_of_two_sizes_are_not_the_same(tmp_path: Path, cache: Path) -> None:
    """Otherwise one piece would be written over the bytes after the other."""
    same = bytes(32)
    some = (Tensor("a", "I8", (8,), Pieces(8, same)), Tensor("b", "I8", (4,), Pieces(4, same)))
    with pytest.raises(ProtocolError, match="two sizes"):
        make_folder(manifest_of(some), (), lambda path: _check_layout(manifest_of(some), path))


def test_a_piece_that_stands_in_many_places_is_kept_where_it_is_needed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a stranger, who claims the number of places, fills the disk with one piece; needed bytes are counted
    first."""
    data, times = bytes([7]) * PIECE_BYTES, 64
    some = tuple(
        Tensor(name, "U8", (count * PIECE_BYTES,), Pieces(count * PIECE_BYTES, digest(data) * count))
        for name, count in (("filler", times), ("needed", 1))
    )
    path = make_folder(manifest_of(some), (), lambda path: None)
    held = open_store(path).folder
    assert held is not None
    fetched: list[int] = []

    def fetch(missing: Any) -> None:
        fetched.append(sum(missing.values()))
        held.write_piece(digest(data), data)

    def on_disk() -> int:
        return sum(512 * file.stat().st_blocks for file in path.iterdir())

    held.fetch = fetch
    before = on_disk()
    held.supply(["needed"])
    assert on_disk() - before < 2 * PIECE_BYTES and fetched == [PIECE_BYTES]
    assert sum(bits.bit_count() for bits in held.bits()) == 1 and held.read_piece(digest(data)) == data
    with monkeypatch.context() as patch:
        free = PIECE_BYTES * (times - 1)
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2 * free, free, free))
        with pytest.raises(SplitnetError, match=r"0\.1 GiB of weights do not fit"):
            held.supply(["filler"])
    held.supply(["filler"])
    assert fetched == [PIECE_BYTES], "it is here already"
    assert open_store(path).folder.read_piece(digest(data)) == data  # type: ignore[union-attr]


def test_a_piece_that_was_damaged_on_the_disk_is_fetched_again(tmp_path: Path, cache: Path) -> None:
    data = bytes([7]) * 100
    path = make_folder(manifest_of((Tensor("a", "U8", (100,), pieces_of(data)),)), (), lambda path: None)
    fetched: list[bytes] = []

    def supply() -> WeightFolder:
        """The state after a start: a piece is known to be written, but was not checked."""
        held = open_store(path).folder
        assert isinstance(held, WeightFolder)

        def fetch(missing: Any) -> None:
            fetched.extend(missing)
            held.write_piece(digest(data), data)

        held.fetch = fetch
        held.supply(["a"])
        return held

    supply()
    held = supply()
    assert fetched == [digest(data)]
    file, offset, _ = held.where(0)
    with (path / file).open("r+b") as opened:
        opened.seek(offset + 50)
        opened.write(b"x")
    assert supply().read_piece(digest(data)) == data and len(fetched) == 2


def test_a_manifest_of_many_pieces_takes_little_more_than_its_bytes(tmp_path: Path, cache: Path) -> None:
    count = 1 << 17
    tensor = Tensor("a", "U8", (count * PIECE_BYTES,), Pieces(count * PIECE_BYTES, os.urandom(32 * count)))
    packed = manifest_of((tensor,)).pack()
    path = make_folder(manifest_of((tensor,)), (), lambda path: None)
    del tensor
    tracemalloc.start()
    try:
        manifest = Manifest.unpack(packed)
        held = WeightFolder(path, manifest, open_store(path))
        assert len(held) == count and held.slots_of(held.name_of(count - 1)).tolist() == [count - 1]
        assert tracemalloc.get_traced_memory()[1] < 8 * len(packed)
    finally:
        tracemalloc.stop()


def test_blocks_take_no_more_in_files_than_the_config_says(folder: Path, tmp_path: Path, cache: Path) -> None:
    """A stranger supplies both, and the bytes of blocks are written to disk."""
    whole = Checkpoint.open(folder)
    check_file_bytes(whole)
    manifest = whole.manifest()
    size = 20 * PIECE_BYTES
    large = Tensor("model.layers.1.mlp.more.weight", "U8", (size,), Pieces(size, bytes(32) * 20))
    told = dataclasses.replace(manifest, tensors=tuple(sorted((*manifest.tensors, large), key=lambda one: one.name)))
    with pytest.raises(ModelNotFound, match=r"block 1 of .* takes 20 MiB"):
        check_file_bytes(Checkpoint.open(make_folder(told, (), lambda path: None)))


def manifest_of(some: tuple[Tensor, ...]) -> Manifest:
    return Manifest('{"model_type": "llama"}', some)


def assert_same(manifest: Manifest, new: Path) -> None:
    assert headers_differ(manifest, open_store(new)) == ""


def test_a_contradicting_header_is_noticed(folder: Path, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(folder, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    other = write_gguf(folder, tmp_path / "other.gguf", GGMLQuantizationType.Q8_0, attention__head_count_kv=1)
    manifest = Checkpoint.open(path).manifest()
    assert headers_differ(manifest, open_store(other)) == "the config differs"
    config = json.loads(open_store(path).told_config())
    assert config["general.architecture"] == "llama"
