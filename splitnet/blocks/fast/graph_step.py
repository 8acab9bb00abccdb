"""Decode steps on a GPU that replay all of a block except attention from CUDA graphs.

A decode step has some twenty launches for each block, and where blocks are small the GPU waits for the launches. A CUDA
graph launches many kernels at once, but always with the same shapes and in the same memory. So the operations before
and after attention are recorded once, for some numbers of positions; a step with fewer positions uses the next larger
recording. Attention is not recorded and uses the rows' own memory: rows may grow, move, be cropped or forked, because
no recording has their addresses.

When blocks are loaded, each recording is tested: it must give the results of the operations without a recording, and be
faster. If not, or once a replay fails, steps run without graphs, and the log gives the reason.
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

from splitnet.blocks.attention import RowChunk, rotary_positions_of
from splitnet.blocks.fast.torch_step import LeanBlock, TorchStep
from splitnet.blocks.kv_cache import SequenceCache
from splitnet.errors import first_line
from splitnet.quant.device import copy_to_device, milliseconds

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16)  # numbers of positions that are recorded, until a recording fails its test
# Maximum error of a recording, relative to the numbers that one block adds to its input, and to keys and values.
TOLERANCE = 0.01
TOLERANCE_OF_ALL = 0.1  # the same for all blocks together, through which rounding errors grow
# Rounding errors relative to the input of a block, to which the block adds.
_ROUNDING = {torch.float32: 2.0**-18, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_NAMES = "adds", "stores in keys", "stores in values"
_PROMPTS, _TIMED_STEPS = 5, 10

Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True)
class Recording(Generic[Result]):
    """Operations that can run again in the same memory: `replay` applies them to the present contents of their input
    memory, and overwrites `result`."""

    result: Result
    replay: Callable[[], None]


class CudaRecorder:
    """Records CUDA graphs, also with ROCm. Recordings may share memory other than their results, so they must be
    replayed in the order in which they were recorded; some may be left out."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Result]) -> Recording[Result]:
        """Records the operations of `work`, which runs twice. Raises RuntimeError if they cannot be recorded."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # torch does not leave the stream by itself if a recording breaks off
                work()  # the set-up of libraries at a first call cannot be recorded
                graph = torch.cuda.CUDAGraph()
                # Other threads may use the device during the recording.
                with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                    result = work()
            torch.cuda.current_stream().wait_stream(self._stream)
        return Recording(result, graph.replay)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on: one for all recordings, because libraries allocate memory per stream."""
    return torch.cuda.Stream(device)


def recorder_for(device: torch.device) -> CudaRecorder | None:
    """The recorder of a device; None: the device has no graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None


class CannotBeRecorded(RuntimeError):
    """An operation that a graph cannot contain."""


class OnDeviceAlone(TorchDispatchMode):
    """Raises CannotBeRecorded for operations for which the host waits, and for memory of other devices. This check runs
    before the recording, because torch does not always recover from a recording that breaks off."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # checks the parts of composite operations
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        packet, name = func.overloadpacket, str(func)
        if func.namespace not in ("aten", "prim"):
            raise CannotBeRecorded(f"{name} is not an operation of torch itself")
        if packet in _INDEXING:
            waits = any(index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1]) if index is not None)
        elif name.startswith("aten._grouped_mm."):
            waits = args[0].dtype != torch.bfloat16  # torch then multiplies group by group
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
# These operations wait for the device only where an index is a mask.
_INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


@dataclass(frozen=True)
class _GraphPiece:
    weights_at: int
    before: Recording[tuple[Tensor, Tensor, Tensor]]
    mixed: Tensor
    behind: Recording[Tensor]


class Recorded:
    """Recordings of all blocks of a span for one number of positions. Every step overwrites `hidden`, `[positions,
    hidden]`, which is on the device and in the type of the blocks."""

    def __init__(self, step: TorchStep, hidden: Tensor, recorder: CudaRecorder) -> None:
        def record(work: Callable[[], Result]) -> Recording[Result]:
            with OnDeviceAlone(hidden.device):
                work()
            return recorder.record(work)

        self._hidden = hidden
        self._positions = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        self._turns = record(lambda: step.turns(hidden, self._positions[None]))
        self._pieces: dict[int, _GraphPiece] = {}
        for block in step.blocks:
            before = record(partial(block.before, hidden, self._turns.result))
            query, _, value = before.result
            mixed = hidden.new_zeros(len(hidden), query.shape[1] * value.shape[-1])
            behind = record(partial(block.behind, hidden, mixed, hidden))
            self._pieces[block.index] = _GraphPiece(block.weights_at, before, mixed, behind)

    def run(
        self, blocks: Sequence[LeanBlock], hidden: Tensor, parts: Sequence[RowChunk], taps: Sequence[int] = ()
    ) -> Tensor:
        """As `TorchStep.forward`, through some of the blocks, in order, with at most the recorded number of positions.
        The contents of the rest of the recorded memory do not matter.

        Raises RuntimeError if the blocks cannot be replayed, for example because weights have moved.
        """
        count = len(parts)
        self._hidden[:count].copy_(hidden)
        copy_to_device(rotary_positions_of(parts)[0], self._positions[:count])
        self._turns.replay()
        tapped: list[Tensor] = []
        for passed, block in enumerate(blocks, 1):
            piece = self._pieces[block.index]
            if piece.weights_at != block.weights_at:
                raise RuntimeError("weights have moved")
            piece.before.replay()
            piece.mixed[:count].copy_(block.attend(*piece.before.result, parts))
            piece.behind.replay()
            if passed in taps:
                tapped.append(self._hidden[:count].clone())
        output = self._hidden[:count].clone()  # the next step overwrites it
        return torch.cat((*tapped, output), dim=1) if tapped else output


