"""Computes the bytes of the blocks of a checkpoint before any block is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitnet.blocks.backbone import find_container, loaded_as, on_meta
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.checkpoint.families import backbone_class
from splitnet.checkpoint.store import TensorFacts
from splitnet.errors import ModelNotFound
from splitnet.quant.choose import WeightChoice, choose_weights
from splitnet.quant.experts import weights_of_experts
from splitnet.quant.grouped import held_bytes
from splitnet.quant.linear import holdable_layers

# Bytes per block besides the weights: old checkpoints hold such tables, for example masks of attention.
_TABLE_BYTES = 16 << 20


class BlockSize(NamedTuple):
    """Bytes of one block."""

    plain: int  # all weights as numbers, in the type that the block computes in
    held: int  # all weights in the format in which the block holds them
    plain_experts: int = 0  # the part of `plain` that is weights of experts
    experts: int = 0  # the part of `held` that is weights of experts
    coded: bool = False  # whether some weights stay in the codes of the checkpoint
    converted: bool = False  # whether some weights are converted to another format


def block_bytes(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str | None,
    weights: str | None = None,
    device: str | torch.device = "cpu",
) -> int:
    """Bytes of the largest block as `Span.load` with the same arguments holds it; reads only headers of files.

    Raises WeightsError if weights cannot be held in that format.
    """
    chosen = weights_of(checkpoint, weights, dtype, device)
    return max(size.held for size in block_sizes(checkpoint, chosen, range(checkpoint.num_blocks)))


def weights_of(
    checkpoint: Checkpoint, kind: str | None, dtype: torch.dtype | str | None, device: str | torch.device
) -> WeightChoice:
    """How the blocks of a checkpoint hold their weights, see `choose_weights`. The choice is the same for each span."""

    def held_bytes(weights: WeightChoice) -> int:
        return sum(size.held for size in block_sizes(checkpoint, weights, range(checkpoint.num_blocks)))

    return choose_weights(kind, dtype, checkpoint.dtype, torch.device(device), held_bytes)


def check_file_bytes(checkpoint: Checkpoint, start: int = 0) -> None:
    """Refuses blocks, from `start` on, that take more bytes in the files than the config allows. Strangers supply both
    files and config.

    Raises ModelNotFound, which names the block, or UnsupportedModel if no model can be built from this config.
    """
    model_class = backbone_class(checkpoint.config)
    backbone = on_meta(model_class, checkpoint.config)
    modules = backbone.get_submodule(find_container(model_class, checkpoint.config)).children()
    for index, (module, tensors) in enumerate(zip(modules, checkpoint.block_tensors, strict=True)):
        if index < start:
            continue
        told = checkpoint.store.file_bytes(tensor.name for tensor in tensors)
        numbers = sum(tensor.numel() for tensor in module.state_dict().values())
        if told > torch.float32.itemsize * numbers + _TABLE_BYTES:
            raise ModelNotFound(
                f"block {index} of {checkpoint.name} takes {told / 2**20:.0f} MiB in its files for {numbers} numbers: "
                "join another swarm, or give --model-id"
            )


def block_sizes(checkpoint: Checkpoint, weights: WeightChoice, blocks: range) -> list[BlockSize]:
    """The sizes of each block."""
    facts = checkpoint.store.tensor_facts(tensor.name for index in blocks for tensor in checkpoint.block_tensors[index])
    named = {index: checkpoint.block_tensors[index] for index in blocks}
    plain = [sum(facts[tensor.name].bytes_as(weights.dtype) for tensor in named[index]) for index in blocks]
    in_codes = any(one.layout is not None for one in facts.values())
    if not weights.forms and not (weights.keeps_codes and in_codes):
        return [BlockSize(size, size) for size in plain]
    model_class = backbone_class(checkpoint.config)
    container = find_container(model_class, checkpoint.config)
    backbone = on_meta(model_class, checkpoint.config)
    modules = list(backbone.get_submodule(container).children())
    codes = codes_within(
        backbone,
        {f"{container}.{index}.{one.rest}": facts[one.name] for index, tensors in named.items() for one in tensors},
    )
    return [
        size_of_block(modules[index], weights, size, codes, f"{container}.{index}.")
        for index, size in zip(blocks, plain, strict=True)
    ]


def size_of_block(
    block: nn.Module,
    weights: WeightChoice,
    plain: int,
    codes: Mapping[str, Sequence[TensorFacts]] | None = None,
    prefix: str = "",
) -> BlockSize:
    """The sizes of a block whose weights take `plain` bytes as numbers. `codes`: path of a layer, after `prefix` -> the
    coded tensors of its weight, if the checkpoint has codes."""
    held, coded, converted = plain, False, False
    itemsize = weights.dtype.itemsize
    plain_experts = experts = itemsize * sum(
        parameter.numel() for name, parameter in block.named_parameters() if "experts" in name.split(".")
    )
    for path, layer, outputs, inputs, form in holdable_layers(block, weights):
        stored = (codes or {}).get(prefix + path, ())
        if not _are_all(stored, outputs * inputs, transposed=isinstance(layer, Conv1D)):
            stored = ()  # the whole weight becomes plain numbers
        if stored and (weights.as_stored or (weights.keeps_codes and form is None)):
            taken = sum(codes_bytes(one) for one in stored)
            coded = True
        elif form is not None:
            taken = form.bytes_for(outputs, inputs)
            converted = True
        else:
            continue
        held -= outputs * inputs * itemsize - taken
    for path, parameter, transposed in weights_of_experts(block):
        stored = (codes or {}).get(prefix + path, ())
        count, outputs, inputs = parameter.shape
        if transposed:
            outputs, inputs = inputs, outputs
        layout = weights.layout_of_experts(inputs)
        if layout is not None and not weights.as_stored:
            taken = count * held_bytes(layout, outputs, inputs)
            converted = True
        elif weights.keeps_codes and _are_all(stored, parameter.numel(), transposed=transposed):
            taken = sum(codes_bytes(one) for one in stored)
            coded = True
        else:
            continue
        held -= parameter.numel() * itemsize - taken
        experts -= parameter.numel() * itemsize - taken
    return BlockSize(plain, held, plain_experts, experts, coded, converted)


def _are_all(stored: Sequence[TensorFacts], numbers: int, *, transposed: bool) -> bool:
    """Whether coded tensors make up a whole weight of `numbers` numbers, with codes along its inputs."""
    along = all(one.transposed == transposed for one in stored)
    return along and sum(math.prod(one.shape) for one in stored) == numbers


def codes_within(model: PreTrainedModel, tensors: Mapping[str, TensorFacts]) -> dict[str, list[TensorFacts]]:
    """Path of a layer of a model -> the coded tensors of its weight. `tensors`: by name in a checkpoint."""
    coded = {name: one for name, one in tensors.items() if one.layout is not None}
    codes: dict[str, list[TensorFacts]] = {}
    for name, parameter in loaded_as(model, coded).items():
        codes.setdefault(parameter.removesuffix(".weight"), []).append(coded[name])
    return codes


def codes_bytes(facts: TensorFacts) -> int:
    """Bytes of a weight that is held in the codes of the checkpoint."""
    assert facts.layout is not None
    *experts, outputs, inputs = facts.shape
    if facts.transposed:
        outputs, inputs = inputs, outputs
    return math.prod(experts) * held_bytes(facts.layout, outputs, inputs)
