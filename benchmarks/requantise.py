"""Rewrites a GGUF file with its matrices in another type.

    python -m benchmarks.requantise model-F16.gguf model-Q4_K.gguf Q4_K

The `gguf` package quantises only to types with blocks of 32. This script makes the k-quants by rounding to the range
of each group, without llama.cpp's search for the best scale, so the quality measured on them is a lower bound.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
BLOCK = 256
INSTEAD = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""The types that llama.cpp uses instead for rows whose length is not a multiple of 256."""


def fitting(kind: Type, inputs: int) -> Type:
    """The type in which rows of this length are stored; F32 if no type with blocks fits."""
    if inputs % gguf.GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    other = INSTEAD.get(kind, kind)
    return other if inputs % gguf.GGML_QUANT_SIZES[other][0] == 0 else Type.F32


def quantised(weight: Floats, kind: Type) -> npt.NDArray[Any]:
    """The bytes of rows `[..., inputs]` in `kind`, which must be a type that `fitting` returned."""
    if kind not in _K_QUANTS:
        return gguf.quantize(weight, kind)
    blocks = _K_QUANTS[kind](weight.reshape(-1, BLOCK).astype(np.float32))
    return blocks.reshape(*weight.shape[:-1], -1)


def _float16(numbers: Floats) -> Bytes:
    return numbers.astype(np.float16).reshape(-1, 1).view(np.uint8)


def _rounded(numbers: Floats, units: Floats, most: int) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(units == 0, 0, np.round(numbers / units))
    return np.clip(steps, -most - 1 if numbers.min() < 0 else 0, most).astype(np.float32)


def _packed(codes: npt.NDArray[Any], run: int, width: int, per_byte: int) -> Bytes:
    """Packs codes: `run` codes in the lowest bits of `run` bytes, the next in the next bits, and so on."""
    fields = (
        codes.reshape(len(codes), -1, per_byte, run) << np.arange(0, per_byte * width, width).astype(np.uint8)[:, None]
    )
    return np.bitwise_or.reduce(fields, axis=2).reshape(len(codes), -1)


def _q6_k(blocks: Floats) -> Bytes:
    groups = blocks.reshape(len(blocks), 16, 16)
    scales = np.abs(groups).max(axis=2) / 31
    unit = (scales.max(axis=1, keepdims=True) / 127).astype(np.float16).astype(np.float32)
    steps = _rounded(scales, unit, 127)
    codes = (_rounded(groups, (unit * steps)[..., None], 31) + 32).astype(np.uint8).reshape(len(blocks), BLOCK)
    low, high = _packed(codes & 15, 64, 4, 2), _packed(codes >> 4, 32, 2, 4)
    return np.concatenate([low, high, steps.astype(np.int8).view(np.uint8), _float16(unit)], axis=1)


def _with_zeros(blocks: Floats, bits: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The headers of blocks (units and steps) and the codes of blocks, for Q4_K and Q5_K."""
    groups = blocks.reshape(len(blocks), 8, 32)
    lowest = np.minimum(groups.min(axis=2), 0)
    scales = (groups.max(axis=2) - lowest) / (2**bits - 1)
    unit, zero_unit = ((one.max(axis=1, keepdims=True) / 63).astype(np.float16) for one in (scales, -lowest))
    steps, zeros = _rounded(scales, unit.astype(np.float32), 63), _rounded(-lowest, zero_unit.astype(np.float32), 63)
    begin = (zero_unit * zeros)[..., None].astype(np.float32)
    codes = _rounded(np.maximum(groups + begin, 0), (unit * steps)[..., None].astype(np.float32), 2**bits - 1)
    first, second = steps.astype(np.uint8), zeros.astype(np.uint8)
    packed = [
        first[:, :4] | ((first[:, 4:] >> 4) << 6),
        second[:, :4] | ((second[:, 4:] >> 4) << 6),
        (first[:, 4:] & 15) | ((second[:, 4:] & 15) << 4),
    ]
    heads = np.concatenate([_float16(unit), _float16(zero_unit), *packed], axis=1)
    return heads, codes.astype(np.uint8).reshape(len(blocks), BLOCK)


def _q4_k(blocks: Floats) -> Bytes:
    heads, codes = _with_zeros(blocks, 4)
    return np.concatenate([heads, _packed(codes, 32, 4, 2)], axis=1)


def _q5_k(blocks: Floats) -> Bytes:
    heads, codes = _with_zeros(blocks, 5)
    return np.concatenate([heads, _packed(codes >> 4, 32, 1, 8), _packed(codes & 15, 32, 4, 2)], axis=1)


_K_QUANTS = {Type.Q4_K: _q4_k, Type.Q5_K: _q5_k, Type.Q6_K: _q6_k}


def requantise(source: Path, target: Path, kind: Type) -> None:
    """Copies a single GGUF file; matrices and experts become `kind`, as far as their rows fit it."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1 or tensor.name.endswith("conv1d.weight"):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        stored = fitting(kind, weight.shape[-1])
        writer.add_tensor(tensor.name, quantised(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("kind", choices=["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16"])
    arguments = parser.parse_args()
    requantise(arguments.source, arguments.target, Type[arguments.kind])


if __name__ == "__main__":
    main()