class GraphStep:
    """Runs blocks as `lean` does, from recordings where possible. `recorded`: by number of positions; the recordings
    may include more blocks, because views of a span share them."""

    def __init__(self, lean: TorchStep, recorded: dict[int, Recorded]) -> None:
        self.lean, self.recorded, self.takes = lean, recorded, lean.takes

    @property
    def most(self) -> int:
        """The maximum number of positions of a step that is replayed; 0: no step is replayed."""
        return max(self.recorded, default=0)

    def forward(self, hidden: Tensor, parts: Sequence[RowChunk], taps: Sequence[int] = ()) -> Tensor:
        """As `TorchStep.forward`."""
        size = size_for(len(parts), self.recorded)
        if size is not None and _in_order(hidden.device) and rotary_positions_of(parts).ndim == 2:
            try:
                return self.recorded[size].run(self.lean.blocks, hidden, parts, taps)
            except torch.OutOfMemoryError:  # rows or attention have too little memory, as without recordings
                raise
            except RuntimeError as error:
                self.recorded.clear()
                log.warning("decode steps are not replayed from graphs any more: %s", first_line(error))
        return self.lean.forward(hidden, parts, taps)


def _in_order(device: torch.device) -> bool:
    """Whether a device runs this thread's work after other threads' work, which is necessary because all steps share
    memory."""
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def size_for(count: int, sizes: Mapping[int, object]) -> int | None:
    """The number of positions of the smallest recording for a step of `count` positions; None: no recording is large
    enough."""
    return min((size for size in sizes if size >= count), default=None)


@torch.inference_mode()
def with_recordings(span: Any, step: TorchStep) -> TorchStep | GraphStep:
    """`step` for all blocks of a `Span`, or a `GraphStep` with the recordings that are correct and faster."""
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
            given, parts = _noise(span, size, seed=0), [RowChunk(row, row.length, 1) for row in rows]
            before = milliseconds(span.device, partial(step.forward, given, parts), _TIMED_STEPS)
            after = milliseconds(span.device, partial(recorded.run, step.blocks, given, parts), _TIMED_STEPS)
            log.info("%s, a decode step of %d: %.3f ms from graphs, %.3f ms if not", where, size, after, before)
            if not after < before:
                break
            made[size] = recorded
    except Exception as error:  # drivers raise exceptions of many types; steps then run without graphs
        # An error in a recording causes a further error when the recording ends.
        _warn(where, made, first_line(error.__context__ or error))
    return GraphStep(step, made) if made else step


def fault_of(span: Any, step: TorchStep, recorded: Recorded, rows: Sequence[SequenceCache]) -> str | None:
    """The first error found in a recording for `len(rows)` positions; None: there is none."""
    size = len(rows)
    for count in {size, size // 2 + 1}:  # all recorded positions, and the fewest positions that use this recording
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
    """How the recording's results for the first `count` rows differ, or None; and the correct results for all rows."""
    parts = [RowChunk(row, row.length, 1) for row in rows]
    got = recorded.run(step.blocks, given[:count], parts[:count])
    kept = _stored(rows[:count], step.blocks)  # read before the next step overwrites them
    right = step.forward(given, parts)
    added = (right - given)[:count].float().norm(dim=1)
    pairs = [(got, right[:count], tolerance * added + _ROUNDING[given.dtype] * given[:count].float().norm(dim=1))]
    for found, exact in zip(kept, _stored(rows[:count], step.blocks), strict=True):
        pairs.append((found, exact, tolerance * exact.float().norm(dim=1)))
    for name, (found, exact, allowed) in zip(_NAMES, pairs, strict=False):
        away = (found.float() - exact.float()).norm(dim=1)
        if not bool((away <= allowed).all()):  # also true if the difference is NaN
            most = f"{float(away.max()):.3g}, where {float(allowed.max()):.3g} is allowed"
            return f"{name} a wrong result: the error is {most}", right
    return None, right


def _stored(rows: Sequence[SequenceCache], blocks: Sequence[LeanBlock]) -> tuple[Tensor, Tensor]:
    """Keys, and values, of the last stored position of each row, `[rows, numbers in all these blocks]`."""
    indices = {block.index for block in blocks}
    found: list[list[Tensor]] = [[], []]
    for row in rows:
        row.advance(1)
        held = [both for index, *both in row.keys_and_values(row.length) if index in indices]
        for kept, tensors in zip(found, zip(*held, strict=True), strict=True):
            kept.append(torch.cat([tensor[0, :, -1].flatten() for tensor in tensors]))
        row.crop(row.length - 1)
    return torch.stack(found[0]), torch.stack(found[1])


def rows_to_try(span: Any, size: int) -> list[SequenceCache]:
    """Rows with prompts of several lengths, and room for one more position."""
    lengths = [1 + place % _PROMPTS for place in range(size)]
    rows = [span.new_row(length + 1) for length in lengths]
    parts = [RowChunk(row, 0, length) for row, length in zip(rows, lengths, strict=True)]
    span.forward(_noise(span, sum(lengths), seed=0), parts)
    return rows


def _noise(span: Any, positions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(positions, span.hidden_size, generator=generator, dtype=torch.float32)
    return noise.to(device=span.device, dtype=span.dtype)


def _warn(where: str, made: Mapping[int, object], fault: str) -> None:
    most = max(made, default=0)
    log.warning("decode steps of more than %d through %s are not replayed from graphs: %s", most, where, fault)
