"""How boundary activations are written on a link: tensor <-> bytes.

Every codec writes position by position: each position is one self-contained record of exactly
`bytes_per_position(hidden)` bytes. So a sender may slice, crop and join encoded payloads without decoding them, and
a position gives the same bytes whether it is encoded alone or among others, on every machine.

The integer codecs quantise blocks of 64 values, each block with its own scale. A few channels of boundary activations
are hundreds of times larger than the rest ("massive activations", arXiv:2402.17762) and would take the whole range of
their block, so all but `int8-block` first rotate each block by a Hadamard matrix, which spreads an outlier evenly over
the block (QuaRot, arXiv:2404.00456). `docs/codecs.md` has the measured quality of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from splitnet.errors import CodecError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

DEFAULT_INT8 = "int8"
BLOCK = 64  # values that share one scale, and the size of the rotation
_SCALE_BYTES = 2
_LARGEST = 2.0**100  # larger magnitudes are refused: no model has them, and it keeps every decoded value finite
_SMALLEST = np.float32(2.0**-100)  # a block of smaller magnitudes is written as zeros
_LARGEST_SCALE_BITS = 0x7200  # 2**101 as bfloat16: above every scale that `encode` writes
_BLOCKS_PER_CHUNK = 1024  # temporaries of 256 KiB stay in the cache of a core
_BLOCKS_PER_PRODUCT = 64  # a matrix product so small that BLAS does not wake its threads, which would then spin


class Codec(ABC):
    """A way to write `[positions, hidden]` activations as bytes."""

    name: str
    code: int  # the codec's number on the wire, one byte

    @abstractmethod
    def bytes_per_position(self, hidden: int) -> int:
        """Return the exact size in bytes of one position's record."""

    @abstractmethod
    def encode(self, hidden: torch.Tensor) -> bytes:
        """Write `hidden`, `[positions, hidden]` of any float type on any device.

        Raises:
            CodecError: the tensor has another shape or type, or (all codecs but `none`) holds inf or NaN.
        """

    @abstractmethod
    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        """Read what `encode` wrote: float32 `[positions, hidden]` on the CPU, in memory of its own.

        Raises:
            CodecError: the payload has another size than the shape implies (found before anything is allocated), or
                an integer codec's scale is one that no sender writes.
        """

    def _check_payload(self, payload: bytes | memoryview, positions: int, hidden: int) -> None:
        if positions < 0 or hidden < 1:
            raise CodecError(f"a tensor of {positions} positions and {hidden} hidden values cannot exist.")
        expected = positions * self.bytes_per_position(hidden)
        size = payload.nbytes if isinstance(payload, memoryview) else len(payload)
        if size != expected:
            raise CodecError(
                f"the {self.name} payload has {size} bytes where {positions} positions of {hidden} values take {expected}."
            )


class _Float32(Codec):
    """Raw little-endian float32: bit-exact for models in float32, bfloat16 and float16, inf and NaN included."""

    name, code = "none", 0

    def bytes_per_position(self, hidden: int) -> int:
        return 4 * hidden

    def encode(self, hidden: torch.Tensor) -> bytes:
        return _rows(hidden).astype("<f4", copy=False).tobytes()

    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        self._check_payload(payload, positions, hidden)
        return torch.from_numpy(np.frombuffer(payload, "<f4").astype(np.float32).reshape(positions, hidden))


class _Float16(Codec):
    """IEEE float16; magnitudes above 65504 saturate, since massive activations may exceed them."""

    name, code = "fp16", 1

    def bytes_per_position(self, hidden: int) -> int:
        return 2 * hidden

    def encode(self, hidden: torch.Tensor) -> bytes:
        values = _matrix(hidden).float()
        if not bool(torch.isfinite(values).all()):
            raise _not_finite(self.name)
        halves = values.clamp(-65504.0, 65504.0).to(torch.float16).cpu()
        return halves.contiguous().numpy().astype("<f2", copy=False).tobytes()

    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        self._check_payload(payload, positions, hidden)
        halves = np.frombuffer(payload, "<f2").astype(np.float16).reshape(positions, hidden)
        return torch.from_numpy(halves).float()


class _BFloat16(Codec):
    """The upper half of a float32, rounded to nearest: exact for models that compute in bfloat16."""

    name, code = "bf16", 2

    def bytes_per_position(self, hidden: int) -> int:
        return 2 * hidden

    def encode(self, hidden: torch.Tensor) -> bytes:
        halves = _matrix(hidden).to(torch.bfloat16)
        if not bool(torch.isfinite(halves).all()):
            raise _not_finite(self.name)
        return halves.cpu().contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()

    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        self._check_payload(payload, positions, hidden)
        return torch.from_numpy(_from_bfloat16(np.frombuffer(payload, "<u2")).reshape(positions, hidden))


