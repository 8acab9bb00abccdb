"""Forward and backward passes over whole sequences, block by block.

A backward pass needs only the input of the span: the rest is computed again (Chen et al., "Training Deep Nets with
Sublinear Memory Cost", arXiv:1604.06174), so that memory holds the activations of one pass, not of all passes. With
memory to spare, torch's graph of a pass is kept instead. The weights of the blocks do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splitnet.blocks.adapters import AdapterTensors, block_of
from splitnet.blocks.block_inputs import PositionInputs
from splitnet.blocks.span import Span
from splitnet.errors import PeerBusy

# Bytes that torch may keep of a pass for its backward pass, by default.
GRAPH_BYTES = 512 * 2**20
# Factor on `GRAPH_BYTES` for one block alone, because one long sequence cannot be cut.
ONE_BLOCK_FACTOR = 2
MOST_KINDS = 256  # maximum kinds of passes whose measured bytes are kept; with more, all measurements are dropped


_Sequences = tuple[Sequence[int], Sequence[PositionInputs]]
"""Lengths of sequences, and the block inputs of each; empty: none."""


class _BlockPiece(NamedTuple):
    """One run of a block: its input, its output if torch keeps the graph, and lengths and block inputs of its
    sequences."""

    given: Tensor
    output: Tensor | None
    sequences: _Sequences


@dataclass(slots=True)
class SavedGraph:
    """The kept data of a forward pass from block `start` on; `SpanPasses.backward_saved` uses it up."""

    start: int
    pieces: list[list[_BlockPiece]]  # of each block
    traced: AdapterTensors | None  # the adapter that the blocks ran with
    rope_length: int  # see `splitnet.wire.messages.Forward`


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes, besides the weights, that torch saves for a backward pass. Raises PeerBusy if it saves more
    than `most`."""

    def __init__(self, weights: frozenset[int], most: int) -> None:
        self.nbytes = 0
        self._most = most
        self._seen = set(weights)
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._seen:
            self._seen.add(place)
            self.nbytes += tensor.untyped_storage().nbytes()
            if self.nbytes > self._most:
                raise PeerBusy(
                    f"the backward pass takes more than {self._most} bytes in a block: train with fewer positions"
                )
        return tensor


