"""GGUF files: metadata and tensors of a model in one file or in several; tensors stay in the mapped files."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderField, ReaderTensor

from splitnet.checkpoint.store import MOST_OF_NAME
from splitnet.checkpoint.transfer.manifest import MAX_HEAD_BYTES
from splitnet.errors import ModelNotFound, UnsupportedModel, replace_library_errors
from splitnet.quant.packed_tensor import CodeLayout, Codes, Experts, PackedTensor, ScaleFormat, StoredMatrix

Bytes = npt.NDArray[np.uint8]
_Type = GGMLQuantizationType
_PLAIN = {_Type.F32: torch.float32, _Type.F16: torch.float16, _Type.BF16: torch.bfloat16}
_LONG = 1024  # lists of more numbers are skipped; lists with one number per block are shorter
_MAX_FIELDS = 1 << 12
_MAX_TENSORS = 1 << 17
_MAX_STRINGS = 1 << 22
_MOST_IN_A_ROW = 1 << 24
_LONGEST_TOKEN = 64  # bytes of a name that is looked up in the vocabulary
_VOCABULARY = "tokenizer.ggml.tokens"
_SKIPPED: list[GGUFValueType] = []
_AGAIN = "put the parts of one model, and no others, in a folder, or download them again"
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


class _Reader(GGUFReader):
    """Skips lists of strings and long lists, because the `gguf` package keeps some arrays for each token of a
    vocabulary. This class also reads files whose metadata come from a stranger and whose data are mostly missing, so
    all sizes are bounded."""

    _reads_head = True

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, *args: Any, **options: Any) -> Any:
        if self._reads_head and int(offset) + np.dtype(dtype).itemsize * int(count) > MAX_HEAD_BYTES:
            raise ValueError("its metadata are too long")
        return super()._get(offset, dtype, count, *args, **options)

    def _build_fields(self, offs: int, count: int) -> int:
        return super()._build_fields(offs, _at_most(_MAX_FIELDS, count, "keys"))

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[ReaderField]]:
        return super()._build_tensor_info(offs, _at_most(_MAX_TENSORS, count, "tensors"))

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        self._reads_head = False
        super()._build_tensors(start_offs, fields)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        at = orig_offs + 12
        if kind == GGUFValueType.STRING:
            data = memoryview(np.asarray(self.data).data)
            for _ in range(_at_most(_MAX_STRINGS, count, "strings in a list")):
                at += 8 + int.from_bytes(data[at : at + 8], "little")
                if at > min(len(data), MAX_HEAD_BYTES):
                    raise ValueError("it ends within its vocabulary")
        elif kind == GGUFValueType.ARRAY:
            raise ValueError("it has lists of lists")
        elif kind in self.gguf_scalar_to_np and count > _LONG:
            at += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return at - orig_offs, [], [], _SKIPPED


def _at_most(most: int, count: int, what: str) -> int:
    if count > most:
        raise ValueError(f"it claims to have {count} {what}")
    return int(count)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]  # in torch's order, the inputs last
    stored: GGMLQuantizationType  # the type of its numbers or codes
    data: npt.NDArray[Any]  # in the mapped file; codes are bytes, `[..., bytes of a row]`
    path: Path
    offset: int  # offset of the first byte in the file

    @property
    def layout(self) -> CodeLayout | None:
        """The layout of codes; None: the tensor has numbers. Raises UnsupportedModel: the type is unknown."""
        return None if self.stored in _PLAIN else layout_of(self.stored, self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers; codes are read as float32, because no smaller type holds their values exactly."""
        return _PLAIN.get(self.stored, torch.float32)

    def tensor(self) -> torch.Tensor:
        """Reads the tensor: numbers, or a `PackedTensor` that reads its codes on use."""
        if self.stored in _PLAIN:
            return torch.from_numpy(np.array(self.data)).view(self.dtype).reshape(self.shape)
        rows = self.data.reshape(-1, self.data.shape[-1])
        whole = _FileMatrix(self.name, self.stored, rows, self.shape[-1])
        if len(self.shape) == 1:
            return whole.to_floats()[0]
        if len(self.shape) == 2:
            return PackedTensor.of(whole)
        outputs = self.shape[-2]

        def one(expert: int) -> tuple[StoredMatrix]:
            return (whole.of_outputs(slice(expert * outputs, (expert + 1) * outputs)),)

        return PackedTensor.__new__(PackedTensor, Experts(len(rows) // outputs, one), stacked=True)


class _FileMatrix(StoredMatrix):
    """Rows of a tensor in a file. A subset of the outputs can be read without the others."""

    def __init__(self, name: str, stored: GGMLQuantizationType, rows: Bytes, inputs: int) -> None:
        super().__init__(layout_of(stored, name), (len(rows), inputs), self._read_codes)
        self._name = name
        self._stored = stored
        self._rows = rows

    def of_outputs(self, outputs: torch.Tensor | slice) -> StoredMatrix:
        if isinstance(outputs, slice):
            return _FileMatrix(self._name, self._stored, self._rows[outputs], self.shape[1])
        chosen = outputs.numpy()
        return StoredMatrix(
            self.layout, (len(chosen), self.shape[1]), lambda: read_codes(self._stored, self._rows[chosen])
        )

    def _read_codes(self) -> Codes:
        return read_codes(self._stored, self._rows)


class GgufFile:
    """A model in one GGUF file, or in several (`parts`) whose names end with -00001-of-00003.gguf and so on. name: the
    file name without this ending. metadata: key -> value, without lists of strings and long lists. tensors: name ->
    tensor, in the order of the files."""

    def __init__(self, path: Path) -> None:
        match = _SPLIT.match(path.name)
        self.name = match["stem"] if match else path.stem
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._vocabulary: tuple[Path, int] | None = None  # the file that has it, and the offset of its list there
        self.parts = parts = list(_parts(path))
        for number, part in enumerate(parts):
            own, tensors, vocabulary = _read(part)
            if vocabulary and self._vocabulary is None:
                self._vocabulary = part, vocabulary
            _check_part(part, own, number, len(parts))
            self.metadata = own | self.metadata
            for tensor in tensors:
                if tensor.name in self.tensors:
                    raise UnsupportedModel(f"{part} has {tensor.name}, which a part before it has too: {_AGAIN}")
                shape = tuple(int(size) for size in reversed(tensor.shape))
                if len(tensor.name) > MOST_OF_NAME or any(not 0 < size <= _MOST_IN_A_ROW for size in shape):
                    raise UnsupportedModel(
                        f"{part} has {tensor.name[:MOST_OF_NAME]} of {' x '.join(map(str, shape))} numbers, which no "
                        "tensor of a model has: download it again"
                    )
                offset = int(tensor.data_offset)
                self.tensors[tensor.name] = GgufTensor(
                    tensor.name, shape, tensor.tensor_type, tensor.data, part, offset
                )
        if not isinstance(self.metadata.get("general.architecture"), str) or not self.tensors:
            raise UnsupportedModel(f"{path} holds no model: give the GGUF file that holds the weights")
        if self.metadata.get("split.tensors.count", len(self.tensors)) != len(self.tensors):
            raise UnsupportedModel(f"the parts of {path} do not hold all tensors that they should: {_AGAIN}")

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.metadata["general.architecture"]

    def token_ids(self, names: Iterable[str]) -> dict[str, int]:
        """The numbers of tokens of the vocabulary, by name; without those that it lacks."""
        wanted, found = {name.encode(): name for name in names}, dict[str, int]()
        if self._vocabulary is not None:
            path, at = self._vocabulary
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                kind, count = (
                    int.from_bytes(data[at + start : at + end], "little") for start, end in ((0, 4), (4, 12))
                )
                at += 12
                for token in range(count if kind == GGUFValueType.STRING else 0):  # `_Reader` has checked the sizes
                    size = int.from_bytes(data[at : at + 8], "little")
                    if size <= _LONGEST_TOKEN and (name := wanted.get(data[at + 8 : at + 8 + size])):
                        found.setdefault(name, token)
                    at += 8 + size
        return found

    def free_pages(self) -> None:
        """Frees the memory of data that was read; later uses read it again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        mapped: list[Any] = [getattr(tensor.data, "_mmap", None) for tensor in self.tensors.values()]
        for one in {id(file): file for file in mapped if file is not None}.values():
            one.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def of_architecture(self) -> Mapping[str, Any]:
        """The metadata of the architecture, without its name as a prefix of keys."""
        prefix = self.architecture + "."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}


def _value(field: ReaderField) -> Any:
    """The value of a field; a float32 as its shortest decimal, as in a config file."""
    value = field.contents()
    if field.types[-1] == GGUFValueType.FLOAT32:
        return [_shortest(one) for one in value] if isinstance(value, list) else _shortest(value)
    return value


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _parts(path: Path) -> Iterator[Path]:
    match = _SPLIT.match(path.name)
    if match is None:
        yield path
        return
    for number in range(1, int(match["count"]) + 1):
        part = path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf")
        if not part.is_file():
            raise ModelNotFound(f"{part} is missing: put all {int(match['count'])} parts of the model in one folder")
        yield part


def _check_part(path: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    """Checks that a file is the part that its name says."""
    says = metadata.get("split.no", number), metadata.get("split.count", count) or 1
    if not all(isinstance(one, int) for one in says):
        raise UnsupportedModel(f"{path} does not say which part of a model it is: {_AGAIN}")
    if says != (number, count):
        raise UnsupportedModel(
            f"{path} is part {says[0] + 1} of {says[1]} by its contents, and {number + 1} of {count} by its name: "
            "give all parts of a model the names that they were published with, or download them again"
        )


def _read(path: Path) -> tuple[dict[str, Any], list[ReaderTensor], int]:
    """The metadata and the tensors of one file, and the offset of the vocabulary; 0: it has none."""
    with replace_library_errors(
        lambda why: UnsupportedModel(
            f"{path} is not a complete GGUF file that this version of the gguf package reads: download it again, or "
            f"update gguf ({why})"
        )
    ):
        try:
            reader = _Reader(path)
        except OSError as error:
            raise ModelNotFound(f"there is no file {path}: give the path of a GGUF file") from error
        found, tokens = {key: _value(it) for key, it in reader.fields.items() if it.types != _SKIPPED}, 0
        if (listed := reader.fields.get(_VOCABULARY)) is not None and listed.types == _SKIPPED:
            tokens = listed.offset + 8 + len(_VOCABULARY) + 4  # behind the key and the type of its value
        return found, reader.tensors, tokens


# The types in which weights are stored. A row is a sequence of blocks; a block holds the scales and the codes of 32 or
# 256 inputs. Source of the packings, also for the tests: the `dequantize_blocks` methods of the `gguf` package
# (gguf/quants.py).


class BlockType(NamedTuple):
    """A type that stores values as codes. `unpack`: `[outputs, blocks, bytes of a block]` -> codes with their
    scales."""

    layout: CodeLayout
    unpack: Callable[[Bytes], Codes]


def layout_of(stored: GGMLQuantizationType, tensor: str) -> CodeLayout:
    """The layout of a type that stores codes. `tensor`: its name, for the message. Raises UnsupportedModel: the type is
    unknown."""
    if stored not in BLOCK_TYPES:
        known = ", ".join(one.name for one in (*_PLAIN, *BLOCK_TYPES))
        raise UnsupportedModel(
            f"{tensor} is stored as {stored.name}, which splitnet does not read: take a GGUF file with {known}"
        )
    return BLOCK_TYPES[stored].layout


def read_codes(stored: GGMLQuantizationType, rows: Bytes) -> Codes:
    """The codes of rows of one of `BLOCK_TYPES`. `rows`: `[outputs, bytes of a row]`."""
    _, block_bytes = GGML_QUANT_SIZES[stored]
    return BLOCK_TYPES[stored].unpack(rows.reshape(len(rows), -1, block_bytes))


def _tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """`[outputs, ...]` flattened to one row per output."""
    return torch.from_numpy(np.ascontiguousarray(array).reshape(len(array), -1))


def _float16(blocks: Bytes, at: int) -> torch.Tensor:
    return _tensor(np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16))


def _shifted(packed: Bytes, width: int, per_byte: int) -> Bytes:
    """`[..., bytes]` -> `[..., per_byte, bytes]`: fields of `width` bits, the lowest first."""
    shifts = np.arange(0, per_byte * width, width, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8(2**width - 1)


def _in_runs(packed: Bytes, run: int, width: int, per_byte: int) -> Bytes:
    """Unpacks codes: the first `run` codes are in the lowest bits of `run` bytes, the next in the next bits, and so
    on."""
    shape = packed.shape[:-1]
    return _shifted(packed.reshape(*shape, -1, run), width, per_byte).reshape(*shape, -1)


def _q8_0(blocks: Bytes) -> Codes:
    return Codes(_tensor(blocks[..., 2:] ^ np.uint8(128)), _float16(blocks, 0))


def _q4_or_5(bits: int, zeros: bool) -> Callable[[Bytes], Codes]:
    def unpack(blocks: Bytes) -> Codes:
        at = 4 if zeros else 2
        codes = _in_runs(blocks[..., -16:], 16, 4, 2)
        if bits == 5:  # four bytes with the highest bit of each code
            codes |= np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little") << np.uint8(4)
        return Codes(_tensor(codes), _float16(blocks, 0), _float16(blocks, 2) if zeros else None)

    return unpack


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


def _q4_or_5_k(bits: int) -> Callable[[Bytes], Codes]:
    def unpack(blocks: Bytes) -> Codes:
        low, zero, rest = (
            blocks[..., at : at + 4] for at in (4, 8, 12)
        )  # eight steps of scales and zeros, 6 bits each
        last = ((low >> np.uint8(2)) & np.uint8(0x30)) | (rest & np.uint8(15))
        last_zero = ((zero >> np.uint8(2)) & np.uint8(0x30)) | (rest >> np.uint8(4))
        steps = np.concatenate([low & np.uint8(0x3F), last], axis=-1)
        zeros = np.concatenate([zero & np.uint8(0x3F), last_zero], axis=-1)
        codes = _in_runs(blocks[..., -128:], 32, 4, 2)
        if bits == 5:
            codes |= _in_runs(blocks[..., 16:48], 32, 1, 8) << np.uint8(4)
        return Codes(_tensor(codes), _tensor(steps), _tensor(zeros), _float16(blocks, 0), -_float16(blocks, 2))

    return unpack


def _q6_k(blocks: Bytes) -> Codes:
    codes = _in_runs(blocks[..., :128], 64, 4, 2) | (_in_runs(blocks[..., 128:192], 32, 2, 4) << np.uint8(4))
    steps = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return Codes(_tensor(codes), _tensor(steps), scale_units=_float16(blocks, 208))


def _iq4_xs(blocks: Bytes) -> Codes:
    high = np.ascontiguousarray(blocks[..., 2:4]).view(np.uint16)
    high = (high >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
    low = _shifted(blocks[..., 4:8], 4, 2)  # both halves of each byte
    low = low.swapaxes(-1, -2).reshape(high.shape)
    steps = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    return Codes(_tensor(_in_runs(blocks[..., 8:], 16, 4, 2)), _tensor(steps), scale_units=_float16(blocks, 0))


_F16 = ScaleFormat.FLOAT16
_STEPS = ScaleFormat.STEPS

BLOCK_TYPES = {
    _Type.Q4_0: BlockType(CodeLayout(4, 32, _F16, offset=8), _q4_or_5(4, zeros=False)),
    _Type.Q4_1: BlockType(CodeLayout(4, 32, _F16, _F16), _q4_or_5(4, zeros=True)),
    _Type.Q5_0: BlockType(CodeLayout(5, 32, _F16, offset=16), _q4_or_5(5, zeros=False)),
    _Type.Q5_1: BlockType(CodeLayout(5, 32, _F16, _F16), _q4_or_5(5, zeros=True)),
    _Type.Q8_0: BlockType(CodeLayout(8, 32, _F16, offset=128), _q8_0),
    _Type.Q2_K: BlockType(CodeLayout(2, 16, _STEPS, _STEPS), _q2_k),
    _Type.Q3_K: BlockType(CodeLayout(3, 16, _STEPS, offset=4), _q3_k),
    _Type.Q4_K: BlockType(CodeLayout(4, 32, _STEPS, _STEPS), _q4_or_5_k(4)),
    _Type.Q5_K: BlockType(CodeLayout(5, 32, _STEPS, _STEPS), _q4_or_5_k(5)),
    _Type.Q6_K: BlockType(CodeLayout(6, 16, _STEPS, offset=32), _q6_k),
    _Type.IQ4_NL: BlockType(CodeLayout(4, 32, _F16, table="iq4_nl"), _q4_or_5(4, zeros=False)),
    _Type.IQ4_XS: BlockType(CodeLayout(4, 32, _STEPS, table="iq4_nl"), _iq4_xs),
    _Type.MXFP4: BlockType(CodeLayout(4, 32, ScaleFormat.E8M0, table="e2m1"), _mxfp4),
}
"""Types that store codes."""
