"""The manifest of a model's weights: for each tensor its name, type, shape and the SHA-256 of its pieces.

The SHA-256 of the tensors and of the config is the model's fingerprint: peers with the same fingerprint have the same
bytes in all tensors, whatever the order of tensors in files. With a fingerprint, a peer can check a stranger's
manifest, and with the manifest each piece.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from splitnet.errors import ProtocolError
from splitnet.wire.fields import ValueReader, packb
from splitnet.wire.messages import DIGEST_BYTES, MAX_PART_BYTES, MAX_WEIGHTS_BYTES

PIECE_BYTES: Final = MAX_PART_BYTES  # bytes of a piece; the last piece of a tensor may be shorter
MAX_MANIFEST_BYTES: Final = MAX_WEIGHTS_BYTES // 2
"""Enough for 4 TB of weights. Decoding a manifest takes memory of three times its bytes, plus a little per tensor."""

MAX_HEAD_BYTES: Final = 256 << 20
"""Maximum bytes before the tensors in all files together. These bytes are metadata and a vocabulary, and are fetched
into memory."""

_MARK: Final = "splitnet weights 1"
_MAX_TENSORS: Final = 1 << 19
"""Kimi K2 has 277,000 tensors if each matrix of an expert has three scales, as in NVFP4."""
_MAX_FILES: Final = 1 << 16
_MAX_NAME: Final = 512
_MAX_CONFIG: Final = 1 << 20
_MAX_BYTES: Final = 1 << 44
_MAX_DIMENSIONS: Final = 16


def digest(data: bytes | memoryview) -> bytes:
    """The SHA-256 of data."""
    return hashlib.sha256(data).digest()


def piece_count(nbytes: int) -> int:
    """The number of pieces of `nbytes` bytes."""
    return -(-nbytes // PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Bytes that are identified by the joined digests of their pieces."""

    nbytes: int
    digests: bytes

    def each(self) -> Iterator[tuple[bytes, int, int]]:
        """Digest, offset and bytes of every piece."""
        for index, at in enumerate(range(0, self.nbytes, PIECE_BYTES)):
            name = self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
            yield name, at, min(PIECE_BYTES, self.nbytes - at)

    @classmethod
    def from_fields(cls, nbytes: Any, digests: Any) -> Pieces:
        """Checks both values. Raises ProtocolError if they are invalid."""
        if type(nbytes) is not int or not 0 <= nbytes <= _MAX_BYTES or type(digests) is not bytes:
            raise ProtocolError("expected a number of bytes, and digests")
        if len(digests) != DIGEST_BYTES * piece_count(nbytes):
            raise ProtocolError("expected a digest for each piece")
        return cls(nbytes, digests)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor in the files; `stored` is the files' name of its type."""

    name: str
    stored: str
    shape: tuple[int, ...]
    pieces: Pieces


@dataclass(frozen=True)
class FileHead:
    """The bytes before the tensors in a GGUF file of `file_bytes` bytes."""

    file_bytes: int
    pieces: Pieces


@dataclass(frozen=True)
class Manifest:
    """The tensors of a model, and the heads of its files."""

    config: str  # the part of the config that distinguishes models, as JSON
    tensors: tuple[Tensor, ...]  # in the order of their names
    # Heads of the files of a GGUF model, in order; empty: the files are safetensors. Heads give the order of tensors in
    # files, and are not part of the fingerprint.
    heads: tuple[FileHead, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """The model's fingerprint: 64 hex digits."""
        told: list[Any] = [
            [tensor.name, tensor.stored, list(tensor.shape), tensor.pieces.nbytes, digest(tensor.pieces.digests)]
            for tensor in self.tensors
        ]
        return digest(packb([_MARK, self.config, told])).hex()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.pieces.nbytes for tensor in self.tensors)

    @property
    def parts(self) -> Iterator[Pieces]:
        """The pieces of all tensors, then of all heads."""
        yield from (tensor.pieces for tensor in self.tensors)
        yield from (head.pieces for head in self.heads)

    def pack(self) -> bytes:
        """Encodes the manifest for messages and for the cache."""
        tensors: list[Any] = [
            [one.name, one.stored, list(one.shape), one.pieces.nbytes, one.pieces.digests] for one in self.tensors
        ]
        heads: list[Any] = [[head.file_bytes, head.pieces.nbytes, head.pieces.digests] for head in self.heads]
        return packb([_MARK, self.config, tensors, heads])

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Manifest:
        """Decodes a result of `pack` from an untrusted sender. Raises ProtocolError: the data are invalid."""
        values = ValueReader(data, most_text=_MAX_CONFIG, most_bytes=MAX_MANIFEST_BYTES)
        if values.array(4) != 4 or values.value() != _MARK:
            raise ProtocolError("not the manifest of a model that this version of splitnet reads")
        config = values.value()
        if type(config) is not str:
            raise ProtocolError("expected a config")
        tensors = tuple(_tensor(values) for _ in range(values.array(_MAX_TENSORS)))
        heads = tuple(_head(values) for _ in range(values.array(_MAX_FILES)))
        values.check_end()
        if sum(head.pieces.nbytes for head in heads) > MAX_HEAD_BYTES:
            raise ProtocolError("there are more bytes before the tensors than metadata take")
        manifest = cls(config, tensors, heads)
        names = [tensor.name for tensor in manifest.tensors]
        if names != sorted(set(names)):
            raise ProtocolError("tensors of a manifest are in the order of their names")
        return manifest


def _begin_row(values: ValueReader, width: int) -> None:
    if values.array(width) != width:
        raise ProtocolError(f"expected rows of {width} values")


def _tensor(values: ValueReader) -> Tensor:
    _begin_row(values, 5)
    name, stored = values.value(), values.value()
    for text in (name, stored):
        if type(text) is not str or not 0 < len(text) <= _MAX_NAME or not text.isprintable():
            raise ProtocolError("expected a name")
    shape = tuple(values.value() for _ in range(values.array(_MAX_DIMENSIONS)))
    if any(type(size) is not int or not 0 <= size <= _MAX_BYTES for size in shape):
        raise ProtocolError("expected a shape")
    return Tensor(name, sys.intern(stored), shape, Pieces.from_fields(values.value(), values.value()))


def _head(values: ValueReader) -> FileHead:
    _begin_row(values, 3)
    file_bytes, nbytes, digests = values.value(), values.value(), values.value()
    head = FileHead(file_bytes, Pieces.from_fields(nbytes, digests))
    if type(file_bytes) is not int or not nbytes <= file_bytes <= _MAX_BYTES:
        raise ProtocolError("expected the head of a file")
    return head
