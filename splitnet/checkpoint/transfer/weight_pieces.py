"""The pieces of a model on this machine: in a whole checkpoint, or in a folder that is filled from peers and the hub.

Such a folder is in the user's cache, under the model's fingerprint. It holds files in the format of a checkpoint, with
holes for missing pieces, so that the same code reads them; a file that lists the written pieces; and the manifest. The
list of written pieces only shows which pieces to check: each piece is hashed, once per process, before it is used.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from splitnet.checkpoint.transfer.manifest import PIECE_BYTES, Manifest, digest, piece_count
from splitnet.errors import ModelNotFound, ProtocolError, SplitnetError
from splitnet.paths import cache_folder
from splitnet.wire.messages import DIGEST_BYTES

MANIFEST_FILE: Final = "splitnet.manifest"
WRITTEN_FILE: Final = "splitnet.written"
_FIX: Final = "free some space, or set SPLITNET_CACHE to another folder"
_STORED: Final = re.compile(r"[A-Z0-9_]{1,16}")


@dataclass(frozen=True)
class TensorLocation:
    """The bytes of a tensor, or of a part of a weight, in a file; `stored` is the file's name of its type."""

    file: str
    offset: int
    nbytes: int
    stored: str
    shape: tuple[int, ...]


class TensorFiles(Protocol):
    """The locations of the tensors of a checkpoint. `splitnet.checkpoint.store.TensorStore` gives the other
    contents."""

    def tensor_locations(self) -> Mapping[str, TensorLocation]:
        """All tensors in the files by name; a weight may be several tensors. Raises ModelNotFound: a file is missing or
        incomplete."""
        ...

    def file_heads(self) -> Mapping[str, int]:
        """Files that are needed beyond their tensors: name -> bytes before the first tensor."""
        ...

    def local_file(self, file: str) -> Path | None:
        """The local path of a file; None: it is only on the hub."""
        ...


class HeldPieces:
    """Finds and reads the pieces of a manifest in the files of a checkpoint. Raises ProtocolError: the manifest is
    inconsistent."""

    def __init__(self, manifest: Manifest, store: TensorFiles) -> None:
        self.manifest = manifest
        self._store = store
        places = store.tensor_locations()
        begins = [(places[tensor.name].file, places[tensor.name].offset) for tensor in manifest.tensors]
        begins += [(file, 0) for file in store.file_heads()]
        # A stranger claims the number of pieces, so pieces have no objects.
        self._parts = [(file, at, pieces.nbytes) for (file, at), pieces in zip(begins, manifest.parts, strict=True)]
        counts = [piece_count(nbytes) for _, _, nbytes in self._parts]
        # The first slot of each part, and the number of slots. A slot is the index of a piece in the manifest.
        self._first = [0, *accumulate(counts)]
        digests = b"".join(pieces.digests for pieces in manifest.parts)
        self._names = np.frombuffer(digests, f"S{DIGEST_BYTES}")
        # Slots sorted by digest; the same bytes may be in several slots.
        self._order = np.argsort(self._names, kind="stable")
        self._sorted = self._names[self._order]
        sizes = np.full(len(self), PIECE_BYTES, np.int64)
        for first, (_, _, nbytes) in zip(self._first, self._parts, strict=False):
            if nbytes:
                last = piece_count(nbytes) - 1
                sizes[first + last] = nbytes - last * PIECE_BYTES
        sizes = sizes[self._order]
        if ((self._sorted[1:] == self._sorted[:-1]) & (sizes[1:] != sizes[:-1])).any():
            raise ProtocolError("a manifest has pieces of two sizes with the same digest")

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def piece_names(self) -> Iterator[bytes]:
        """The digests of all pieces, each once."""
        begins = np.append(True, self._sorted[1:] != self._sorted[:-1])[: len(self)]
        return (self.name_of(slot) for slot in self._order[begins].tolist())

    def name_of(self, slot: int) -> bytes:
        return self._names[slot : slot + 1].tobytes()

    def slots_of(self, name: bytes) -> NDArray[np.int64]:
        """The slots of a piece in the manifest; empty if the manifest lacks the piece."""
        if len(name) != DIGEST_BYTES:
            return self._order[:0]
        key = np.frombuffer(name, self._names.dtype)
        low, high = (int(np.searchsorted(self._sorted, key, side)[0]) for side in ("left", "right"))
        return self._order[low:high]

    def has_piece(self, slot: int) -> bool:
        """Whether the piece in a slot is on this machine."""
        return self._store.local_file(self.where(slot)[0]) is not None

    def bits(self) -> bytes:
        """The bitmap of the pieces on this machine, in the format of `WeightsKind.HELD`."""
        return np.packbits(self._have(), bitorder="little").tobytes()

    def _have(self) -> NDArray[np.uint8]:
        """1 for each piece on this machine, 0 for others."""
        here = {file: self._store.local_file(file) is not None for file in {file for file, _, _ in self._parts}}
        return np.repeat([np.uint8(here[file]) for file, _, _ in self._parts], np.diff(self._first))

    def read_piece(self, name: bytes) -> bytes | None:
        """A piece; None if it is not on this machine, or its bytes have changed."""
        for slot in self._held_of(self.slots_of(name)):
            data = self._read_slot(slot)
            if digest(data) == name:
                return data
        return None

    def _held_of(self, slots: NDArray[np.int64]) -> Iterator[int]:
        return (slot for slot in slots.tolist() if self.has_piece(slot))

    def where(self, slot: int) -> tuple[str, int, int]:
        """File, offset and bytes of a piece."""
        part = bisect_right(self._first, slot) - 1
        file, begin, nbytes = self._parts[part]
        at = (slot - self._first[part]) * PIECE_BYTES
        return file, begin + at, min(PIECE_BYTES, nbytes - at)

    def _read_slot(self, slot: int) -> bytes:
        file, offset, size = self.where(slot)
        path = self._store.local_file(file)
        try:
            assert path is not None
            with path.open("rb") as opened:
                opened.seek(offset)
                return opened.read(size)
        except OSError:
            return b""


