"""Digests of the tensors in files. Digests are cached, so that a file that does not change is hashed once."""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from splitnet.checkpoint.store import Progress, TensorStore
from splitnet.checkpoint.transfer.manifest import PIECE_BYTES, FileHead, Manifest, Pieces, Tensor, digest
from splitnet.errors import ModelNotFound, ProtocolError
from splitnet.paths import cache_folder, keep_file

Range = tuple[int, int]  # offset and bytes

KEPT_BYTES: Final = 16 << 20  # digests of smaller files are not cached, because reading these files is as fast
SHOWN_BYTES: Final = 256 << 20  # progress is reported if more bytes must be read
_RUN_BYTES: Final = 8 * PIECE_BYTES  # bytes that one thread reads at a time
_THREADS: Final = min(4, os.cpu_count() or 1)
_REQUESTS: Final = 16
_STAMP: Final = 1  # version of the cache format
_DIGESTS: Final = "the digests of weights"


def make_manifest(store: TensorStore, progress: Progress | None = None) -> Manifest:
    """Reads all tensors of a checkpoint whose digests are not cached. Raises ModelNotFound: a file is missing or
    incomplete."""
    places = dict(sorted(store.tensor_locations().items()))
    ranges: dict[str, set[Range]] = defaultdict(set)
    for place in places.values():
        ranges[place.file].add((place.offset, place.nbytes))
    heads = store.file_heads()
    for file, nbytes in heads.items():
        ranges[file].add((0, nbytes))
    digests = hash_ranges(store, {file: sorted(those) for file, those in ranges.items()}, progress)
    tensors = tuple(
        Tensor(name, at.stored, at.shape, Pieces(at.nbytes, digests[at.file][at.offset, at.nbytes]))
        for name, at in places.items()
    )
    told: list[FileHead] = []
    for file, nbytes in heads.items():
        path = store.local_file(file)
        assert path is not None
        told.append(FileHead(path.stat().st_size, Pieces(nbytes, digests[file][0, nbytes])))
    return Manifest(store.told_config(), tensors, tuple(told))


def hash_ranges(
    store: TensorStore, ranges: dict[str, list[Range]], progress: Progress | None = None
) -> dict[str, dict[Range, bytes]]:
    """The joined digests of the pieces of byte ranges, by file. Raises as `make_manifest`."""
    kept = {file: _KeptDigests.of_file(store.local_file(file)) for file in ranges}
    known: dict[str, dict[Range, bytes]] = {}
    for file, wanted in ranges.items():
        digests = found.digests if (found := kept[file]) is not None else {}
        known[file] = {one: digests[one] for one in wanted if one in digests}
    missing = {file: [one for one in wanted if one not in known[file]] for file, wanted in ranges.items()}
    reading = _FileHasher(store, sum(nbytes for some in missing.values() for _, nbytes in some), progress)
    for file, wanted in missing.items():
        if wanted:
            known[file].update(reading.digests_of(file, wanted))
            before, after = kept[file], _KeptDigests.of_file(store.local_file(file))
            # The file did not change while it was read.
            if after is not None and before is not None and after.about == before.about:
                after.write_digests(known[file])
    return known


def kept_manifest(commit: str) -> Manifest | None:
    """The cached manifest of a commit at the hub; None: there is none. `commit`: see `TensorStore.commit`."""
    if not commit:
        return None
    try:
        return Manifest.unpack(_manifest_file(commit).read_bytes())
    except (OSError, ProtocolError):
        return None


def keep_manifest(commit: str, manifest: Manifest) -> None:
    """Caches the manifest of a commit, so that later starts need not request it or read the files again."""
    if commit:
        keep_file(_manifest_file(commit), manifest.pack(), _DIGESTS)


def forget_manifest(commit: str) -> None:
    """Removes the cached manifest of a commit that belongs to another model."""
    if commit:
        with suppress(OSError):
            _manifest_file(commit).unlink(missing_ok=True)


