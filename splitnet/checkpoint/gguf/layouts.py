"""The types in which GGUF files store weights: their layouts, and how codes are read from their bytes.

A row is a sequence of blocks; a block holds the scales and the codes of 32 or 256 inputs. Source of the packings: the
`dequantize_blocks` methods of the `gguf` package (gguf/quants.py), against which the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from splitnet.errors import UnsupportedModel
from splitnet.quant.stored import Codes, Kind, Layout

Bytes = npt.NDArray[np.uint8]
_Type = GGMLQuantizationType


@dataclass(frozen=True)
class BlockType:
    """A type whose values are stored as codes.

    Attributes:
        unpack: `[outputs, blocks, bytes of a block]` -> codes and what belongs to them.
    """

    layout: Layout
    unpack: Callable[[Bytes], Codes]


def plain_dtype(stored: GGMLQuantizationType) -> torch.dtype | None:
    """The dtype of numbers that are stored as such; None if the type stores codes."""
    return _PLAIN.get(stored)


def layout_of(stored: GGMLQuantizationType, tensor: str) -> Layout:
    """The layout of a type that stores codes.

    Args:
        tensor: its name, for the message.

    Raises:
        UnsupportedModel: the type is not known.
    """
    if stored not in BLOCK_TYPES:
        known = ", ".join(one.name for one in (*_PLAIN, *BLOCK_TYPES))
        raise UnsupportedModel(
            f"{tensor} is stored as {stored.name}, which splitnet does not read: take a GGUF file with {known}"
        )
    return BLOCK_TYPES[stored].layout


def read_codes(stored: GGMLQuantizationType, rows: Bytes) -> Codes:
    """The codes of rows of one of `BLOCK_TYPES`.

    Args:
        rows: `[outputs, bytes of a row]`.
    """
    _, block_bytes = GGML_QUANT_SIZES[stored]
    return BLOCK_TYPES[stored].unpack(rows.reshape(len(rows), -1, block_bytes))


def _tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """`[outputs, ...]` with all that belongs to an output in one row."""
    return torch.from_numpy(np.ascontiguousarray(array).reshape(len(array), -1))


def _float16(blocks: Bytes, at: int) -> torch.Tensor:
    return _tensor(np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16))


def _shifted(packed: Bytes, width: int, per_byte: int) -> Bytes:
    """`[..., bytes]` -> `[..., per_byte, bytes]`: fields of `width` bits, the lowest first."""
    shifts = np.arange(0, per_byte * width, width, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8(2**width - 1)


def _in_runs(packed: Bytes, run: int, width: int, per_byte: int) -> Bytes:
    """Codes of which the first `run` lie in the lowest bits of `run` bytes, the next in the next bits, and so on."""
    shape = packed.shape[:-1]
    return _shifted(packed.reshape(*shape, -1, run), width, per_byte).reshape(*shape, -1)


def _high_bits(blocks: Bytes) -> Bytes:
    """32 bits in four bytes, one for each code."""
    return np.unpackbits(blocks, axis=-1, bitorder="little")


def _q8_0(blocks: Bytes) -> Codes:
    return Codes(_tensor(blocks[..., 2:] ^ np.uint8(128)), _float16(blocks, 0))


def _q4_0(blocks: Bytes) -> Codes:
    return Codes(_tensor(_in_runs(blocks[..., 2:], 16, 4, 2)), _float16(blocks, 0))


def _q4_1(blocks: Bytes) -> Codes:
    return Codes(_tensor(_in_runs(blocks[..., 4:], 16, 4, 2)), _float16(blocks, 0), _float16(blocks, 2))


def _q5_0(blocks: Bytes) -> Codes:
    codes = _in_runs(blocks[..., 6:], 16, 4, 2) | (_high_bits(blocks[..., 2:6]) << np.uint8(4))
    return Codes(_tensor(codes), _float16(blocks, 0))


def _q5_1(blocks: Bytes) -> Codes:
    codes = _in_runs(blocks[..., 8:], 16, 4, 2) | (_high_bits(blocks[..., 4:8]) << np.uint8(4))
    return Codes(_tensor(codes), _float16(blocks, 0), _float16(blocks, 2))


def _mxfp4(blocks: Bytes) -> Codes:
    return Codes(_tensor(_in_runs(blocks[..., 1:], 16, 4, 2)), _tensor(blocks[..., :1]))


def _q2_k(blocks: Bytes) -> Codes:
    steps = blocks[..., :16]
    return Codes(
        _tensor(_in_runs(blocks[..., 16:80], 32, 2, 4)),
        _tensor(steps & np.uint8(15)),
        _tensor(steps >> np.uint8(4)),
        _float16(blocks, 80),
        -_float16(blocks, 82),
    )


def _q3_k(blocks: Bytes) -> Codes:
    codes = _in_runs(blocks[..., 32:96], 32, 2, 4) | (_in_runs(blocks[..., :32], 32, 1, 8) << np.uint8(2))
    packed = blocks[..., 96:108]
    steps = _in_runs(packed[..., :8], 8, 4, 2) | (_in_runs(packed[..., 8:], 4, 2, 4) << np.uint8(4))
    return Codes(_tensor(codes), _tensor(steps.view(np.int8) - np.int8(32)), scale_units=_float16(blocks, 108))


def _steps_of_6_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight steps of the scales and of the zeros, from 12 bytes."""
    low, zero, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    last = ((low >> np.uint8(2)) & np.uint8(0x30)) | (rest & np.uint8(15))
    last_zero = ((zero >> np.uint8(2)) & np.uint8(0x30)) | (rest >> np.uint8(4))
    six = np.uint8(0x3F)
    return np.concatenate([low & six, last], axis=-1), np.concatenate([zero & six, last_zero], axis=-1)


