"""How fast a device runs its blocks: timed at the start, corrected by every pass."""

from __future__ import annotations

import math
import platform
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peers.power import EnergyMeter
from scheduler import facts
from scheduler.facts import PASS_SIZES
from scheduler.load import MovingAverage
from splitnet.blocks.span import Chunk, Span
from splitnet.paths import KnownFigures
from splitnet.quant import native
from splitnet.quant.device import seconds_after_work, trim_memory
from splitnet.version import __version__

SHARE = 0.1
"""Weight of the latest pass in the average."""

DISTURBED = 2.0
"""A pass that takes so many times what one of a smaller size foretells is timed once more: others may have computed."""


class ObservedSpeed:
    """Ms per block at each of `scheduler.facts.PASS_SIZES`.

    Attributes:
        on_measured: called when it was measured anew.
    """

    def __init__(self, block_ms: tuple[float, ...]) -> None:
        self._speed = facts.Speed(block_ms)
        self.on_measured: Callable[[], None] = lambda: None

    @property
    def block_ms(self) -> tuple[float, ...]:
        return self._speed.block_ms

    @property
    def prefill_ms_per_block_position(self) -> float:
        return self._speed.block_ms[-1] / PASS_SIZES[-1]

    def pass_s(self, positions: int, blocks: int) -> float:
        """Seconds that a pass of so many positions takes."""
        return blocks * self._speed.at(positions) / 1000

    def replace(self, measured: ObservedSpeed) -> None:
        """Takes over what was measured anew."""
        self._speed = measured._speed
        self.on_measured()

    def observe(self, positions: int, blocks: int, elapsed_ms: float) -> None:
        """Takes in one pass of `positions` positions through `blocks` blocks: moves the sizes on both sides of it."""
        factor = elapsed_ms / blocks / max(self._speed.at(positions), 1e-6)
        correction = MovingAverage(SHARE, 1.0).add(factor)
        above = min(bisect_left(PASS_SIZES, positions), len(PASS_SIZES) - 1)
        touched = {above} if positions >= PASS_SIZES[above] else {above - 1, above}
        self._speed = facts.Speed(
            tuple(value * correction if index in touched else value for index, value in enumerate(self.block_ms))
        )


def measure_speed(span: Span, interrupted: Callable[[], bool] = lambda: False) -> ObservedSpeed | None:
    """Times passes of all sizes through the span; the first is a warm-up. None: it was interrupted between two.

    A position of a larger pass takes at most about as long as one of a smaller, as it shares the weights with more.
    So a long pass runs once, and only again (twice at most) if it takes far longer than that.

    Call it from the thread that uses the span.
    """
    # A generator of its own: others in this process may count on the common one.
    hidden = torch.randn(PASS_SIZES[-1], span.hidden_size, generator=torch.Generator().manual_seed(0))
    blocks = span.end - span.start

    def elapsed_ms(positions: int) -> float:
        began = seconds_after_work(span.device)
        span.forward(hidden[:positions], [Chunk(span.new_row(), 0, positions)])
        return (seconds_after_work(span.device) - began) * 1000

    elapsed_ms(PASS_SIZES[0])
    block_ms: list[float] = []
    for size in PASS_SIZES:
        times: list[float] = []
        predicted_ms = blocks * block_ms[-1] * size / PASS_SIZES[len(block_ms) - 1] if block_ms else 0.0
        # A short pass is easily disturbed, a long one takes its time.
        while len(times) < (3 if size <= 16 or min(times, default=0.0) > DISTURBED * predicted_ms else 1):
            if interrupted():
                return None
            times.append(elapsed_ms(size))
        block_ms.append(min(times) / blocks)
    trim_memory()
    return ObservedSpeed(tuple(block_ms))


class KnownSpeeds:
    """Speeds by what they depend on. Anything that is not a speed is as if it were not there.

    A peer measures again when it is idle, so a speed that is not right any more (another clock, other loads) is not
    used for long.
    """

    def __init__(self, file: Path) -> None:
        self._known = KnownFigures(file)

    def find(self, span: Span, model: str) -> ObservedSpeed | None:
        """What was measured of the same blocks, held and computed in the same way; `model`: the fingerprint.

        The span computes once, as it would have done when it was measured.
        """
        block_ms = self._known.find(_key(span, model))
        if not _is_speed(block_ms):
            return None
        span.forward(torch.zeros(PASS_SIZES[0], span.hidden_size), [Chunk(span.new_row(), 0, PASS_SIZES[0])])
        return ObservedSpeed(tuple(block_ms))

    def keep(self, span: Span, model: str, speed: ObservedSpeed) -> None:
        """Remembers what was measured, in place of what was before."""
        self._known.keep(_key(span, model), list(speed.block_ms))

    def follow(self, span: Span, model: str, speed: ObservedSpeed) -> None:
        """Remembers later measurements of `speed`, too. Refers to no span: a peer that moves frees the old one."""
        key = _key(span, model)
        speed.on_measured = lambda: self._known.keep(key, list(speed.block_ms))


def speed_of(span: Span, model: str, file: Path | None, energy: EnergyMeter) -> ObservedSpeed:
    """The speed of the span as it is known from an earlier start, or else as it is measured now.

    Call it from the thread that uses the span.

    Args:
        span: the blocks.
        model: fingerprint of the model.
        file: where speeds are kept for the next start; None: nowhere.
        energy: counts what measuring takes.
    """
    known = KnownSpeeds(file) if file is not None else None
    speed = known.find(span, model) if known is not None else None
    if speed is None:
        with energy.computing():
            speed = measure_speed(span)
        assert speed is not None
        if known is not None:
            known.keep(span, model, speed)
    if known is not None:
        known.follow(span, model, speed)
    return speed


def _is_speed(block_ms: Any) -> bool:
    return (
        isinstance(block_ms, list)
        and len(block_ms) == len(PASS_SIZES)
        and all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in block_ms)
    )


def _key(span: Span, model: str) -> str:
    """All that a speed depends on and does not change by itself."""
    device = torch.cuda.get_device_name(span.device) if span.device.type == "cuda" else native.processor()
    return " ".join(
        (
            *(f"splitnet-{__version__}", f"torch-{torch.__version__}", f"kernels-{native.version()}"),
            *(f"{platform.node()}/{span.device}/{device}", f"threads-{torch.get_num_threads()}"),
            *(model, f"{span.start}:{span.end}", span.weights.kind, str(span.dtype)),
        )
    )
