"""Compresses blocks one after the other in a folder, from the hidden states of a text before the first block.

After each block the folder has its compressed tensors and the hidden states after it, so that an interrupted
compression continues with the next block and ends with the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress.bits import bits_of_weights
from splitnet.compress.experts import BlockExperts, has_experts
from splitnet.compress.published import stored_tensors
from splitnet.compress.rounding import Compression, Feedback, Rounded, SecondMoments, round_to_nearest
from splitnet.errors import NotFinite, UnsupportedModel, WeightsError
from splitnet.quant.linear import holdable_layers

POSITIONS = 512  # positions of the text that run at once, unless a sequence is longer
INPUTS = "inputs"  # hidden states before the first block
_STATES = torch.bfloat16
# The error of a block's outputs with another machine's codes, as a multiple of the error with the nearest codes.
MOST_ERROR = 1.5


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
    text = _Text(span, read_states(given, how, span.hidden_size), how.lengths)
    experts = BlockExperts(checkpoint, block, span, how) if has_experts(span, how.group) else None
    layers = _layers(checkpoint, block, span, how)
    if not layers:
        raise UnsupportedModel(f"the blocks of {checkpoint.name} have no linear layers in groups of {how.group} inputs")
    by_input = text.layers_by_input(layers)
    parts = [{name: layers[name].weight for name in names} for names in by_input]
    parts += experts.parts if experts is not None else []
    bits = bits_of_weights(parts, how, lambda: next(text.outputs()))
    rounded: dict[str, Rounded] = {}
    for names in by_input:
        feedback = Feedback(text.moments_of(layers[names[0]]).sum)
        for name in names:
            rounded[name] = feedback.round_weight(layers[name].weight, bits[name], how.group)
            layers[name].weight.copy_(rounded[name].to_floats())
    if experts is not None:
        rounded |= experts.round_weights(list(text.calls_of(experts.module)), bits, how.group)
    tensors = stored_tensors(checkpoint, block, rounded)
    write_whole(block_file(folder, block), lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_states(states_file(folder, block), text.outputs())


def _layers(checkpoint: Checkpoint, block: int, span: Span, how: Compression) -> dict[str, nn.Linear]:
    """The layers of a block that are compressed, by the names of their weights in the checkpoint."""
    names = {tensor.rest.removesuffix(".weight"): tensor.name for tensor in checkpoint.block_tensors[block]}
    return {
        names[path]: layer
        for path, layer, _, inputs, _ in holdable_layers(span.block_modules[0], span.weights)
        if isinstance(layer, nn.Linear) and path in names and how.divides(inputs)
    }


@torch.inference_mode()
def check_block(
    checkpoint: Checkpoint, block: int, told: Mapping[str, Rounded], hidden: Tensor, how: Compression
) -> Tensor:
    """The outputs of a block with the codes of another machine, for one sequence `[positions, hidden]`. Raises
    WeightsError: they differ more from the outputs of the block in floats than with weights rounded to nearest."""
    span = Span.load(checkpoint, block, block + 1, dtype="float32", weights="float32")
    lengths = [len(hidden)]
    outputs = [span.sequences(hidden, lengths)]
    weights = {name: layer.weight for name, layer in _layers(checkpoint, block, span, how).items()}
    weights |= BlockExperts(checkpoint, block, span, how).weights if has_experts(span, how.group) else {}
    if not told.keys() <= weights.keys():
        raise WeightsError(f"block {block} has codes of weights that are not compressed, such as those of routers")
    nearest = {name: round_to_nearest(weights[name], int(how.bits), how.group) for name in told}
    for rounded in (nearest, told):
        for name in nearest:
            weights[name].copy_(rounded[name].to_floats())
        outputs.append(span.sequences(hidden, lengths))
    usual, error = (float((some - outputs[0]).norm()) for some in outputs[1:])
    if not error <= MOST_ERROR * usual:
        times = error / usual if usual else error
        raise WeightsError(f"block {block} has {times:.3g} times the error of weights that are rounded to nearest")
    return outputs[2].to(_STATES).float()


def write_states(file: Path, states: Iterable[Tensor]) -> None:
    """Writes hidden states, `[positions, hidden]` each, as bfloat16. Raises NotFinite."""

    def write(path: Path) -> None:
        with path.open("wb") as opened:
            for some in states:
                check_finite(some)
                opened.write(some.to(_STATES).view(torch.uint8).numpy().data)

    write_whole(file, write)


def read_states(file: Path, how: Compression, hidden_size: int) -> Tensor:
    """The hidden states in a file, `[positions, hidden]`, bfloat16."""
    return torch.from_file(str(file), size=how.positions * hidden_size, dtype=_STATES).view(how.positions, hidden_size)


def check_finite(states: Tensor) -> None:
    """Raises NotFinite."""
    if not bool(torch.isfinite(states).all()):
        raise NotFinite("this text makes inf or NaN in the model: use another text, or more bits")


class _Text:
    """The text before a block. hidden: `[positions, hidden]`, bfloat16; lengths: of its sequences."""

    def __init__(self, span: Span, hidden: Tensor, lengths: Sequence[int]) -> None:
        self._span, self._hidden, self._lengths = span, hidden, lengths

    def layers_by_input(self, layers: Mapping[str, nn.Linear]) -> list[list[str]]:
        """The names of layers that read the same tensor, in the order in which the block calls them."""
        found: list[tuple[Tensor, list[str]]] = []

        def called(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (given, *_) = inputs
            if any(name in others for _, others in found):
                return
            same = next((others for read, others in found if read is given), None)
            if same is None:
                found.append((given, [name]))
            else:
                same.append(name)

        hooks = [layer.register_forward_pre_hook(partial(called, name)) for name, layer in layers.items()]
        with _removed(hooks):
            next(self.outputs())
        return [others for _, others in found]

    def moments_of(self, layer: nn.Linear) -> SecondMoments:
        """Second moments of the inputs of a layer."""
        moments = SecondMoments(layer.in_features)
        for rows, *_ in self.calls_of(layer):
            moments.add(rows.flatten(0, -2))
        return moments

    def calls_of(self, module: nn.Module) -> Iterator[tuple[Tensor, ...]]:
        """The arguments of each call of a module; the first is `[..., inputs]`."""
        for hidden, lengths in self._pieces():
            seen: list[tuple[Tensor, ...]] = []
            hook = module.register_forward_pre_hook(partial(self._called, seen, len(hidden)))
            with _removed([hook]), suppress(_Reached):
                self._span.sequences(hidden, lengths)
            yield from seen

    @staticmethod
    def _called(seen: list[tuple[Tensor, ...]], wanted: int, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given)
        if sum(rows.flatten(0, -2).shape[0] for rows, *_ in seen) == wanted:
            raise _Reached

    def outputs(self) -> Iterator[Tensor]:
        """The outputs of the block, `[positions, hidden]` of some sequences at a time."""
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
    """A module was called with all positions; the rest of the block is not needed."""


@contextmanager
def _removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that is complete, or absent."""
    partial = path.with_suffix(".part")
    write(partial)
    with partial.open("r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())
    partial.replace(path)
