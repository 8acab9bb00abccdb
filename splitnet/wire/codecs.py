"""Codecs, which encode boundary activations for a link: tensor <-> bytes.

Every codec writes each position as a self-contained record of exactly `bytes_per_position(hidden)` bytes. Therefore a
sender can slice, crop and join encoded payloads without decoding them. A position gives the same bytes on every
machine, whether it is encoded alone or with other positions.

The integer codecs quantise blocks of 64 values, each block with its own scale. A few channels of boundary activations
are hundreds of times larger than the rest ("massive activations", arXiv:2402.17762) and would take the whole range of
their block. So all integer codecs except `int8-block` first rotate each block by a Hadamard matrix, which spreads an
outlier evenly over the block (QuaRot, arXiv:2404.00456). `docs/codecs.md` has the measured quality of each codec.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from splitnet.errors import CodecError, NotFinite

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Scales = npt.NDArray[np.uint16]  # the bits of a bfloat16, never negative

BLOCK = 64  # values that share one scale, and the width of the rotation matrix
SCALE_BYTES = 2
LARGEST_SCALE = 0x7200  # the bfloat16 bits of 2**101, which is above every scale that `quantise` returns
_LARGEST = 2.0**100  # larger magnitudes are refused: no model has them, and the bound keeps decoded values finite
_SMALLEST = np.float32(2.0**-100)  # a block whose largest magnitude is smaller becomes zeros
MAX_PRODUCT_BLOCKS = 64  # blocks; a larger product would wake the threads of the BLAS, which then spin


class KeptChunk(Protocol):
    """A chunk of `length` positions; the caller wants the last `keep`."""

    @property
    def length(self) -> int: ...

    @property
    def keep(self) -> int: ...


def select_kept_positions(parts: Sequence[KeptChunk], states: torch.Tensor) -> torch.Tensor:
    """Selects the wanted positions from the states of all positions, `[positions, ...]`, in order."""
    if all(part.keep == part.length for part in parts):
        return states
    ends = accumulate(part.length for part in parts)
    return torch.cat([states[end - part.keep : end] for end, part in zip(ends, parts, strict=True)])


def quantise(values: Floats, bits: int, rotate: bool) -> tuple[Scales, Codes]:
    """Return the scales `[blocks, 1]` and codes `[blocks, 64]` of `values`, `[blocks, 64]`, at least one block.

    Raises OverflowError: a value is inf, NaN or has a magnitude above 2**100.
    """
    peak = _peak(values)
    if not float(peak.max()) < _LARGEST:  # also true of NaN
        raise OverflowError
    is_zero = peak < _SMALLEST
    peak = np.maximum(peak, _SMALLEST)
    if rotate:
        # Let p be the largest power of two that is not above the peak. Floats near 96 p are 2**-17 p apart, so adding
        # and subtracting 96 p rounds each value to a multiple of 2**-17 p. The sum of 64 values below 2 p is then at
        # most 2**24 such multiples, which float32 holds exactly.
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
    """Return the codes `[blocks, 64]` that `pack` has packed."""
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
    if len(values) <= MAX_PRODUCT_BLOCKS:
        return values @ matrix
    product = np.empty_like(values)
    for start in range(0, len(values), MAX_PRODUCT_BLOCKS):
        part = slice(start, start + MAX_PRODUCT_BLOCKS)
        np.matmul(values[part], matrix, out=product[part])
    return product


def _peak(values: Floats) -> Floats:
    """Return the largest magnitude `[blocks, 1]` of each block; NaN for a block that holds NaN."""
    magnitudes = np.abs(values)
    if len(values) <= MAX_PRODUCT_BLOCKS:
        return np.maximum.reduce(magnitudes, axis=1, keepdims=True)
    # torch is many times faster than numpy along short rows.
    return torch.from_numpy(magnitudes).amax(1, keepdim=True).numpy()  # pyright: ignore[reportUnknownMemberType]


EXACT = "none"
DEFAULT_INT8 = "int8"
_LARGEST_HIDDEN = 2**20  # values per position, far above any model's hidden size
_BLOCKS_PER_CHUNK = 1024  # blocks that are encoded at once: temporary arrays of 256 KiB stay in the cache of a core


class Codec(ABC):
    """A way to write `[positions, hidden]` activations as bytes."""

    name: str
    code: int  # the codec's number on the wire, one byte

    @abstractmethod
    def bytes_per_position(self, hidden: int) -> int:
        """Return the exact size in bytes of one position's record."""

    @abstractmethod
    def encode(self, hidden: torch.Tensor) -> bytes:
        """Encode `hidden`, `[positions, hidden]` of any float type on any device. Raises CodecError: the tensor has
        another shape or type; NotFinite: the tensor holds inf or NaN (all codecs except `none`)."""

    @abstractmethod
    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        """Decode the output of `encode` as a new float32 tensor `[positions, hidden]` on the CPU.

        Raises CodecError: the payload does not have the size of this shape (checked before memory is allocated), or it
        holds a scale that no integer codec writes.
        """

    @abstractmethod
    def is_finite(self, payload: bytes | memoryview, hidden: int) -> bool:
        """Whether a payload of the right size holds no inf, no NaN and no scale that an integer codec never writes."""

    def _check_payload(self, payload: bytes | memoryview, positions: int, hidden: int) -> None:
        if positions < 0 or not 1 <= hidden <= _LARGEST_HIDDEN:
            raise CodecError(
                f"activations of {positions} positions and {hidden} hidden values are out of bounds; "
                f"the hidden size may be 1 to {_LARGEST_HIDDEN}."
            )
        expected = positions * self.bytes_per_position(hidden)
        size = payload.nbytes if isinstance(payload, memoryview) else len(payload)
        if size != expected:
            raise CodecError(
                f"the {self.name} payload has {size} bytes; {positions} positions of {hidden} values take {expected}."
            )