Fetch = Callable[[Mapping[bytes, int]], None]
"""Called with digests and bytes of missing pieces: writes all of them, or raises a SplitnetError."""


class WeightFolder(HeldPieces):
    """A folder that is filled piece by piece. See `make_folder`. `fetch`: fetches missing pieces; None: missing pieces
    are an error. `fetched`: bytes that this process has written."""

    def __init__(self, path: Path, manifest: Manifest, store: TensorFiles) -> None:
        super().__init__(manifest, store)
        self.path = path
        self.fetch: Fetch | None = None
        self.fetched = 0
        self._checked = bytearray(len(self))
        self._part_of = {tensor.name: part for part, tensor in enumerate(manifest.tensors)}
        # The slots of pieces that are being fetched. Other slots with the same bytes are not written.
        self._wanted: dict[bytes, list[int]] = {}
        try:
            written = (path / WRITTEN_FILE).read_bytes() if (path / WRITTEN_FILE).exists() else b""
            if len(written) != len(self):
                written = bytes(len(self))
                (path / WRITTEN_FILE).write_bytes(written)
        except OSError as error:
            raise _cannot_write(path, error) from None
        self._written = np.frombuffer(bytearray(written), np.uint8)

    def has_piece(self, slot: int) -> bool:
        return bool(self._written[slot])

    def _have(self) -> NDArray[np.uint8]:
        return self._written

    def _held_of(self, slots: NDArray[np.int64]) -> Iterator[int]:
        return iter(slots[self._written[slots] != 0].tolist())

    def supply(self, names: Iterable[str]) -> None:
        """Makes sure that all bytes of these tensors are present and correct, and writes nothing else. Raises
        SplitnetError: pieces are missing and unavailable, or the disk has no room."""
        missing = [slot for slot in self._slots(names) if not self._is_right(slot)]
        if not missing:
            return
        check_room(self.path, sum(self.where(slot)[2] for slot in missing))
        wanted: dict[bytes, list[int]] = {}
        for slot in missing:
            wanted.setdefault(self.name_of(slot), []).append(slot)
        for name in list(wanted):  # the bytes may be in another slot of the model
            if (data := self.read_piece(name)) is not None:
                self._write_slots(wanted.pop(name), data)
        if not wanted:
            return
        if self.fetch is None:
            raise ModelNotFound(
                f"{len(wanted)} pieces of the weights in {self.path} are missing: to fetch them from peers, give the "
                "model and --join instead of this folder"
            )
        self._wanted |= wanted
        self.fetch({name: self.where(some[0])[2] for name, some in wanted.items()})

    def holds(self, names: Iterable[str]) -> bool:
        """Whether all bytes of these tensors were written."""
        return all(self.has_piece(slot) for slot in self._slots(names))

    def _slots(self, names: Iterable[str]) -> Iterator[int]:
        for part in map(self._part_of.__getitem__, names):
            yield from range(self._first[part], self._first[part + 1])

    def write_piece(self, name: bytes, data: bytes | memoryview) -> None:
        """Writes a piece, whose digest was checked, to the slots that need it. Raises SplitnetError: the disk is full,
        or cannot be written."""
        self._write_slots(self._wanted.pop(name, []), data)
        self.fetched += len(data)

    def _write_slots(self, slots: Sequence[int], data: bytes | memoryview) -> None:
        try:
            for slot in slots:
                file, offset, size = self.where(slot)
                assert size == len(data)
                with (self.path / file).open("r+b") as opened:
                    opened.seek(offset)
                    opened.write(data)
                with (self.path / WRITTEN_FILE).open("r+b") as opened:
                    opened.seek(slot)
                    opened.write(b"\1")
                self._written[slot] = self._checked[slot] = 1
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def _is_right(self, slot: int) -> bool:
        if not self._checked[slot]:
            if not (self._written[slot] and digest(self._read_slot(slot)) == self.name_of(slot)):
                return False
            self._checked[slot] = 1
        return True