def _manifest_file(commit: str) -> Path:
    return cache_folder() / "manifests" / digest(commit.encode()).hex()[:32]


class _FileHasher:
    def __init__(self, store: TensorStore, total: int, progress: Progress | None) -> None:
        self._store = store
        self._total = total
        self._done = 0
        self._progress = progress if total >= SHOWN_BYTES else None

    def digests_of(self, file: str, ranges: Sequence[Range]) -> dict[Range, bytes]:
        """The joined digests of ranges, in the order of their offsets."""
        # Pieces that one thread reads in order: range, offset and bytes.
        runs: list[list[tuple[Range, int, int]]] = []
        room = 0
        for one in ranges:
            for at in range(0, one[1], PIECE_BYTES):
                if room <= 0:
                    runs.append([])
                    room = _RUN_BYTES
                size = min(PIECE_BYTES, one[1] - at)
                runs[-1].append((one, one[0] + at, size))
                room -= size
        own = threading.local()
        opened: list[BinaryIO] = []

        def hash_run(run: list[tuple[Range, int, int]]) -> list[bytes]:
            if not hasattr(own, "file"):
                own.file = self._store.open_file(file)
                opened.append(own.file)
            return [self._hash(own.file, file, offset, size) for _, offset, size in run]

        found: dict[Range, list[bytes]] = {one: [] for one in ranges}
        pool = ThreadPoolExecutor(min(len(runs), _REQUESTS if self._store.local_file(file) is None else _THREADS) or 1)
        try:
            for run, digests in zip(runs, pool.map(hash_run, runs), strict=True):
                for (one, _, size), it in zip(run, digests, strict=True):
                    found[one].append(it)
                    self._done += size
                if self._progress is not None:
                    self._progress(self._done, self._total)
        except OSError as error:
            raise ModelNotFound(f"{file} of {self._store.name} cannot be read: check the disk or network") from error
        finally:
            pool.shutdown(cancel_futures=True)
            for one in opened:
                one.close()
        return {one: b"".join(digests) for one, digests in found.items()}

    def _hash(self, opened: BinaryIO, file: str, offset: int, size: int) -> bytes:
        opened.seek(offset)
        data = opened.read(size)
        if len(data) != size:
            raise ModelNotFound(f"{file} of {self._store.name} is not complete: download it again")
        return digest(data)


class _KeptDigests:
    """The cached digests of one file; they are valid while its size and modification time stay the same."""

    def __init__(self, path: Path, status: os.stat_result) -> None:
        self.about = {"stamp": _STAMP, "path": str(path), "size": status.st_size, "changed": status.st_mtime_ns}
        self._file = cache_folder() / "digests" / f"{digest(str(path).encode()).hex()[:32]}.json"
        self.digests: dict[Range, bytes] = {}
        try:
            kept: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            if {key: kept.get(key) for key in self.about} == self.about:
                found = {(int(at), int(size)): bytes.fromhex(it) for at, size, it in kept["ranges"]}
                self.digests = {one: it for one, it in found.items() if _fits(one, it)}
        except (OSError, ValueError, TypeError, KeyError):
            pass

    @classmethod
    def of_file(cls, path: Path | None) -> _KeptDigests | None:
        """The cached digests of a file; None: the file is too small, or does not exist."""
        if path is None:
            return None
        try:
            path = path.resolve()
            status = path.stat()
        except OSError:
            return None
        return cls(path, status) if status.st_size >= KEPT_BYTES else None

    def write_digests(self, digests: dict[Range, bytes]) -> None:
        content = {**self.about, "ranges": [[*one, it.hex()] for one, it in (self.digests | digests).items()]}
        keep_file(self._file, json.dumps(content).encode(), _DIGESTS)


def _fits(one: Range, digests: bytes) -> bool:
    try:
        Pieces.from_fields(one[1], digests)
    except ProtocolError:
        return False
    return True
