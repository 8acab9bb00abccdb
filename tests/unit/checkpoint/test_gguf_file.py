"""Damaged or hostile GGUF files are refused; codes decode to the same numbers as in the `gguf` package."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from splitnet.checkpoint.gguf.file import BLOCK_TYPES, GgufFile, layout_of, read_codes
from splitnet.errors import UnsupportedModel

FLOAT16_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}
"""Byte offsets of the float16 numbers in a block, for the types whose offsets are not the usual ones: 0, or 0 and 2."""


def random_rows(stored: GGMLQuantizationType, outputs: int, inputs: int) -> np.ndarray:
    """Random bits with finite scales."""
    rng = np.random.default_rng(int(stored))
    size, nbytes = GGML_QUANT_SIZES[stored]
    blocks = rng.integers(0, 256, (outputs, inputs // size, nbytes), dtype=np.uint8)
    two = stored.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    for at in FLOAT16_AT.get(stored.name, (0, 2) if two else (0,)):
        numbers = rng.normal(size=blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)
    return blocks.reshape(outputs, -1)


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
    """A stranger may supply these bytes as the head of a file."""
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 42)
    began = time.process_time()
    with pytest.raises(UnsupportedModel, match="not a complete GGUF file"):
        GgufFile(path)
    assert time.process_time() - began < 10.0


@pytest.mark.parametrize("stored", BLOCK_TYPES, ids=lambda stored: stored.name)
def test_codes_decode_as_in_gguf(stored: GGMLQuantizationType) -> None:
    rows = random_rows(stored, 5, 512)
    layout = layout_of(stored, "weight")
    found = read_codes(stored, rows)
    assert found.codes.shape == (5, 512)
    assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**layout.bits
    expected = torch.from_numpy(gguf.dequantize(rows, stored))
    assert torch.equal(found.to_floats(layout), expected)


@pytest.mark.parametrize("stored", [one for one in BLOCK_TYPES if one.name[-1] in "01"], ids=lambda stored: stored.name)
def test_weights_that_gguf_quantises(stored: GGMLQuantizationType) -> None:
    weight = np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32)
    rows = gguf.quantize(weight, stored)
    expected = torch.from_numpy(gguf.dequantize(rows, stored))
    assert torch.equal(read_codes(stored, rows).to_floats(layout_of(stored, "weight")), expected)


def test_a_layout_takes_about_the_bytes_of_the_file() -> None:
    for stored, block in BLOCK_TYPES.items():
        size, nbytes = GGML_QUANT_SIZES[stored]
        of_file = 64 * 1024 // size * nbytes
        assert of_file <= block.layout.nbytes(64, 1024) <= 1.2 * of_file, stored.name


def test_other_types_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_up\.weight is stored as IQ2_XXS"):
        layout_of(GGMLQuantizationType.IQ2_XXS, "blk.0.ffn_up.weight")
