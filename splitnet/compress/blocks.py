"""Compresses blocks one after the other in a folder, from the hidden states of a text before the first block.

After each block the folder has its compressed tensors and the hidden states after it, so that an interrupted
compression continues with the next block and ends with the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress.published import stored_tensors
from splitnet.compress.rounding import GROUP, SecondMoments, layout_of, round_with_feedback
from splitnet.errors import NotFinite
from splitnet.quant.linear import holdable_layers

POSITIONS = 512  # positions of the text that run at once, unless a sequence is longer
INPUTS = "inputs"  # hidden states before the first block
_STATES = torch.bfloat16


@dataclass(frozen=True)
class Compression:
    """What is done to a model: bits of a weight, and the lengths of the text's sequences."""

    bits: int
    lengths: tuple[int, ...]
    group: int = GROUP

    @property
    def positions(self) -> int:
        return sum(self.lengths)

    def state_bytes(self, hidden_size: int) -> int:
        """Bytes of the hidden states of the text at one boundary."""
        return self.positions * hidden_size * _STATES.itemsize


def block_file(folder: Path, block: int) -> Path:
    """The file with the compressed tensors of a block."""
    return folder / f"block-{block:05}.safetensors"


def states_file(folder: Path, block: int) -> Path:
    """The file with the hidden states after a block."""
    return folder / f"states-{block:05}"


def compressed_blocks(folder: Path, start: int, end: int) -> int:
    """The end of the blocks from `start` on that are complete in a folder."""
    return next((n for n in range(end, start, -1) if states_file(folder, n - 1).exists()), start)


def compress_blocks(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    folder: Path,
    how: Compression,
    progress: Callable[[int], None] = lambda block: None,
) -> None:
    """Compresses blocks `[start, end)` of a checkpoint from the file `inputs` in a folder. Raises NotFinite: the hidden
    states have inf or NaN; OSError: a file cannot be written, for example because the disk is full.

    progress: called with each block before it is compressed.
    """
    for block in range(compressed_blocks(folder, start, end), end):
        progress(block)
        given = folder / INPUTS if block == start else states_file(folder, block - 1)
        compress_block(checkpoint, block, given, folder, how)
        if block > start:
            given.unlink()


@torch.inference_mode()
def compress_block(checkpoint: Checkpoint, block: int, given: Path, folder: Path, how: Compression) -> None:
    """Writes the compressed tensors of a block, and then the hidden states after the compressed block."""
    span = Span.load(checkpoint, block, block + 1, dtype="float32", weights="float32")
    hidden = torch.from_file(str(given), size=how.positions * span.hidden_size, dtype=_STATES)
    text = _Text(span, hidden.view(how.positions, span.hidden_size), how.lengths)
    (module,) = span.block_modules
    names = {tensor.rest: tensor.name for tensor in checkpoint.block_tensors[block]}
    layers = {path: layer for path, layer, _, inputs, _ in holdable_layers(module, span.weights) if inputs % how.group == 0}
    codes = {}
    for group in text.layers_by_input({path: layer for path, layer in layers.items() if f"{path}.weight" in names}):
        moments = text.moments_of(group[0])
        for layer in group:
            made = round_with_feedback(layer.weight, moments.clone(), how.bits, how.group)
            layer.weight.copy_(made.to_floats(layout_of(how.bits, how.group)))
            codes[next(path for path, one in layers.items() if one is layer)] = made
    written = {names[f"{path}.weight"]: made for path, made in codes.items()}
    _write(block_file(folder, block), lambda file: save_file(stored_tensors(checkpoint, block, written, how.bits), file))
    _write(states_file(folder, block), text.write_outputs)


class _Text:
    """The text before a block. hidden: `[positions, hidden]`, bfloat16; lengths: of its sequences."""

    def __init__(self, span: Span, hidden: Tensor, lengths: Sequence[int]) -> None:
        self._span, self._hidden, self._lengths = span, hidden, lengths

    def layers_by_input(self, layers: dict[str, nn.Module]) -> list[list[nn.Module]]:
        """The layers that read the same tensor, in the order in which the block calls them."""
        found: list[tuple[Tensor, list[nn.Module]]] = []

        def called(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            if any(layer in others for _, others in found):
                return
            same = next((others for read, others in found if read is given[0]), None)
            if same is None:
                found.append((given[0], [layer]))
            else:
                same.append(layer)

        hooks = [layer.register_forward_pre_hook(called) for layer in layers.values()]
        with _removed(hooks):
            next(self._outputs())
        return [others for _, others in found]

    def moments_of(self, layer: nn.Module) -> SecondMoments:
        """Second moments of the inputs of a layer."""
        moments = SecondMoments(layer.in_features)

        def called(_layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            moments.add(given[0].flatten(0, -2))
            raise _Reached

        with _removed([layer.register_forward_pre_hook(called)]):
            for hidden, lengths in self._pieces():
                with suppress(_Reached):
                    self._span.sequences(hidden, lengths)
        return moments

    def write_outputs(self, path: Path) -> None:
        """Writes the outputs of the block, bfloat16. Raises NotFinite."""
        with path.open("wb") as file:
            for output in self._outputs():
                if not bool(torch.isfinite(output).all()):
                    raise NotFinite("a compressed block makes inf or NaN of this text: use more bits, or another text")
                file.write(output.to(_STATES).view(torch.uint8).numpy().tobytes())

    def _outputs(self) -> Iterator[Tensor]:
        for hidden, lengths in self._pieces():
            yield self._span.sequences(hidden, lengths)

    def _pieces(self) -> Iterator[tuple[Tensor, list[int]]]:
        begin, lengths = 0, list[int]()
        for index, length in enumerate(self._lengths):
            lengths.append(length)
            if sum(lengths) + (*self._lengths, POSITIONS)[index + 1] > POSITIONS:
                end = begin + sum(lengths)
                yield self._hidden[begin:end].float(), lengths
                begin, lengths = end, []
        if lengths:
            yield self._hidden[begin:].float(), lengths


class _Reached(Exception):
    """The layer has its inputs; the rest of the block is not needed."""


@contextmanager
def _removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that is complete, or absent."""
    partial = path.with_suffix(".part")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
