"""How fast the device runs blocks: measured once before the blocks are served, again while the peer is idle, and
corrected by every pass."""

from __future__ import annotations

import math
import platform
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from peers.power import EnergyMeter
from scheduler.batching import PASS_POSITIONS, MovingAverage
from scheduler.facts import CONTEXTS, PASS_SIZES, UNKNOWN_PAST, ContextCost, Speed
from splitnet.blocks.span import RowChunk, Span
from splitnet.paths import KnownFigures
from splitnet.quant import native
from splitnet.quant.device import seconds_after_work, to_device, trim_memory
from splitnet.version import __version__

SHARE = 0.1  # weight of the latest pass in the moving average
PAST_POSITIONS = 64  # chunk size from which the prefill cost of longer contexts is extrapolated
PAST_STEPS = 4  # timed passes of one position at each context; the first one is a warm-up
PAST_CHUNKS = 2  # timed passes of `PAST_POSITIONS` at each context
PAST_S = 0.1  # longest timed pass in seconds; the time of a slower pass is extrapolated from a shorter context
NOISE_POSITIONS = 256  # random positions with which a row is filled repeatedly
DISTURBED = 2.0  # a pass this many times slower than a smaller pass predicts is timed again: the device may be shared


class ObservedSpeed:
    """Ms per block for each of `scheduler.facts.PASS_SIZES`, and the extra ms for positions before a pass (`past`).

    on_measured: called after a new measurement.
    """

    def __init__(self, block_ms: tuple[float, ...], past: ContextCost = UNKNOWN_PAST) -> None:
        self.block_ms = block_ms
        self.past = past
        self._speed = Speed(block_ms)
        self.on_measured: Callable[[], None] = lambda: None

    def pass_s(self, positions: int, blocks: int) -> float:
        return blocks * self._speed.block_ms_at(positions) / 1000

    def replace(self, measured: ObservedSpeed) -> None:
        self.block_ms, self._speed = measured.block_ms, measured._speed
        self.past = measured.past if measured.past.ms else self.past
        self.on_measured()

    def observe_pass(self, positions: int, blocks: int, elapsed_ms: float, past_ms: float = 0.0) -> None:
        """Corrects the two sizes around a pass. past_ms: extra ms per block for the positions before the pass."""
        factor = elapsed_ms / blocks / max(self._speed.block_ms_at(positions) + past_ms, 1e-6)
        correction = MovingAverage(SHARE, 1.0).add(factor)
        above = min(bisect_left(PASS_SIZES, positions), len(PASS_SIZES) - 1)
        touched = {above} if positions >= PASS_SIZES[above] else {above - 1, above}
        corrected = [value * correction if index in touched else value for index, value in enumerate(self.block_ms)]
        self.block_ms = tuple(corrected)
        self._speed = Speed(self.block_ms)


def measure_speed(span: Span, interrupted: Callable[[], bool] = lambda: False) -> ObservedSpeed | None:
    """Times passes of all sizes through the span, after a warm-up. None: the measurement was interrupted between two
    passes.

    A position of a larger pass takes at most about as long as a position of a smaller pass, because more positions
    share the weights. So a long pass runs once, and at most twice more if it takes far longer than predicted.

    Call it from the thread that uses the span.
    """
    # The global generator is not used, because other code in this process may seed it.
    hidden = torch.randn(PASS_SIZES[-1], span.hidden_size, generator=torch.Generator().manual_seed(0))
    blocks = span.end - span.start

    def elapsed_ms(positions: int) -> float:
        began = seconds_after_work(span.device)
        span.forward(hidden[:positions], [RowChunk(span.new_row(), 0, positions)])
        return (seconds_after_work(span.device) - began) * 1000

    elapsed_ms(PASS_SIZES[0])
    block_ms: list[float] = []
    for size in PASS_SIZES:
        times: list[float] = []
        predicted_ms = blocks * block_ms[-1] * size / PASS_SIZES[len(block_ms) - 1] if block_ms else 0.0
        # Short passes vary more.
        while len(times) < (3 if size <= 16 or min(times, default=0.0) > DISTURBED * predicted_ms else 1):
            if interrupted():
                return None
            times.append(elapsed_ms(size))
        block_ms.append(min(times) / blocks)
    trim_memory()
    return ObservedSpeed(tuple(block_ms))


def measure_past(span: Span, most: int, interrupted: Callable[[], bool] = lambda: False) -> ContextCost:
    """Times passes of single blocks after rows of random positions, and without rows: the difference is the cost.

    One block is timed for all blocks with the same kind of cache. A prefill is extrapolated from `PAST_POSITIONS`,
    because the time of attention is proportional to both numbers of positions.

    most: maximum number of positions of a row; longer contexts are left out. An interruption leaves out all contexts.
    Call it from the thread that uses the span.
    """
    contexts = [context for context in CONTEXTS if context <= most]
    if not contexts:
        return UNKNOWN_PAST
    row = span.new_row()
    span.forward(torch.zeros(1, span.hidden_size), [RowChunk(row, 0, 1)])
    total = [(0.0, 0.0)] * len(contexts)
    for block, count in span.kinds(row).items():
        share = count / (span.end - span.start)
        found = _past_of(span.view(block, block + 1), contexts, interrupted)
        if len(found) < len(contexts):
            return UNKNOWN_PAST
        total = [(a + share * x, b + share * y) for (a, b), (x, y) in zip(total, found, strict=True)]
    trim_memory()
    return ContextCost(tuple(total))


