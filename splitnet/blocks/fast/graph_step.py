"""Decode steps on a GPU whose blocks are replayed from graphs, all but attention.

A decode step is some twenty launches for each block, and where blocks are small the GPU waits for them. A CUDA graph
launches many at once, but always with the same shapes and in the same memory. So what lies before and behind attention
is recorded once, for some numbers of positions; a step with fewer takes the next larger one. Attention runs between as
ever, in the rows' own memory: that may grow, move, be cut or forked, as nothing that is recorded has its address.

A recording proves itself when blocks are loaded: it must give what the same operations give that are not recorded, and
sooner. If not, or once a replay fails, steps run as they do elsewhere, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from splitnet.blocks.attention import Chunk, positions_of
from splitnet.blocks.fast.torch_step import LeanBlock, TorchStep
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.errors import first_line
from splitnet.quant.device import milliseconds, put

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16)  # numbers of positions that are recorded, until one proves no good
TOLERANCE = 0.01  # of what one block adds, and of keys and values: how far it may be from what is not recorded
TOLERANCE_OF_ALL = 0.1  # the same for all blocks together, through which rounding grows
# Relative to what a block is given, to which it adds.
_ROUNDING = {torch.float32: 2.0**-18, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_NAMES = "adds", "stores in keys", "stores in values"
_PROMPTS, _TIMED_STEPS = 5, 10

Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True)
class Recording(Generic[Result]):
    """Operations that can be done once more, in memory that stays theirs: `replay` does them on what is in the memory
    that they were given, and leaves `result` in its place."""

    result: Result
    replay: Callable[[], None]


class CudaRecorder:
    """By CUDA graphs, ROCm's too. Recordings may have memory in common beside their results: they are to be replayed in
    the order in which they were recorded, some left out."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Result]) -> Recording[Result]:
        """Records the operations of `work`, which it does twice. Raises RuntimeError if it cannot be done."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # which torch does not leave by itself if a recording breaks off
                work()  # what libraries set up at a first call cannot be recorded
                graph = torch.cuda.CUDAGraph()
                # Other threads may use the device meanwhile.
                with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                    result = work()
            torch.cuda.current_stream().wait_stream(self._stream)
        return Recording(result, graph.replay)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """To record on: one for all, as libraries take memory for each."""
    return torch.cuda.Stream(device)


def recorder_for(device: torch.device) -> CudaRecorder | None:
    """None: there are no graphs on such a device."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CannotBeRecorded(RuntimeError):
    """An operation that no graph can have."""


