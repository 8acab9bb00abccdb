"""GGUF files that are damaged, or that strangers tell of."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from splitnet.checkpoint.gguf.file import GgufFile
from splitnet.errors import UnsupportedModel


def _metadata(*counts: int) -> bytes:
    return b"GGUF" + struct.pack("<I2Q", 3, *counts)


@pytest.mark.parametrize(
    "head",
    [
        _metadata(0, 1 << 40),
        _metadata(1 << 40, 0),
        _metadata(0, 1) + struct.pack("<QIIQ", 0, 9, 8, 1 << 40),  # a list of strings
        _metadata(0, 1) + struct.pack("<QIIQ", 0, 9, 9, 1 << 40),  # a list of lists
        _metadata(0, 1) + struct.pack("<Q", 4 << 30),  # a long name
        _metadata(1, 0) + struct.pack("<QI", 0, 1 << 30),  # many dimensions
    ],
)
def test_metadata_of_a_file_with_holes_end(head: bytes, tmp_path: Path) -> None:
    """As a stranger may tell what stands before the tensors."""
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 42)
    began = time.process_time()
    with pytest.raises(UnsupportedModel, match="not a complete GGUF file"):
        GgufFile(path)
    assert time.process_time() - began < 10.0