class _Float32(Codec):
    """Raw little-endian float32: bit-exact for models in float32, bfloat16 and float16, inf and NaN included."""

    name, code = EXACT, 0

    def bytes_per_position(self, hidden: int) -> int:
        return 4 * hidden

    def encode(self, hidden: torch.Tensor) -> bytes:
        return _rows(hidden).astype("<f4", copy=False).tobytes()

    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        self._check_payload(payload, positions, hidden)
        return _tensor(np.frombuffer(payload, "<f4").astype(np.float32).reshape(positions, hidden))

    def is_finite(self, payload: bytes | memoryview, hidden: int) -> bool:
        return bool(np.isfinite(np.frombuffer(payload, "<f4")).all())


class _Half(Codec):
    """Two bytes per value, rounded to nearest. bf16 is exact for models that compute in bfloat16. fp16 saturates at
    65504, which massive activations may exceed."""

    def __init__(self, name: str, code: int, dtype: torch.dtype) -> None:
        self.name = name
        self.code = code
        self._dtype = dtype
        self._largest = torch.finfo(torch.float32 if dtype is torch.float16 else dtype).max

    def bytes_per_position(self, hidden: int) -> int:
        return 2 * hidden

    def encode(self, hidden: torch.Tensor) -> bytes:
        values = _matrix(hidden)
        if values.numel() and not float(values.abs().amax()) <= self._largest:  # also true of NaN
            raise _not_finite(self.name)
        if self._dtype is torch.float16:
            values = values.float().clamp(-65504.0, 65504.0)
        halves = values.to(self._dtype).cpu().contiguous().view(torch.int16)
        return halves.numpy().astype("<i2", copy=False).tobytes()

    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        self._check_payload(payload, positions, hidden)
        bits = np.frombuffer(payload, "<u2")
        if self._dtype is torch.bfloat16:
            return _tensor(from_bfloat16(bits).reshape(positions, hidden))
        return _tensor(bits.view("<f2").astype(np.float16).reshape(positions, hidden)).float()

    def is_finite(self, payload: bytes | memoryview, hidden: int) -> bool:
        exponent = 0x7F80 if self._dtype is torch.bfloat16 else 0x7C00
        return not bool((np.frombuffer(payload, "<u2") & exponent == exponent).any())