class _BlockInteger(Codec):
    """Integers of `bits` bits in blocks of 64 values with one bfloat16 scale each, rotated or not.

    A record is the scales of all blocks, then their codes. A code `c` in `[-2**(bits-1), 2**(bits-1))` stands for
    `(c + 0.5) * scale`: the levels are symmetric and none is wasted. If 64 does not divide `hidden`, the last block is
    padded with zeros.

    Rotation is exact: values are first rounded to a grid so fine (2**-18 of the block's range) that all sums of 64 are
    exact in float32. Hence the bytes depend neither on the order in which a BLAS adds nor on the batch or machine.
    """

    def __init__(self, name: str, code: int, bits: int, rotate: bool) -> None:
        self.name = name
        self.code = code
        self._bits = bits
        self._rotate = rotate
        self._step = np.float32(2.0 ** (1 - bits))

    def bytes_per_position(self, hidden: int) -> int:
        return _blocks(hidden) * (_SCALE_BYTES + BLOCK * self._bits // 8)

    def encode(self, hidden: torch.Tensor) -> bytes:
        values = _rows(hidden)
        positions, width = values.shape
        blocks = _blocks(width)
        if blocks * BLOCK != width:
            values = np.pad(values, ((0, 0), (0, blocks * BLOCK - width)))
        scales, codes, payload = _records(positions, blocks, self._bits)
        for part in _chunks(positions, blocks):
            scale, code = self._quantise(values[part].reshape(-1, BLOCK))
            scales[part] = scale.reshape(-1, blocks)
            codes[part] = _pack(code, self._bits).reshape(-1, blocks, codes.shape[2])
        return payload.tobytes()

    def decode(self, payload: bytes | memoryview, positions: int, hidden: int) -> torch.Tensor:
        self._check_payload(payload, positions, hidden)
        blocks = _blocks(hidden)
        scales, codes, _ = _records(positions, blocks, self._bits, payload)
        if positions and int(scales.max()) > _LARGEST_SCALE_BITS:
            raise CodecError(f"the {self.name} payload holds a scale that no sender writes; it is corrupt or forged.")
        values = np.empty((positions, blocks * BLOCK), np.float32)
        for part in _chunks(positions, blocks):
            codes_part = _unpack(codes[part].reshape(-1, codes.shape[2]), self._bits)
            levels = codes_part.astype(np.float32)
            levels += np.float32(0.5)
            if self._rotate:
                levels = _rotated(levels)
            np.multiply(levels, _from_bfloat16(scales[part]).reshape(-1, 1), out=values[part].reshape(-1, BLOCK))
        if blocks * BLOCK != hidden:
            values = values[:, :hidden].copy()
        return torch.from_numpy(values)

    def _quantise(self, values: Floats) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int8]]:
        """Return the scales `[blocks, 1]`, as bfloat16 bits, and codes `[blocks, 64]` of `values` `[blocks, 64]`."""
        peak = _peak(values)
        if not float(peak.max()) < _LARGEST:  # also true of NaN
            raise _not_finite(self.name)
        peak = np.maximum(peak, _SMALLEST)
        is_zero = peak == _SMALLEST
        if self._rotate:
            # Adding and subtracting 96 times the power of two below the peak rounds to 2**-18 of twice that power.
            anchor = (peak.view(np.int32) & np.int32(0x7F800000)).view(np.float32) * np.float32(96)
            values = _rotated((values + anchor) - anchor)
            peak = np.maximum(_peak(values), _SMALLEST)
        # The next bfloat16 strictly above the smallest scale that covers the peak, so that no code overflows.
        bits = (peak * self._step).view(np.uint32) + np.uint32(0x10000)
        bits &= np.uint32(0xFFFF0000)
        codes = values / bits.view(np.float32)
        np.floor(codes, out=codes)
        bits[is_zero] = 0
        return (bits >> np.uint32(16)).astype(np.uint16), codes.astype(np.int8)


def _rows(hidden: torch.Tensor) -> Floats:
    return _matrix(hidden).cpu().float().numpy()


def _matrix(hidden: torch.Tensor) -> torch.Tensor:
    if hidden.dim() != 2 or hidden.shape[1] < 1 or not hidden.is_floating_point():
        raise CodecError(f"activations must be floats [positions, hidden], not {hidden.dtype} {list(hidden.shape)}.")
    return hidden.detach()


def _not_finite(name: str) -> CodecError:
    return CodecError(
        f"the activations hold inf, NaN or values too large for the {name} codec: the model overflowed; "
        "run its blocks in bfloat16 or float32."
    )


