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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from splitnet.errors import ModelNotFound, ProtocolError, SplitnetError
from splitnet.model.demo import cache_folder
from splitnet.weights.manifest import Manifest, digest

if TYPE_CHECKING:
    from splitnet.model.tensor_store import TensorStore

MANIFEST_FILE: Final = "splitnet.manifest"
WRITTEN_FILE: Final = "splitnet.written"
_FIX: Final = "free some space, or set SPLITNET_CACHE to another folder"
_STORED: Final = re.compile(r"[A-Z0-9_]{1,16}")


class HeldPieces:
    """Where the pieces of a manifest stand in the files of a checkpoint.

    Args:
        manifest: of the checkpoint.
        store: its files.

    Attributes:
        manifest: of the checkpoint.

    Raises:
        ProtocolError: the manifest is of nothing that can be.
    """

    def __init__(self, manifest: Manifest, store: TensorStore) -> None:
        self.manifest = manifest
        self._store = store
        places = store.places()
        parts = [(places[tensor.name].file, places[tensor.name].offset) for tensor in manifest.tensors]
        parts += [(file, 0) for file in store.heads()]
        self._where: list[tuple[str, int, int]] = []
        """Of each piece, in the order of the manifest: file, offset and bytes."""
        self._slots: dict[bytes, list[int]] = {}
        """By digest; the same bytes may stand in several places."""
        for (file, begin), pieces in zip(parts, manifest.parts, strict=True):
            for name, offset, size in pieces.each():
                slots = self._slots.setdefault(name, [])
                if slots and self._where[slots[0]][2] != size:
                    raise ProtocolError("a manifest has pieces of two sizes that are said to be the same")
                slots.append(len(self._where))
                self._where.append((file, begin + offset, size))

    def __len__(self) -> int:
        return len(self._where)

    @property
    def names(self) -> Iterable[bytes]:
        """The digests of all pieces."""
        return self._slots

    def has(self, slot: int) -> bool:
        """Whether the piece at this place of the manifest is here."""
        return self._store.local_file(self._where[slot][0]) is not None

    def bits(self) -> bytes:
        """Which pieces are here, as `WeightsKind.HELD` says it."""
        return np.packbits(self._have(), bitorder="little").tobytes()

    def _have(self) -> NDArray[np.uint8]:
        """1 for each piece that is here."""
        here = {file: self._store.local_file(file) is not None for file in {file for file, _, _ in self._where}}
        return np.fromiter((here[file] for file, _, _ in self._where), np.uint8, len(self))

    def read(self, name: bytes) -> bytes | None:
        """A piece; None if it is not here, or is not what it was."""
        for slot in self._slots.get(name, ()):
            if self.has(slot):
                data = self._read(slot)
                if digest(data) == name:
                    return data
        return None

    def _read(self, slot: int) -> bytes:
        file, offset, size = self._where[slot]
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
    """A folder that is filled piece by piece. See `open_folder` and `make_folder`.

    Attributes:
        path: of the folder.
        fetch: gets what is missing; None: that is an error.
        fetched: bytes that were written by this process.
    """

    def __init__(self, path: Path, manifest: Manifest, store: TensorStore) -> None:
        super().__init__(manifest, store)
        self.path = path
        self.fetch: Fetch | None = None
        self.fetched = 0
        self._checked = bytearray(len(self))
        try:
            written = (path / WRITTEN_FILE).read_bytes() if (path / WRITTEN_FILE).exists() else b""
            if len(written) != len(self):
                written = bytes(len(self))
                (path / WRITTEN_FILE).write_bytes(written)
        except OSError as error:
            raise _cannot_write(path, error) from None
        self._written = bytearray(written)

    def has(self, slot: int) -> bool:
        return bool(self._written[slot])

    def _have(self) -> NDArray[np.uint8]:
        return np.frombuffer(bytes(self._written), np.uint8)

    def supply(self, names: Iterable[str]) -> None:
        """Makes sure that all bytes of these tensors are here, and right.

        Raises:
            SplitnetError: some are missing and cannot be had.
        """
        tensors = self.manifest.by_name
        self.need({piece: size for name in names for piece, _, size in tensors[name].pieces.each()})

    def need(self, pieces: Mapping[bytes, int]) -> None:
        """The same for pieces: digest -> bytes."""
        missing = {name: size for name, size in pieces.items() if not self._is_right(name)}
        if not missing:
            return
        if self.fetch is None:
            raise ModelNotFound(
                f"{len(missing)} pieces of the weights in {self.path} are missing: they come from peers, give the "
                "model and --join instead of this folder"
            )
        self.fetch(missing)

    def write(self, name: bytes, data: bytes | memoryview) -> None:
        """Keeps a piece whose digest was checked.

        Raises:
            SplitnetError: the disk is full, or the like.
        """
        try:
            for slot in self._slots[name]:
                file, offset, size = self._where[slot]
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
        self.fetched += len(data)

    def _is_right(self, name: bytes) -> bool:
        for slot in self._slots[name]:
            if not self._checked[slot]:
                if not (self._written[slot] and digest(self._read(slot)) == name):
                    return False
                self._checked[slot] = 1
        return True


def weights_folder(fingerprint: str) -> Path:
    """Where the pieces of a model are kept."""
    return cache_folder() / "weights" / fingerprint


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder that is filled; None: it is another folder.

    Raises:
        ModelNotFound: the file is damaged.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        return Manifest.unpack(file.read_bytes())
    except (OSError, ProtocolError) as error:
        raise ModelNotFound(f"{file} cannot be read: remove the folder, it is fetched again ({error})") from error


def make_folder(manifest: Manifest, heads: Sequence[bytes], check: Callable[[Path], None]) -> Path:
    """Makes the folder of a model, with nothing of its tensors.

    Args:
        manifest: of the model.
        heads: what stands before the tensors in each of its files, where `manifest` has heads.
        check: called with the file or folder to open before it counts; what it raises ends this.

    Returns:
        What to open as a checkpoint.

    Raises:
        SplitnetError: it cannot be written.
    """
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
