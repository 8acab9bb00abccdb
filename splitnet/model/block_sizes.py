"""Bytes of the blocks of a checkpoint, before any is loaded."""

from __future__ import annotations

import copy

import torch

from splitnet.model.backbone import backbone_class, find_container
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.held_linear import saved_bytes
from splitnet.model.weights import Weights, choose_weights


def block_bytes(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str | None,
    weights: str | None = None,
    device: str | torch.device = "cpu",
) -> int:
    """Bytes of the largest block as `Span.load` with the same arguments holds it; reads only headers of shards.

    Raises:
        WeightsError: weights cannot be held so.
    """
    chosen = choose_weights(weights, dtype, checkpoint.dtype, torch.device(device))
    sizes = block_sizes(checkpoint, chosen, range(checkpoint.num_blocks))
    return max(plain - saved for plain, saved in sizes)


def block_sizes(checkpoint: Checkpoint, weights: Weights, blocks: range) -> list[tuple[int, int]]:
    """Of each block: its bytes in the type that it computes in, and how many fewer it takes as its weights are held."""
    plain = [
        checkpoint.bytes_of((tensor.name for tensor in checkpoint.block_tensors[index]), weights.dtype)
        for index in blocks
    ]
    if not weights.forms:
        return [(size, 0) for size in plain]
    config = copy.deepcopy(checkpoint.config)
    model_class = backbone_class(config)
    container = find_container(model_class, config)
    with torch.device("meta"):
        backbone = model_class(config)
    modules = list(backbone.get_submodule(container).children())
    return list(zip(plain, [saved_bytes(modules[index], weights) for index in blocks], strict=True))