class OnDeviceAlone(TorchDispatchMode):
    """Raises CannotBeRecorded for operations for which the host waits, and for memory of other devices, before they are
    recorded: torch has not always recovered from a recording that was broken off."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # what consists of others is looked at by its parts
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        packet, name = func.overloadpacket, str(func)
        if func.namespace not in ("aten", "prim"):
            raise CannotBeRecorded(f"{name} is no operation of torch itself")
        if packet in _INDEXING:
            waits = any(index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1]) if index is not None)
        elif name.startswith("aten._grouped_mm."):
            waits = args[0].dtype != torch.bfloat16  # torch multiplies group by group then
        else:
            waits = bool(_WAITING & set(func.tags))
        if waits:
            raise CannotBeRecorded(f"{name} waits for the device")
        result = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device != self._device:
                raise CannotBeRecorded(f"{name} has a tensor of {tensor.device}")
        return result


_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Those wait where an index is a mask, only.
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


@dataclass(frozen=True)
class _Piece:
    weights_at: int
    before: Recording[tuple[Tensor, Tensor, Tensor]]
    mixed: Tensor
    behind: Recording[Tensor]


class Recorded:
    """All blocks of a span for one number of positions; every step overwrites `hidden`, `[positions, hidden]`, on the
    device and in the type of the blocks."""

    def __init__(self, step: TorchStep, hidden: Tensor, recorder: CudaRecorder) -> None:
        def record(work: Callable[[], Result]) -> Recording[Result]:
            with OnDeviceAlone(hidden.device):
                work()
            return recorder.record(work)

        self._hidden = hidden
        self._positions = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        self._turns = record(lambda: step.turns(hidden, self._positions))
        self._pieces: dict[int, _Piece] = {}
        for block in step.blocks:
            before = record(partial(block.before, hidden, self._turns.result))
            query, _, value = before.result
            mixed = hidden.new_zeros(len(hidden), query.shape[1] * value.shape[-1])
            behind = record(partial(block.behind, hidden, mixed, hidden))
            self._pieces[block.index] = _Piece(block.weights_at, before, mixed, behind)

    def run(
        self, blocks: Sequence[LeanBlock], hidden: Tensor, parts: Sequence[Chunk], taps: Sequence[int] = ()
    ) -> Tensor:
        """As `TorchStep.forward`, through some of the blocks, in their order; no more positions than there are
        recorded. What is left in the rest of the memory does not count.

        Raises RuntimeError if they cannot be replayed, as when weights are not where they were.
        """
        count = len(parts)
        self._hidden[:count].copy_(hidden)
        put(torch.tensor(positions_of(parts)), self._positions[:count])
        self._turns.replay()
        tapped: list[Tensor] = []
        for passed, block in enumerate(blocks, 1):
            piece = self._pieces[block.index]
            if piece.weights_at != block.weights_at:
                raise RuntimeError("weights are not where they were")
            piece.before.replay()
            piece.mixed[:count].copy_(block.attend(*piece.before.result, parts))
            piece.behind.replay()
            if passed in taps:
                tapped.append(self._hidden[:count].clone())
        output = self._hidden[:count].clone()  # the next step overwrites it
        return torch.cat((*tapped, output), dim=1) if tapped else output


class GraphStep:
    """Runs blocks as `lean` does, from recordings where there are some: by number of positions, of these blocks or
    more, as steps of some of the blocks share them."""

    def __init__(self, lean: TorchStep, recorded: dict[int, Recorded]) -> None:
        self.lean, self.recorded, self.takes = lean, recorded, lean.takes

    @property
    def most(self) -> int:
        """Positions of a step that is replayed; 0: none is any more."""
        return max(self.recorded, default=0)

    def forward(self, hidden: Tensor, parts: Sequence[Chunk], taps: Sequence[int] = ()) -> Tensor:
        """As `TorchStep.forward`."""
        size = size_for(len(parts), self.recorded)
        if size is not None and _in_order(hidden.device):
            try:
                return self.recorded[size].run(self.lean.blocks, hidden, parts, taps)
            except torch.OutOfMemoryError:  # of rows or of attention, as without recordings
                raise
            except RuntimeError as error:
                self.recorded.clear()
                log.warning("decode steps are not replayed from graphs any more: %s", first_line(error))
        return self.lean.forward(hidden, parts, taps)


def _in_order(device: torch.device) -> bool:
    """Whether what this thread gives to a device comes after what others gave it: all steps have the same memory."""
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def size_for(count: int, sizes: Mapping[int, object]) -> int | None:
    """The number of positions whose recording a step of `count` takes; None: there is none that has so many."""
    return min((size for size in sizes if size >= count), default=None)


@torch.inference_mode()
def with_recordings(span: Any, step: TorchStep) -> TorchStep | GraphStep:
    """For all blocks of a `Span`: `step`, or what replays it from graphs where that is proven and pays."""
    made: dict[int, Recorded] = {}
    where = f"blocks {span.start}..{span.end - 1} on {span.device}"
    try:
        recorder = recorder_for(span.device)
        for size in () if recorder is None else SIZES:
            assert recorder is not None
            recorded = Recorded(step, _noise(span, size, seed=0), recorder)
            rows = rows_to_try(span, size)
            if (fault := fault_of(span, step, recorded, rows)) is not None:
                _warn(where, made, fault)
                break
            given, parts = _noise(span, size, seed=0), [Chunk(row, row.length, 1) for row in rows]
            before = milliseconds(span.device, partial(step.forward, given, parts), _TIMED_STEPS)
            after = milliseconds(span.device, partial(recorded.run, step.blocks, given, parts), _TIMED_STEPS)
            log.info("%s, a decode step of %d: %.3f ms from graphs, %.3f ms if not", where, size, after, before)
            if not after < before:
                break
            made[size] = recorded
    except Exception as error:  # whatever a driver leads to: steps run without
        _warn(where, made, first_line(error.__context__ or error))  # where one breaks off, another follows
    return GraphStep(step, made) if made else step


def fault_of(span: Any, step: TorchStep, recorded: Recorded, rows: Sequence[SequenceCache]) -> str | None:
    """What is wrong with a recording for as many positions as there are rows; None: nothing."""
    size = len(rows)
    for count in {size, size // 2 + 1}:  # all that are recorded, and as few as take it
        given = hidden = _noise(span, size, seed=count)
        for block in step.blocks:
            fault, hidden = _compared(step.only([block]), recorded, hidden, rows, count, TOLERANCE)
            if fault is not None:
                return f"block {span.start + block.index} {fault}"
        fault, _ = _compared(step, recorded, given, rows, count, TOLERANCE_OF_ALL)
        if fault is not None:
            return f"all together {fault}"
    return None


def _compared(
    step: TorchStep, recorded: Recorded, given: Tensor, rows: Sequence[SequenceCache], count: int, tolerance: float
) -> tuple[str | None, Tensor]:
    """What the first `count` of the rows have otherwise from a recording, or None; and what is right, of all rows."""
    parts = [Chunk(row, row.length, 1) for row in rows]
    got = recorded.run(step.blocks, given[:count], parts[:count])
    kept = _stored(rows[:count], step.blocks)  # looked at first, as they are overwritten
    right = step.forward(given, parts)
    added = (right - given)[:count].float().norm(dim=1)
    pairs = [(got, right[:count], tolerance * added + _ROUNDING[given.dtype] * given[:count].float().norm(dim=1))]
    for found, exact in zip(kept, _stored(rows[:count], step.blocks), strict=True):
        pairs.append((found, exact, tolerance * exact.float().norm(dim=1)))
    for name, (found, exact, allowed) in zip(_NAMES, pairs, strict=False):
        away = (found.float() - exact.float()).norm(dim=1)
        if not bool((away <= allowed).all()):  # nor if it is no number
            most = f"{float(away.max()):.3g}, where {float(allowed.max()):.3g} is allowed"
            return f"{name} something else: it is off by {most}", right
    return None, right


def _stored(rows: Sequence[SequenceCache], blocks: Sequence[LeanBlock]) -> tuple[Tensor, Tensor]:
    """Keys, and values, of the positions that a step has stored, `[rows, numbers in all these blocks]`."""
    indices = {block.index for block in blocks}
    found: list[list[Tensor]] = [[], []]
    for row in rows:
        row.advance(1)
        held = [both for index, *both in row.held(row.length) if index in indices]
        for kept, tensors in zip(found, zip(*held, strict=True), strict=True):
            kept.append(torch.cat([tensor[0, :, -1].flatten() for tensor in tensors]))
        row.crop(row.length - 1)
    return torch.stack(found[0]), torch.stack(found[1])


def rows_to_try(span: Any, size: int) -> list[SequenceCache]:
    """With prompts of several lengths, and room for one position more."""
    lengths = [1 + place % _PROMPTS for place in range(size)]
    rows = [span.new_row(length + 1) for length in lengths]
    parts = [Chunk(row, 0, length) for row, length in zip(rows, lengths, strict=True)]
    span.forward(_noise(span, sum(lengths), seed=0), parts)
    return rows


def _noise(span: Any, positions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(positions, span.hidden_size, generator=generator, dtype=torch.float32)
    return noise.to(device=span.device, dtype=span.dtype)


def _warn(where: str, made: Mapping[int, object], fault: str) -> None:
    most = max(made, default=0)
    log.warning("decode steps of more than %d through %s are not replayed from graphs: %s", most, where, fault)
