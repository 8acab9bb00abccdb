"""The pieces of a model that are on this machine: in a whole checkpoint, or in a folder that others fill.

Such a folder is in the user's cache, under the fingerprint of the model. It holds files as those of a checkpoint, with
holes where pieces are missing, so that the same code reads them; a file that says which pieces were written; and the
manifest. What the second says is believed for nothing but what to look at: pieces are hashed before they are used, once
in a process.
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
class Place:
    """Where the bytes of a tensor, or part of a weight, stand in a file; `stored` is its type as the file has it."""

    file: str
    offset: int
    nbytes: int
    stored: str
    shape: tuple[int, ...]


class TensorFiles(Protocol):
    """Where the tensors of a checkpoint stand; what else its files hold: `splitnet.checkpoint.store.TensorStore`."""

    def places(self) -> Mapping[str, Place]:
        """All tensors in the files by name, which may be parts of weights. Raises ModelNotFound: a file is missing or
        not complete."""
        ...

    def heads(self) -> Mapping[str, int]:
        """Files of which more than their tensors is needed: name -> bytes before the first tensor."""
        ...

    def local_file(self, file: str) -> Path | None:
        """Where a file is on this machine; None: on the hub only."""
        ...


class HeldPieces:
    """Where the pieces of a manifest stand in the files of a checkpoint. Raises ProtocolError: the manifest is of
    nothing that can be."""

    def __init__(self, manifest: Manifest, store: TensorFiles) -> None:
        self.manifest = manifest
        self._store = store
        places = store.places()
        begins = [(places[tensor.name].file, places[tensor.name].offset) for tensor in manifest.tensors]
        begins += [(file, 0) for file in store.heads()]
        # A stranger says how many pieces there are, so none has an object of its own.
        self._parts = [(file, at, pieces.nbytes) for (file, at), pieces in zip(begins, manifest.parts, strict=True)]
        counts = [piece_count(nbytes) for _, _, nbytes in self._parts]
        # The first slot of each part; then the number of slots, which are the pieces in the order of the manifest.
        self._first = [0, *accumulate(counts)]
        digests = b"".join(pieces.digests for pieces in manifest.parts)
        self._names = np.frombuffer(digests, f"S{DIGEST_BYTES}")
        # Slots by digest; the same bytes may stand in several places.
        self._order = np.argsort(self._names, kind="stable")
        self._sorted = self._names[self._order]
        sizes = np.full(len(self), PIECE_BYTES, np.int64)
        for first, (_, _, nbytes) in zip(self._first, self._parts, strict=False):
            if nbytes:
                last = piece_count(nbytes) - 1
                sizes[first + last] = nbytes - last * PIECE_BYTES
        sizes = sizes[self._order]
        if ((self._sorted[1:] == self._sorted[:-1]) & (sizes[1:] != sizes[:-1])).any():
            raise ProtocolError("a manifest has pieces of two sizes that are said to be the same")

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def names(self) -> Iterator[bytes]:
        """The digests of all pieces, each once."""
        begins = np.append(True, self._sorted[1:] != self._sorted[:-1])[: len(self)]
        return (self.name_of(slot) for slot in self._order[begins].tolist())

    def name_of(self, slot: int) -> bytes:
        return self._names[slot : slot + 1].tobytes()

    def slots_of(self, name: bytes) -> NDArray[np.int64]:
        """Where a piece stands in the manifest; nowhere, if it is none of these."""
        if len(name) != DIGEST_BYTES:
            return self._order[:0]
        key = np.frombuffer(name, self._names.dtype)
        low, high = (int(np.searchsorted(self._sorted, key, side)[0]) for side in ("left", "right"))
        return self._order[low:high]

    def has(self, slot: int) -> bool:
        """Whether the piece at this place of the manifest is here."""
        return self._store.local_file(self.where(slot)[0]) is not None

    def bits(self) -> bytes:
        """Which pieces are here, as `WeightsKind.HELD` says it."""
        return np.packbits(self._have(), bitorder="little").tobytes()

    def _have(self) -> NDArray[np.uint8]:
        """1 for each piece that is here."""
        here = {file: self._store.local_file(file) is not None for file in {file for file, _, _ in self._parts}}
        return np.repeat([np.uint8(here[file]) for file, _, _ in self._parts], np.diff(self._first))

    def read(self, name: bytes) -> bytes | None:
        """A piece; None if it is not here, or is not what it was."""
        for slot in self._held_of(self.slots_of(name)):
            data = self._read(slot)
            if digest(data) == name:
                return data
        return None

    def _held_of(self, slots: NDArray[np.int64]) -> Iterator[int]:
        return (slot for slot in slots.tolist() if self.has(slot))

    def where(self, slot: int) -> tuple[str, int, int]:
        """File, offset and bytes of a piece."""
        part = bisect_right(self._first, slot) - 1
        file, begin, nbytes = self._parts[part]
        at = (slot - self._first[part]) * PIECE_BYTES
        return file, begin + at, min(PIECE_BYTES, nbytes - at)

    def _read(self, slot: int) -> bytes:
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
"""Called with digests and bytes of pieces that are needed: writes all of them, or raises a SplitnetError."""


class WeightFolder(HeldPieces):
    """A folder that is filled piece by piece. See `make_folder`. `fetch`: gets what is missing; None: that is an error.
    `fetched`: bytes that were written by this process."""

    def __init__(self, path: Path, manifest: Manifest, store: TensorFiles) -> None:
        super().__init__(manifest, store)
        self.path = path
        self.fetch: Fetch | None = None
        self.fetched = 0
        self._checked = bytearray(len(self))
        self._part_of = {tensor.name: part for part, tensor in enumerate(manifest.tensors)}
        # The slots of pieces that are being fetched; others of the same bytes stay holes.
        self._wanted: dict[bytes, list[int]] = {}
        try:
            written = (path / WRITTEN_FILE).read_bytes() if (path / WRITTEN_FILE).exists() else b""
            if len(written) != len(self):
                written = bytes(len(self))
                (path / WRITTEN_FILE).write_bytes(written)
        except OSError as error:
            raise _cannot_write(path, error) from None
        self._written = np.frombuffer(bytearray(written), np.uint8)

    def has(self, slot: int) -> bool:
        return bool(self._written[slot])

    def _have(self) -> NDArray[np.uint8]:
        return self._written

    def _held_of(self, slots: NDArray[np.int64]) -> Iterator[int]:
        return iter(slots[self._written[slots] != 0].tolist())

    def supply(self, names: Iterable[str]) -> None:
        """Makes sure that all bytes of these tensors are here, and right, and nothing else is written. Raises
        SplitnetError: some are missing and cannot be had, or there is no room for them."""
        missing = [slot for slot in self._slots(names) if not self._is_right(slot)]
        if not missing:
            return
        check_room(self.path, sum(self.where(slot)[2] for slot in missing))
        wanted: dict[bytes, list[int]] = {}
        for slot in missing:
            wanted.setdefault(self.name_of(slot), []).append(slot)
        for name in list(wanted):  # what stands elsewhere in the model, too
            if (data := self.read(name)) is not None:
                self._keep(wanted.pop(name), data)
        if not wanted:
            return
        if self.fetch is None:
            raise ModelNotFound(
                f"{len(wanted)} pieces of the weights in {self.path} are missing: they come from peers, give the "
                "model and --join instead of this folder"
            )
        self._wanted |= wanted
        self.fetch({name: self.where(some[0])[2] for name, some in wanted.items()})

    def holds(self, names: Iterable[str]) -> bool:
        """Whether all bytes of these tensors were written."""
        return all(self.has(slot) for slot in self._slots(names))

    def _slots(self, names: Iterable[str]) -> Iterator[int]:
        for part in map(self._part_of.__getitem__, names):
            yield from range(self._first[part], self._first[part + 1])

    def write(self, name: bytes, data: bytes | memoryview) -> None:
        """Keeps a piece whose digest was checked where it is needed. Raises SplitnetError: the disk is full, or the
        like."""
        self._keep(self._wanted.pop(name, []), data)
        self.fetched += len(data)

    def _keep(self, slots: Sequence[int], data: bytes | memoryview) -> None:
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
            if not (self._written[slot] and digest(self._read(slot)) == self.name_of(slot)):
                return False
            self._checked[slot] = 1
        return True


def weights_folder(fingerprint: str) -> Path:
    """Where the pieces of a model are kept."""
    return cache_folder() / "weights" / fingerprint


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder that is filled; None: it is another folder. Raises ModelNotFound: the file is
    damaged."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        return Manifest.unpack(file.read_bytes())
    except (OSError, ProtocolError) as error:
        raise ModelNotFound(f"{file} cannot be read: remove the folder, it is fetched again ({error})") from error


def make_folder(manifest: Manifest, heads: Sequence[bytes], check: Callable[[Path], None]) -> Path:
    """Makes the folder of a model, with nothing of its tensors; returns what to open as a checkpoint. heads: what
    stands before the tensors in each of its files, where `manifest` has heads. check: called with the file or folder to
    open before it counts; what it raises ends this. Raises SplitnetError if it cannot be written."""
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
            except OSError:  # another process was first, or a damaged one is in the way
                if read_manifest(path) is None:
                    shutil.rmtree(path)
                    made.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    return model_file(path, manifest)


def model_file(folder: Path, manifest: Manifest) -> Path:
    """What to open of a folder that is filled."""
    return folder / _gguf_name(1, len(manifest.heads)) if manifest.heads else folder


def check_room(folder: Path, nbytes: int) -> None:
    """Raises SplitnetError if the disk has no room for so many more bytes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise SplitnetError(
            f"{nbytes / 2**30:.1f} GiB of weights are to be kept in {folder}, where {free / 2**30:.1f} GiB are free: "
            f"{_FIX}"
        )


def _gguf_name(number: int, count: int) -> str:
    return "model.gguf" if count == 1 else f"model-{number:05}-of-{count:05}.gguf"


def _write_sparse(file: Path, head: bytes, size: int) -> None:
    with file.open("wb") as opened:
        opened.write(head)
        opened.truncate(size)


def _safetensors_head(manifest: Manifest) -> bytes:
    """Of one file with all tensors, in order. See https://github.com/huggingface/safetensors#format."""
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
