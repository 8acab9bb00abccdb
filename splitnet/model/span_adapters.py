"""Adapters in the blocks of a span: low ranks beside linear layers, and prefixes of keys and values."""

from __future__ import annotations

from torch import nn

from splitnet.errors import AdapterError
from splitnet.model.adapters import Adapter, AddsLowRank, Prefix, linear_layers
from splitnet.model.families import TAKEN_WEIGHTS


class SpanAdapters:
    """What adapters find in the blocks of a span; its views share it.

    Args:
        blocks: of the span.
        first: the number of the first one.

    Attributes:
        kv_shapes: by block that keeps them, heads and head size of the keys and of the values.
    """

    def __init__(self, blocks: nn.ModuleList, first: int) -> None:
        self._blocks = blocks
        self._first = first
        self._adapted: set[tuple[int, str]] = set()
        self.kv_shapes: dict[int, list[tuple[int, int]]] = {}

    def fit(self, adapter: Adapter, start: int, end: int) -> None:
        """Makes the blocks `[start, end)` ready for an adapter.

        Raises:
            AdapterError: it names blocks or layers that are not there, or its shapes are not theirs.
        """
        for block, path, low_rank in adapter.low_ranks():
            layer, sizes = self._linear_layer(self._index(block, start, end), block, path)
            if (low_rank.a.shape[1], low_rank.b.shape[0]) != sizes:
                raise AdapterError(f"{path} of block {block} maps {sizes[0]} values to {sizes[1]}, the adapter not")
            if (block, path) not in self._adapted:
                self._adapted.add((block, path))
                layer.register_forward_hook(AddsLowRank(block, path))
        for block, prefix in adapter.prefixes():
            shapes = self.kv_shapes.get(self._index(block, start, end))
            if [(tensor.shape[1], tensor.shape[3]) for tensor in prefix] != shapes:
                raise AdapterError(f"keys and values of block {block} have (heads, size) {shapes}, the prefix has not")

    def prefix_of(self, adapter: Adapter | None, start: int, end: int) -> dict[int, Prefix]:
        """The prefix that rows in the blocks `[start, end)` begin with, by block of the span."""
        if adapter is None or not adapter.prefix_length:
            return {}
        return {block - self._first: prefix for block, prefix in adapter.prefixes() if start <= block < end}

    def _index(self, block: int, start: int, end: int) -> int:
        """Which of the span's blocks it is."""
        if not start <= block < end:
            raise AdapterError(f"block {block} is not among the blocks {start}..{end - 1}")
        return block - self._first

    def _linear_layer(self, index: int, block: int, path: str) -> tuple[nn.Module, tuple[int, int]]:
        """A layer that LoRA can be added to, with its numbers of inputs and outputs."""
        module = self._blocks[index]
        sizes = linear_layers(module).get(path)
        if sizes is None:
            raise AdapterError(f"block {block} has no linear layer {path!r}")
        if path.rpartition(".")[2] in TAKEN_WEIGHTS:
            raise AdapterError(
                f"nothing can be added to {path} of block {block}, as the family's code takes its weight alone: leave "
                "it out of target_modules"
            )
        return module.get_submodule(path), sizes