@torch.inference_mode()
def _past_of(block: Span, contexts: Sequence[int], interrupted: Callable[[], bool]) -> list[tuple[float, float]]:
    timed = PAST_STEPS + PAST_CHUNKS * PAST_POSITIONS
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PAST_POSITIONS, block.hidden_size, generator=generator)
    row = block.new_row(contexts[-1])

    def elapsed_ms(positions: int) -> float:
        began = seconds_after_work(block.device)
        block.forward(hidden[:positions], [RowChunk(row, row.length, positions)])
        return (seconds_after_work(block.device) - began) * 1000

    def steps_ms() -> float:
        return min([elapsed_ms(1) for _ in range(PAST_STEPS)][1:])

    def chunk_ms() -> float:
        return min(elapsed_ms(PAST_POSITIONS) for _ in range(PAST_CHUNKS))

    none = steps_ms(), chunk_ms()
    index, keys, values = next(row.keys_and_values(1))
    noise: list[torch.Tensor] = []
    for each in (keys, values):
        drawn = torch.randn(*each.shape[:2], NOISE_POSITIONS, each.shape[3], generator=generator)
        noise.append(to_device(drawn, each.device, each.dtype))
    found: list[tuple[float, float]] = []
    for number, context in enumerate(contexts):
        if interrupted():
            break
        while (missing := context - timed - row.length) > 0:
            some = [each[:, :, :missing] for each in noise]
            row.store(index, row.length, *some)
            row.advance(some[0].shape[2])
        step_ms = max(found[-1][0] if found else 0.0, steps_ms() - none[0])
        more_ms = found[-1][1] * context / contexts[number - 1] if number else 0.0
        if none[1] + more_ms * PAST_POSITIONS / PASS_POSITIONS <= 1000 * PAST_S or not number:
            more_ms = (chunk_ms() - none[1]) * PASS_POSITIONS / PAST_POSITIONS
        found.append((step_ms, max(step_ms, more_ms)))
    return found


class KnownSpeeds:
    """Speeds in a file, by the facts that they depend on. An idle peer measures again, because a speed may change."""

    def __init__(self, file: Path) -> None:
        self._known = KnownFigures(file)

    def find_speed(self, span: Span, model: str, most: int = 0) -> ObservedSpeed | None:
        """The speed of the same blocks with the same formats and software; the span runs one pass as a warm-up.

        most: as in `measure_past`; a speed that was kept for fewer positions is not found.
        """
        figures = self._known.find_figure(_key(span, model))
        contexts = sum(context <= most for context in CONTEXTS)
        if not _is_speed(figures) or len(figures) < len(PASS_SIZES) + 2 * contexts:
            return None
        span.forward(torch.zeros(PASS_SIZES[0], span.hidden_size), [RowChunk(span.new_row(), 0, PASS_SIZES[0])])
        past = figures[len(PASS_SIZES) :][: 2 * contexts]
        pairs = tuple(zip(past[::2], past[1::2], strict=True))
        return ObservedSpeed(tuple(figures[: len(PASS_SIZES)]), ContextCost(pairs))

    def keep_speed(self, span: Span, model: str, speed: ObservedSpeed) -> None:
        self._known.keep_figure(_key(span, model), _figures(speed))

    def follow(self, span: Span, model: str, speed: ObservedSpeed) -> None:
        """Keeps later measurements of `speed`. Holds no reference to the span, which a peer that moves frees."""
        key = _key(span, model)
        speed.on_measured = lambda: self._known.keep_figure(key, _figures(speed))


def speed_of(span: Span, model: str, file: Path | None, energy: EnergyMeter, most: int = 0) -> ObservedSpeed:
    """The speed of the span, as known from an earlier start or as measured now. Call it from the thread that uses the
    span.

    model: fingerprint. file: where speeds are kept; None: nowhere. energy: counts the joules of the measurement. most:
    maximum number of positions of a row, see `measure_past`.
    """
    known = KnownSpeeds(file) if file is not None else None
    speed = known.find_speed(span, model, most) if known is not None else None
    if speed is None:
        with energy.computing():
            speed = measure_speed(span)
            assert speed is not None
            speed.past = measure_past(span, most)
        if known is not None:
            known.keep_speed(span, model, speed)
    if known is not None:
        known.follow(span, model, speed)
    return speed


def _figures(speed: ObservedSpeed) -> list[float]:
    return [*speed.block_ms, *(ms for pair in speed.past.ms for ms in pair)]


def _is_speed(figures: Any) -> bool:
    sizes = range(len(PASS_SIZES), len(PASS_SIZES) + 2 * len(CONTEXTS) + 1, 2)
    if not isinstance(figures, list) or len(figures) not in sizes:
        return False
    if not all(isinstance(value, float) and math.isfinite(value) and value >= 0 for value in figures):
        return False
    return all(value > 0 for value in figures[: len(PASS_SIZES)])


def _key(span: Span, model: str) -> str:
    """The constant facts that a speed depends on."""
    device = torch.cuda.get_device_name(span.device) if span.device.type == "cuda" else native.processor()
    software = f"splitnet-{__version__} torch-{torch.__version__} kernels-{native.version()}"
    hardware = f"{platform.node()}/{span.device}/{device} threads-{torch.get_num_threads()}"
    return f"{software} {hardware} {model} {span.start}:{span.end} {span.weights.kind} {span.dtype} kv-{span.kv}"