def _blocks(hidden: int) -> int:
    return -(-hidden // BLOCK)


def _chunks(positions: int, blocks: int) -> Iterator[slice]:
    step = max(1, _BLOCKS_PER_CHUNK // blocks)
    return (slice(start, start + step) for start in range(0, positions, step))


@lru_cache(maxsize=64)
def _record(blocks: int, bits: int) -> np.dtype[np.void]:
    return np.dtype([("scales", "<u2", (blocks,)), ("codes", "u1", (blocks, BLOCK * bits // 8))])


def _records(
    positions: int, blocks: int, bits: int, payload: bytes | memoryview | None = None
) -> tuple[npt.NDArray[np.uint16], Bytes, npt.NDArray[np.void]]:
    """Return the scales `[positions, blocks]` and codes `[positions, blocks, bytes]` of a payload, and the payload."""
    record = _record(blocks, bits)
    records = np.empty(positions, record) if payload is None else np.frombuffer(payload, record)
    return records["scales"], records["codes"], records


def _from_bfloat16(bits: npt.NDArray[np.uint16]) -> Floats:
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _peak(values: Floats) -> Floats:
    """Return the largest magnitude `[blocks, 1]` of each block; NaN if it holds one."""
    magnitudes = np.abs(values)
    if len(values) <= _BLOCKS_PER_PRODUCT:
        return np.maximum.reduce(magnitudes, axis=1, keepdims=True)
    return torch.from_numpy(magnitudes).amax(1, keepdim=True).numpy()  # many times faster than numpy along short rows


def _hadamard(size: int) -> Floats:
    """Return Sylvester's orthonormal Hadamard matrix, symmetric and its own inverse; `size` is a power of four."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(size**0.5)


_ROTATION = _hadamard(BLOCK)


def _rotated(values: Floats) -> Floats:
    if len(values) <= _BLOCKS_PER_PRODUCT:
        return values @ _ROTATION
    rotated = np.empty_like(values)
    for start in range(0, len(values), _BLOCKS_PER_PRODUCT):
        part = slice(start, start + _BLOCKS_PER_PRODUCT)
        np.matmul(values[part], _ROTATION, out=rotated[part])
    return rotated


_SIX_BIT_SHIFTS = np.array([[0], [2], [4]], np.uint8)


def _pack(codes: npt.NDArray[np.int8], bits: int) -> Bytes:
    """Pack signed codes `[blocks, 64]` into `[blocks, 8 * bits]` bytes: the low bits of the first codes fill the low
    bits of the bytes, and the remaining codes are shared out over the high bits."""
    unsigned = codes.view(np.uint8)
    if bits == 8:
        return unsigned
    if bits == 4:
        return (unsigned[:, :32] & 15) | (unsigned[:, 32:] << 4)
    shared = (unsigned[:, None, 48:] >> _SIX_BIT_SHIFTS) << 6
    return ((unsigned[:, :48] & 63).reshape(-1, 3, 16) | shared).reshape(-1, 48)


def _unpack(packed: Bytes, bits: int) -> npt.NDArray[np.int8]:
    """Undo `_pack`."""
    if bits == 8:
        return packed.view(np.int8)
    if bits == 4:
        unsigned = np.concatenate((packed & 15, packed >> 4), axis=1)
    else:
        shared = (packed.reshape(-1, 3, 16) >> 6) << _SIX_BIT_SHIFTS
        unsigned = np.concatenate((packed & 63, np.bitwise_or.reduce(shared, axis=1)), axis=1)
    sign = np.int8(1 << (bits - 1))
    return (unsigned.view(np.int8) ^ sign) - sign


def _by_name(codecs: Sequence[Codec]) -> Mapping[str, Codec]:
    codes = {codec.code for codec in codecs}
    names = {codec.name: codec for codec in codecs}
    if len(codes) != len(codecs) or len(names) != len(codecs) or not codes <= set(range(256)):
        raise ValueError("codecs must have different names and different one-byte codes")
    return MappingProxyType(names)


CODECS: Mapping[str, Codec] = _by_name(
    [
        _Float32(),
        _Float16(),
        _BFloat16(),
        _BlockInteger("int8", 3, bits=8, rotate=True),
        _BlockInteger("int8-block", 4, bits=8, rotate=False),
        _BlockInteger("int6", 5, bits=6, rotate=True),
        _BlockInteger("int4", 6, bits=4, rotate=True),
    ]
)
_CODECS_BY_CODE = {codec.code: codec for codec in CODECS.values()}


def codec_by_name(name: str) -> Codec:
    """Return the codec called `name`; raises CodecError, naming the known ones."""
    try:
        return CODECS[name]
    except KeyError:
        raise CodecError(f"there is no codec {name!r}; use one of {', '.join(CODECS)}.") from None


def codec_by_code(code: int) -> Codec:
    """Return the codec with this number on the wire; raises CodecError if there is none."""
    try:
        return _CODECS_BY_CODE[code]
    except KeyError:
        raise CodecError(f"codec number {code} is unknown here; upgrade splitnet or use another codec.") from None