def weights_folder(fingerprint: str) -> Path:
    """The folder for the pieces of a model."""
    return cache_folder() / "weights" / fingerprint


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder that `make_folder` made; None: it is another folder. Raises ModelNotFound: the manifest
    is damaged."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        return Manifest.unpack(file.read_bytes())
    except (OSError, ProtocolError) as error:
        raise ModelNotFound(f"{file} cannot be read: remove the folder, and it is fetched again ({error})") from error


def make_folder(manifest: Manifest, heads: Sequence[bytes], check: Callable[[Path], None]) -> Path:
    """Makes the folder of a model, without its tensors; returns the path to open as a checkpoint. heads: the bytes
    before the tensors in each of its files, where `manifest` has heads. check: called with the path to open before the
    folder is used; an exception that it raises ends the call. Raises SplitnetError if the folder cannot be written."""
    path = weights_folder(manifest.fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as new:
            made = Path(new) / "folder"
            made.mkdir()
            if manifest.heads:
                for number, (head, data) in enumerate(zip(manifest.heads, heads, strict=True), 1):
                    _write_sparse(made / _gguf_name(number, len(heads)), data, head.file_bytes)
            else:
                (made / "config.json").write_text(manifest.config, encoding="utf-8")
                data = _safetensors_head(manifest)
                _write_sparse(made / "model.safetensors", data, len(data) + manifest.nbytes)
            check(made / _gguf_name(1, len(heads)) if heads else made)
            (made / MANIFEST_FILE).write_bytes(manifest.pack())
            try:
                made.replace(path)
            except OSError:  # another process was first, or a damaged folder exists
                if read_manifest(path) is None:
                    shutil.rmtree(path)
                    made.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    return model_file(path, manifest)


def model_file(folder: Path, manifest: Manifest) -> Path:
    """The path of a filled folder to open as a checkpoint."""
    return folder / _gguf_name(1, len(manifest.heads)) if manifest.heads else folder


def check_room(folder: Path, nbytes: int) -> None:
    """Raises SplitnetError if the disk has no room for `nbytes` more bytes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise SplitnetError(
            f"{nbytes / 2**30:.1f} GiB of weights do not fit in {folder}, where {free / 2**30:.1f} GiB are free: {_FIX}"
        )


def _gguf_name(number: int, count: int) -> str:
    return "model.gguf" if count == 1 else f"model-{number:05}-of-{count:05}.gguf"


def _write_sparse(file: Path, head: bytes, size: int) -> None:
    with file.open("wb") as opened:
        opened.write(head)
        opened.truncate(size)


def _safetensors_head(manifest: Manifest) -> bytes:
    """The header of one file with all tensors, in order. See https://github.com/huggingface/safetensors#format."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in manifest.tensors:
        if not _STORED.fullmatch(tensor.stored):
            raise ProtocolError(f"there is no type {tensor.stored!r} in safetensors")
        end = at + tensor.pieces.nbytes
        header[tensor.name] = {"dtype": tensor.stored, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _cannot_write(path: Path, error: OSError) -> SplitnetError:
    return SplitnetError(f"weights cannot be kept in {path} ({error.strerror or error}): {_FIX}")
