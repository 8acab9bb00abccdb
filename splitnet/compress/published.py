"""Compressed blocks as a checkpoint in the format `pack-quantized` of compressed-tensors, which transformers and vLLM
read.

Source: the package `compressed_tensors`: `compressors/pack_quantized` for the tensors, `quantization/quant_config.py`
for the config.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress.rounding import Compression, Rounded
from splitnet.errors import ModelNotFound, WeightsError
from splitnet.quant.linear import is_router
from splitnet.quant.packed_tensor import Codes, pack_words, unpack_words

_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_REST = "rest.safetensors"  # the tensors outside the blocks


def stored_tensors(checkpoint: Checkpoint, block: int, rounded: Mapping[str, Rounded]) -> dict[str, Tensor]:
    """The tensors of a block under their names in the published checkpoint. rounded: by the name of the weight; other
    tensors stay as they are."""
    found: dict[str, Tensor] = {}
    for name, (codes, bits, _) in rounded.items():
        layer = name.removesuffix(".weight")
        found[layer + _PACKED] = pack_words(codes.codes, bits)
        found[layer + _SCALE] = codes.scales
        found[layer + _SHAPE] = torch.tensor(codes.codes.shape)
    others = (tensor.name for tensor in checkpoint.block_tensors[block] if tensor.name not in rounded)
    return found | _read(checkpoint, others)


def rounded_in(tensors: Mapping[str, Tensor], how: Compression) -> dict[str, Rounded]:
    """The weights in few bits in what `read_block_file` returns, by their names."""
    found: dict[str, Rounded] = {}
    for layer in (name.removesuffix(_PACKED) for name in tensors if name.endswith(_PACKED)):
        inputs, packed = int(tensors[layer + _SHAPE][1]), tensors[layer + _PACKED]
        bits = _bits(packed.shape[1], inputs, how)
        codes = Codes(unpack_words(packed, bits, inputs), tensors[layer + _SCALE])
        found[f"{layer}.weight"] = Rounded(codes, bits, how.group)
    return found


def _bits(words: int, inputs: int, how: Compression) -> int:
    """The bits of codes that are packed in this many words of 32 bits per output."""
    return int(how.bits) if how.uniform else 32 * words // inputs


def read_block_file(checkpoint: Checkpoint, block: int, file: Path, how: Compression) -> dict[str, Tensor]:
    """Reads and checks the tensors that another machine has made of a block. Raises WeightsError: a name, type or shape
    is not one of this block, a scale is not finite, or a tensor that stays as it is differs from the one on this
    machine."""
    wrong = WeightsError(f"the compressed tensors of block {block} are not those of {checkpoint.name}")
    try:
        told = load_file(file)
    except SafetensorError as error:
        raise wrong from error
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    shapes: dict[str, Tensor] = {}
    used = weights = 0
    facts = checkpoint.store.tensor_facts(tensor.name for tensor in checkpoint.block_tensors[block])
    for name, fact in facts.items():
        layer = name.removesuffix(".weight")
        if layer + _PACKED in told and len(fact.shape) == 2:
            outputs, inputs = fact.shape
            bits = _bits(told[layer + _PACKED].numel() // outputs, inputs, how)
            if layer == name or is_router(layer) or not how.divides(inputs) or not int(how.bits) <= bits <= 8:
                raise wrong
            used, weights = used + outputs * inputs * bits, weights + outputs * inputs
            wanted[layer + _PACKED] = torch.int32, (outputs, -(-inputs * bits // 32))
            wanted[layer + _SCALE] = torch.bfloat16, (outputs, inputs // how.group)
            wanted[layer + _SHAPE] = torch.int64, (2,)
            shapes[layer + _SHAPE] = torch.tensor(fact.shape)
        else:
            wanted[name] = fact.dtype, fact.shape
    given = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in told.items()}
    if given != wanted or not shapes or used > how.bits * weights:
        raise wrong
    kept = [name for name in wanted.keys() & facts.keys() if checkpoint.store.are_here([name])]
    exact = shapes | _read(checkpoint, kept)
    if not all(torch.equal(told[name], tensor) for name, tensor in exact.items()):
        raise wrong
    if not all(bool(torch.isfinite(tensor).all()) for name, tensor in told.items() if name.endswith(_SCALE)):
        raise wrong
    return told


def write_checkpoint(checkpoint: Checkpoint, files: Iterable[Path], folder: Path, how: Compression) -> list[str]:
    """Writes all files of a checkpoint besides the files of its blocks, which are in `folder` already: the tensors
    outside blocks, the index, config and tokenizer. Returns the names of the blocks' matrices that stay in floats
    because groups do not divide their inputs."""
    in_blocks = {tensor.name for block in checkpoint.block_tensors for tensor in block}
    others = (name for name in checkpoint.store.tensor_names if name not in in_blocks)
    save_file(_read(checkpoint, others), folder / _REST, metadata={"format": "pt"})
    index: dict[str, str] = {}
    layers: defaultdict[int, list[str]] = defaultdict(list)  # by their bits
    for file in (*files, folder / _REST):
        with safe_open(file, framework="pt") as opened:
            names = sorted(opened.keys())
            index |= dict.fromkeys(names, file.name)
            for layer in (name.removesuffix(_PACKED) for name in names if name.endswith(_PACKED)):
                words, inputs = opened.get_slice(layer + _PACKED).get_shape()[1], opened.get_tensor(layer + _SHAPE)[1]
                layers[_bits(words, int(inputs), how)].append(layer)
    size = sum(file.stat().st_size for file in {folder / name for name in index.values()})
    config = checkpoint.store.config.to_dict() | {"quantization_config": _quantization(layers, how.group)}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    _write_json(folder / "config.json", config)
    for save in (checkpoint.tokenizer, checkpoint.store.generation_config, checkpoint.store.processor):
        try:
            if (given := save()) is not None:
                given.save_pretrained(folder)
        except ModelNotFound:
            pass
    facts = checkpoint.store.tensor_facts(name for name in sorted(in_blocks & index.keys()) if name.endswith(".weight"))
    matrices = {name: fact.shape for name, fact in facts.items() if len(fact.shape) == 2 and not is_router(name)}
    return [name for name, (_, inputs) in matrices.items() if not how.divides(inputs)]


def _quantization(layers: Mapping[int, list[str]], group: int) -> dict[str, Any]:
    weights = {"type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    groups = [{"targets": sorted(layers[bits]), "weights": {"num_bits": bits} | weights} for bits in sorted(layers)]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": each for index, each in enumerate(groups)},
        "ignore": [],
    }


def _read(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    with checkpoint.store.load_tensors({name: name for name in names}, checkpoint.dtype) as tensors:
        return {name: tensor[...].contiguous() for name, tensor in tensors.items()}


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
