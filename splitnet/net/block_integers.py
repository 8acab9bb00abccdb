"""Quantising blocks of 64 floats to 8, 6 or 4 bits, exactly reproducible.

A block holds one bfloat16 scale and 64 signed codes. A plain block writes each value as the nearest `code * scale`. A
rotated block is multiplied by an orthonormal Hadamard matrix first, which spreads an outlier evenly over the block
(QuaRot, arXiv:2404.00456); a code then stands for `(code + 0.5) * scale`, so that all `2**bits` levels are used. (Plain
blocks need a level at zero: next to an outlier, zero is the best that can be said of the other values.)

The signs of the values are flipped by a fixed pattern before the rotation, a bent function, whose Walsh spectrum is
flat: so a block of equal values is spread as evenly as a single outlier, and does not meet the missing zero level.

The rotation is exact: values are first rounded to a grid so fine (2**-17 of the block's largest magnitude or finer)
that every sum of 64 of them is exact in float32; on the way back the codes are small integers plus one half. Hence the
result depends neither on the order in which a BLAS adds, nor on the batch, the number of threads or the machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.uint16]  # the bits of a bfloat16, never negative

BLOCK = 64  # values that share one scale, and the size of the rotation
SCALE_BYTES = 2
LARGEST_SCALE = 0x7200  # the bits of 2**101: above every scale that `quantise` returns
_LARGEST = 2.0**100  # larger magnitudes are refused: no model has them, and it keeps every decoded value finite
_SMALLEST = np.float32(2.0**-100)  # blocks of smaller magnitudes become zeros
SMALL_BATCH = 64  # blocks; a product of so few rows does not wake the threads of a BLAS, which would then spin


def quantise(values: Floats, bits: int, rotate: bool) -> tuple[Scales, Codes]:
    """Return the scales `[blocks, 1]` and codes `[blocks, 64]` of `values`, `[blocks, 64]`, at least one block.

    Raises:
        OverflowError: a value is inf, NaN or of a magnitude above 2**100.
    """
    peak = _peak(values)
    if not float(peak.max()) < _LARGEST:  # also true of NaN
        raise OverflowError
    is_zero = peak < _SMALLEST
    peak = np.maximum(peak, _SMALLEST)
    if rotate:
        # With p the power of two at or below the peak, floats near 96 p are 2**-17 p apart: so adding and subtracting
        # 96 p rounds each value to a multiple of that, and 64 values below 2 p sum up to at most 2**24 such multiples.
        anchor: Floats = (peak.view(np.int32) & np.int32(0x7F800000)).view(np.float32) * np.float32(96)
        values = _product((values + anchor) - anchor, _ROTATION)
        peak = np.maximum(_peak(values), _SMALLEST)
    levels = 2 ** (bits - 1) - (0 if rotate else 1)
    # The next bfloat16 strictly above the smallest scale that covers the peak, so that no code overflows.
    scale = (peak * np.float32(1 / levels)).view(np.uint32) + np.uint32(0x10000)
    scale &= np.uint32(0xFFFF0000)
    codes = values / scale.view(np.float32)
    if rotate:
        np.floor(codes, out=codes)
    else:
        np.rint(codes, out=codes)
    scale[is_zero] = 0
    return (scale >> np.uint32(16)).astype(np.uint16), codes.astype(np.int8)


def dequantise(scales: Scales, codes: Codes, rotate: bool) -> Floats:
    """Return the values `[blocks, 64]` of scales `[blocks, 1]` and codes `[blocks, 64]`."""
    values = codes.astype(np.float32)
    if rotate:
        values += np.float32(0.5)
        values = _product(values, _ROTATION_BACK)
    values *= from_bfloat16(scales)
    return values


def from_bfloat16(bits: Scales) -> Floats:
    """Return the float32 values of bfloat16 bits."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def pack(codes: Codes, bits: int) -> Bytes:
    """Pack codes `[blocks, 64]` into `[blocks, 8 * bits]` bytes.

    4 bits: byte i holds code i (low) and code 32 + i (high). 6 bits: byte 16 j + i holds code 16 j + i in its low six
    bits and the j-th pair of bits, lowest first, of code 48 + i in its high two.
    """
    unsigned = codes.view(np.uint8)
    if bits == 8:
        return unsigned
    if bits == 4:
        return np.bitwise_or(unsigned[:, :32] & np.uint8(15), unsigned[:, 32:] << np.uint8(4))
    shared = (unsigned[:, None, 48:] >> _SIX_BIT_SHIFTS) << np.uint8(6)
    return np.bitwise_or((unsigned[:, :48] & np.uint8(63)).reshape(-1, 3, 16), shared).reshape(-1, 48)


def unpack(packed: Bytes, bits: int) -> Codes:
    """Undo `pack`."""
    if bits == 8:
        return packed.view(np.int8)
    if bits == 4:
        unsigned = np.concatenate((packed & np.uint8(15), packed >> np.uint8(4)), axis=1)
    else:
        shared = (packed.reshape(-1, 3, 16) >> np.uint8(6)) << _SIX_BIT_SHIFTS
        unsigned = np.concatenate((packed & np.uint8(63), np.bitwise_or.reduce(shared, axis=1)), axis=1)
    sign = np.int8(1 << (bits - 1))
    return np.subtract(unsigned.view(np.int8) ^ sign, sign)


_SIX_BIT_SHIFTS = np.array([[0], [2], [4]], np.uint8)


def _signed_hadamard() -> Floats:
    """Return Sylvester's orthonormal Hadamard matrix, its rows negated where the bent function is 1."""
    index = np.arange(BLOCK)
    exponent = index & (index >> 1) & 0b010101  # row i: i0 i1 + i2 i3 + i4 i5, as separate bits
    entries = (index[:, None] & index) ^ exponent[:, None]
    return np.array([[(-1) ** bin(entry).count("1") for entry in row] for row in entries], np.float32) / np.float32(8)


_ROTATION = _signed_hadamard()
_ROTATION_BACK = np.ascontiguousarray(_ROTATION.T)


def _product(values: Floats, matrix: Floats) -> Floats:
    if len(values) <= SMALL_BATCH:
        return values @ matrix
    product = np.empty_like(values)
    for start in range(0, len(values), SMALL_BATCH):
        part = slice(start, start + SMALL_BATCH)
        np.matmul(values[part], matrix, out=product[part])
    return product


def _peak(values: Floats) -> Floats:
    """Return the largest magnitude `[blocks, 1]` of each block; NaN if it holds one."""
    magnitudes = np.abs(values)
    if len(values) <= SMALL_BATCH:
        return np.maximum.reduce(magnitudes, axis=1, keepdims=True)
    # torch is many times faster than numpy along short rows.
    return torch.from_numpy(magnitudes).amax(1, keepdim=True).numpy()  # pyright: ignore[reportUnknownMemberType]