class _BlockInteger(Codec):
    """Integers of `bits` bits in blocks of 64 values, rotated or not. A record holds the scales of all blocks of a
    position, then their codes. If 64 does not divide `hidden`, the last block is padded with zeros."""

    def __init__(self, name: str, code: int, bits: int, rotate: bool) -> None:
        self.name = name
        self.code = code
        self._bits = bits
        self._rotate = rotate

    def bytes_per_position(self, hidden: int) -> int:
        return _blocks(hidden) * (SCALE_BYTES + BLOCK * self._bits // 8)

    def encode(self, hidden: torch.Tensor) -> bytes:
        values = _rows(hidden)
        positions, width = values.shape
        blocks = _blocks(width)
        if blocks * BLOCK != width:
            values = np.pad(values, ((0, 0), (0, blocks * BLOCK - width)))
        step = _positions_per_chunk(blocks)
        if 0 < positions <= step:
            return self._encode(values, blocks)
        return b"".join(self._encode(values[start : start + step], blocks) for start in range(0, positions, step))

    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        self._check_payload(payload, positions, hidden)
        blocks = _blocks(hidden)
        step = _positions_per_chunk(blocks)
        records = np.frombuffer(payload, np.uint8).reshape(positions, self.bytes_per_position(hidden))
        if 0 < positions <= step and blocks * BLOCK == hidden:
            return _tensor(self._decode(records, blocks))
        values = np.empty((positions, hidden), np.float32)
        for start in range(0, positions, step):
            values[start : start + step] = self._decode(records[start : start + step], blocks)[:, :hidden]
        return _tensor(values)

    def is_finite(self, payload: bytes | memoryview, hidden: int) -> bool:
        records = np.frombuffer(payload, np.uint8).reshape(-1, self.bytes_per_position(hidden))
        return int(records[:, : _blocks(hidden) * SCALE_BYTES].view("<u2").max(initial=0)) <= LARGEST_SCALE

    # `_encode` and `_decode` make few calls: a decode step runs them when the blocks have just evicted the CPU caches,
    # and every call then costs several microseconds.

    def _encode(self, values: Floats, blocks: int) -> bytes:
        try:
            scale, code = quantise(values.reshape(-1, BLOCK), self._bits, self._rotate)
        except OverflowError:
            raise _not_finite(self.name) from None
        scales = scale.astype("<u2", copy=False)
        packed = pack(code, self._bits)
        if len(values) == 1:
            return scales.tobytes() + packed.tobytes()
        rows = (len(values), -1)
        return np.concatenate((scales.view(np.uint8).reshape(rows), packed.reshape(rows)), axis=1).tobytes()

    def _decode(self, records: Bytes, blocks: int) -> Floats:
        scales = records[:, : blocks * SCALE_BYTES].view("<u2").reshape(-1, 1)
        if int(scales.max()) > LARGEST_SCALE:
            raise CodecError(f"the {self.name} payload holds a scale that no sender writes; it is corrupt or forged.")
        codes = unpack(records[:, blocks * SCALE_BYTES :].reshape(len(records) * blocks, -1), self._bits)
        return dequantise(scales, codes, self._rotate).reshape(len(records), blocks * BLOCK)


def _rows(hidden: torch.Tensor) -> Floats:
    values = _matrix(hidden)
    if not (values.dtype is torch.float32 and values.is_cpu):
        values = values.cpu().float()
    return values.numpy()


def _matrix(hidden: torch.Tensor) -> torch.Tensor:
    if hidden.dim() != 2 or not 1 <= hidden.shape[1] <= _LARGEST_HIDDEN or not hidden.is_floating_point():
        raise CodecError(f"activations must be floats [positions, hidden], not {hidden.dtype} {list(hidden.shape)}.")
    return hidden.detach()


def _tensor(values: npt.NDArray[np.float32] | npt.NDArray[np.float16]) -> torch.Tensor:
    return torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]


def _not_finite(name: str) -> NotFinite:
    return NotFinite(
        f"the activations hold inf, NaN or values too large for the {name} codec: the model overflowed; "
        "run its blocks in bfloat16 or float32"
    )


def _blocks(hidden: int) -> int:
    return -(-hidden // BLOCK)


def _positions_per_chunk(blocks: int) -> int:
    return max(1, _BLOCKS_PER_CHUNK // blocks)


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        codec.name: codec
        for codec in (
            _Float32(),
            _Half("fp16", 1, torch.float16),
            _Half("bf16", 2, torch.bfloat16),
            _BlockInteger("int8", 3, bits=8, rotate=True),
            _BlockInteger("int8-block", 4, bits=8, rotate=False),
            _BlockInteger("int6", 5, bits=6, rotate=True),
            _BlockInteger("int4", 6, bits=4, rotate=True),
        )
    }
)
_CODECS_BY_CODE = {codec.code: codec for codec in CODECS.values()}


def codec_by_name(name: str) -> Codec:
    """Return the codec called `name`. Raises CodecError: there is no such codec; the error names all
    codecs."""
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"there is no codec {name!r}; use one of {', '.join(CODECS)}.") from None


def codec_by_code(code: int) -> Codec:
    """Return the codec with this number on the wire. Raises CodecError: there is no such codec."""
    try:
        return _CODECS_BY_CODE[code]
    except KeyError:
        raise CodecError(f"codec number {code} is unknown here; upgrade splitnet or use another codec.") from None


def check_size(code: int, payload: bytes | memoryview, positions: int, hidden_size: int) -> None:
    """Raises CodecError: the codec is unknown, or the payload does not have the size of `positions` positions."""
    expected = positions * codec_by_code(code).bytes_per_position(hidden_size)
    if len(payload) != expected:
        raise CodecError(f"{positions} positions take {expected} bytes, not {len(payload)}")


def check_values(code: int, payload: bytes | memoryview, positions: int, hidden_size: int) -> None:
    """Raises CodecError: as in `check_size`, or the payload holds values that are not finite."""
    check_size(code, payload, positions, hidden_size)
    if not codec_by_code(code).is_finite(payload, hidden_size):
        raise CodecError("the values are not finite")


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether tensors of any type hold neither inf nor NaN."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def encode_finite(codec: Codec, hidden: torch.Tensor) -> bytes:
    """Encode `hidden` with `codec`. Raises CodecError: as `Codec.encode`; NotFinite: also with the codec `none`."""
    check_finite(codec, hidden)
    return codec.encode(hidden)


def check_finite(codec: Codec, *tensors: torch.Tensor) -> None:
    """Raises NotFinite: a tensor to encode holds inf or NaN."""
    if not are_finite(tensors):
        raise _not_finite(codec.name)
