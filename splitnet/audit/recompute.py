"""Computes a hop's piece of work again, from the checkpoint, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from splitnet.audit.piece import Piece, WeightsUsed
from splitnet.blocks.adapters import AdapterTensors, read_tensors
from splitnet.blocks.block_inputs import decode_inputs
from splitnet.blocks.span import RowChunk, Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import UnsupportedModel
from splitnet.wire.messages import Chunk

PASS = 512  # positions of a pass of many positions


def compute_again(checkpoint: Checkpoint, piece: Piece, hidden: Tensor, used: WeightsUsed, most: int | None) -> Tensor:
    """The outputs of a piece's blocks for all its positions, `[length, hidden]` float32.

    Reads one block at a time, so that the memory of one block is enough.

    Args:
        hidden: what the hop was given, `[length, hidden]`.
        used: how the blocks hold their weights.
        most: positions of a pass; None: one pass over all positions, by the family's own code where the blocks allow.

    Raises:
        SplitnetError: the blocks cannot be computed here.
    """
    start, end = piece.blocks
    adapter = adapter_of(piece)
    try:
        for block in range(start, end):
            hidden = _run(checkpoint, piece, hidden, used, most, (block, block + 1), adapter)
        return hidden
    except UnsupportedModel:  # blocks that share keys and values must be in one span
        if end == start + 1:
            raise
        return _run(checkpoint, piece, hidden, used, most, (start, end), adapter)


def adapter_of(piece: Piece) -> AdapterTensors | None:
    """Raises ProtocolError: the tensors are malformed."""
    tensors = {name: tensor for part in piece.adapter for name, tensor in read_tensors(part).items()}
    return AdapterTensors(tensors) if tensors else None


def _run(
    checkpoint: Checkpoint,
    piece: Piece,
    hidden: Tensor,
    used: WeightsUsed,
    most: int | None,
    blocks: tuple[int, int],
    adapter: AdapterTensors | None,
) -> Tensor:
    span = Span.load(checkpoint, *blocks, weights=used.weights, dtype=used.dtype, kv=used.kv)
    own = AdapterTensors(adapter.of_blocks(*blocks)) if adapter is not None else None
    if own is not None:
        span.fit_adapter(own)
    ropes = {each.rope_length for each in piece.ranges}
    if most is None and len(ropes) == 1 and not piece.inputs and not span.per_layer_size:
        return span.sequences(hidden.to(span.dtype), [piece.length], own, ropes.pop()).float()
    row, found = span.new_row(piece.length, own), list[Tensor]()
    for index, each in enumerate(piece.ranges):
        inputs, size = None, most or PASS
        if piece.inputs:  # a group of positions runs in one pass
            given, data = piece.inputs[index]
            chunk, size = Chunk(piece.receipt.row, each.start, each.length, 0), each.length
            [inputs] = decode_inputs(given, data, [chunk], span.hidden_size, range(*blocks), span.per_layer_size)
        for at in range(each.start, each.start + each.length, size):
            count = min(size, each.start + each.length - at)
            part = RowChunk(row, at, count, own, each.rope_length, inputs)
            found.append(span.forward(hidden[at : at + count], [part]).float())
    return torch.cat(found)