class SpanPasses:
    """Passes through a span. Use it from the thread that uses the span.

    Args:
        between: called between two pieces, so that more urgent work need not wait for the end of a pass.
        most_positions: maximum positions of whole sequences that go through a block at once; a longer sequence is a
            separate piece; None: no limit.
        graph_bytes: bytes that torch may keep for the backward pass. Blocks for which these bytes do not suffice are
            computed again in the backward pass.
    """

    def __init__(
        self,
        span: Span,
        between: Callable[[], None] = lambda: None,
        most_positions: Callable[[], int | None] = lambda: None,
        *,
        graph_bytes: int = GRAPH_BYTES,
    ) -> None:
        self._span, self._between, self._most_positions = span, between, most_positions
        self._graph_bytes = graph_bytes
        self._views: dict[int, Span] = {}
        # Bytes per position in a block, by kind of pass: the maximum that was measured.
        self._kept_per_position: dict[tuple[int, ...], float] = {}

    def forward(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        adapter: AdapterTensors | None,
        start: int,
        end: int,
        *,
        rope_length: int = 0,
        inputs: Sequence[PositionInputs] = (),
    ) -> Tensor:
        """Runs whole sequences, concatenated in `hidden`, through blocks `[start, end)`: `[positions, hidden]` ->
        `[positions, hidden]`; with an adapter that fits the span. `rope_length`: see
        `splitnet.wire.messages.Forward`; `inputs`: block inputs of each sequence, or none."""
        for block in range(start, end):
            outputs: list[Tensor] = []
            for given, (group, own) in self._pieces(hidden, lengths, inputs):
                with torch.no_grad():
                    outputs.append(self._view(block).sequences(given, group, adapter, rope_length, own))
                self._between()
            hidden = _joined(outputs)
        return hidden

    def backward(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        gradient: Tensor,
        adapter: AdapterTensors | None,
        start: int,
        end: int,
        **how: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of a loss with respect to the input of a pass as in `forward`, and to the adapter's tensors in
        these blocks.

        `gradient`: `[positions, hidden]`, of the loss with respect to the output. Raises ValueError if it does not fit
        `hidden`, and PeerBusy if torch would keep too many bytes of a block.
        """
        if gradient.shape != hidden.shape:
            raise ValueError(f"expected a gradient of {list(hidden.shape)}, got {list(gradient.shape)}")
        run = hidden, lengths, adapter, start, end, self._graph_bytes
        _, saved_graph = self.forward_saving(*run, **how)
        return self.backward_saved(saved_graph, gradient)

    def bytes_to_keep(self, lengths: Sequence[int], adapter: AdapterTensors | None, blocks: int) -> int | None:
        """The bytes that `forward_saving` takes for `blocks` blocks; None: no pass of this kind was measured yet."""
        kept = self._kept_per_position.get(_kind(lengths, adapter))
        return None if kept is None else ceil(kept * sum(lengths) * blocks)

    def forward_saving(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        adapter: AdapterTensors | None,
        start: int,
        end: int,
        most: int,
        *,
        rope_length: int = 0,
        inputs: Sequence[PositionInputs] = (),
    ) -> tuple[Tensor, SavedGraph]:
        """As `forward`; also returns the data that `backward_saved` needs. Raises PeerBusy if torch would keep too many
        bytes of a block.

        `most`: bytes that torch may keep, plus the bytes of one more block while it runs; blocks for which these bytes
        do not suffice are computed again in the backward pass.
        """
        traced = AdapterTensors(adapter.of_blocks(start, end)).traced() if adapter is not None else None
        block_pieces: list[list[_BlockPiece]] = []
        kept = 0
        for block in range(start, end):
            pieces: list[_BlockPiece] = []
            outputs: list[Tensor] = []
            for part, sequences in self._pieces(hidden, lengths, inputs):
                given = part.detach().requires_grad_()
                saved, (group, own) = self._saved(), sequences
                with saved, torch.set_grad_enabled(kept <= most):
                    output = self._view(block).sequences(given, group, traced, rope_length, own)
                kept += saved.nbytes
                if output.requires_grad:
                    self._note_kept_bytes(_kind(group, adapter), saved.nbytes / len(given))
                outputs.append(output.detach())
                goes_back = output.requires_grad and kept <= most
                pieces.append(_BlockPiece(given, output if goes_back else None, sequences))
                self._between()
            block_pieces.append(pieces)
            hidden = _joined(outputs)
        return hidden, SavedGraph(start, block_pieces, traced, rope_length)

    def backward_saved(self, saved_graph: SavedGraph, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `backward`, for a forward pass that `forward_saving` has run."""
        found: dict[str, Tensor] = {}
        traced = saved_graph.traced
        while saved_graph.pieces:
            pieces = saved_graph.pieces.pop()
            block = saved_graph.start + len(saved_graph.pieces)
            names = [name for name in (traced.tensors if traced else ()) if block_of(name) == block]
            leaves = [traced.tensors[name] for name in names] if traced else []
            gradients: list[Tensor] = []
            for part in gradient.split([len(piece.given) for piece in pieces]):
                given, output, (group, own) = pieces.pop(0)
                if output is None:
                    with self._saved(), torch.enable_grad():
                        output = self._view(block).sequences(given, group, traced, saved_graph.rope_length, own)
                by_input, *by_adapter = torch.autograd.grad(output, [given, *leaves], part.to(output))
                gradients.append(by_input)
                for name, tensor in zip(names, by_adapter, strict=True):
                    found[name] = found[name] + tensor if name in found else tensor
                self._between()
            gradient = _joined(gradients)
        return gradient, found

    def _note_kept_bytes(self, kind: tuple[int, ...], per_position: float) -> None:
        if len(self._kept_per_position) >= MOST_KINDS and kind not in self._kept_per_position:
            self._kept_per_position.clear()
        self._kept_per_position[kind] = max(per_position, self._kept_per_position.get(kind, 0.0))

    def _pieces(
        self, hidden: Tensor, lengths: Sequence[int], inputs: Sequence[PositionInputs]
    ) -> Iterator[tuple[Tensor, _Sequences]]:
        """The inputs of a block's runs: positions of whole sequences, and what is known of these sequences."""
        group: list[int] = []
        begin = 0
        for length in lengths:
            most = self._most_positions() if group else None
            if most is not None and sum(group) + length > most:
                yield hidden[begin : begin + sum(group)], (group, inputs[: len(group)])
                begin += sum(group)
                group, inputs = [], inputs[len(group) :]
            group.append(length)
        yield hidden[begin:], (group, inputs)

    def _saved(self) -> _Saved:
        return _Saved(self._span.weight_addresses(), ONE_BLOCK_FACTOR * self._graph_bytes)

    def _view(self, block: int) -> Span:
        if block not in self._views:
            self._views[block] = self._span.view(block, block + 1)
        return self._views[block]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _kind(lengths: Sequence[int], adapter: AdapterTensors | None) -> tuple[int, ...]:
    """The kind of a pass. Passes of one kind take similar bytes per position; scores of attention grow with the longest
    sequence."""
    longest = max(lengths).bit_length()
    return (longest,) if adapter is None else (longest, len(adapter.tensors), adapter.prefix_length.bit_length())