def _q4_k(blocks: Bytes) -> Codes:
    steps, zeros = _steps_of_6_bits(blocks[..., 4:16])
    codes = _in_runs(blocks[..., 16:], 32, 4, 2)
    return Codes(_tensor(codes), _tensor(steps), _tensor(zeros), _float16(blocks, 0), -_float16(blocks, 2))


def _q5_k(blocks: Bytes) -> Codes:
    steps, zeros = _steps_of_6_bits(blocks[..., 4:16])
    codes = _in_runs(blocks[..., 48:], 32, 4, 2) | (_in_runs(blocks[..., 16:48], 32, 1, 8) << np.uint8(4))
    return Codes(_tensor(codes), _tensor(steps), _tensor(zeros), _float16(blocks, 0), -_float16(blocks, 2))


def _q6_k(blocks: Bytes) -> Codes:
    codes = _in_runs(blocks[..., :128], 64, 4, 2) | (_in_runs(blocks[..., 128:192], 32, 2, 4) << np.uint8(4))
    steps = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return Codes(_tensor(codes), _tensor(steps), scale_units=_float16(blocks, 208))


def _iq4_xs(blocks: Bytes) -> Codes:
    high = np.ascontiguousarray(blocks[..., 2:4]).view(np.uint16)
    high = (high >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
    low = _shifted(blocks[..., 4:8], 4, 2)  # of each byte both
    low = low.swapaxes(-1, -2).reshape(high.shape)
    steps = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    return Codes(_tensor(_in_runs(blocks[..., 8:], 16, 4, 2)), _tensor(steps), scale_units=_float16(blocks, 0))


_PLAIN = {
    _Type.F32: torch.float32,
    _Type.F16: torch.float16,
    _Type.BF16: torch.bfloat16,
}

_F16 = Kind.FLOAT16
_STEPS = Kind.STEPS

BLOCK_TYPES = {
    _Type.Q4_0: BlockType(Layout(4, 32, _F16, offset=8), _q4_0),
    _Type.Q4_1: BlockType(Layout(4, 32, _F16, _F16), _q4_1),
    _Type.Q5_0: BlockType(Layout(5, 32, _F16, offset=16), _q5_0),
    _Type.Q5_1: BlockType(Layout(5, 32, _F16, _F16), _q5_1),
    _Type.Q8_0: BlockType(Layout(8, 32, _F16, offset=128), _q8_0),
    _Type.Q2_K: BlockType(Layout(2, 16, _STEPS, _STEPS), _q2_k),
    _Type.Q3_K: BlockType(Layout(3, 16, _STEPS, offset=4), _q3_k),
    _Type.Q4_K: BlockType(Layout(4, 32, _STEPS, _STEPS), _q4_k),
    _Type.Q5_K: BlockType(Layout(5, 32, _STEPS, _STEPS), _q5_k),
    _Type.Q6_K: BlockType(Layout(6, 16, _STEPS, offset=32), _q6_k),
    _Type.IQ4_NL: BlockType(Layout(4, 32, _F16, table="iq4_nl"), _q4_0),
    _Type.IQ4_XS: BlockType(Layout(4, 32, _STEPS, table="iq4_nl"), _iq4_xs),
    _Type.MXFP4: BlockType(Layout(4, 32, Kind.E8M0, table="e2m1"), _mxfp4),
}
"""Types that store codes."""
