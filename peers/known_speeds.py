"""Speeds that were measured on this machine before: a peer that starts again need not measure first."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import torch

from peers.speed import ObservedSpeed
from scheduler.swarm import PASS_SIZES
from splitnet.known_figures import KnownFigures
from splitnet.model import kernels
from splitnet.model.span import Part, Span
from splitnet.version import __version__


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
        span.forward(torch.zeros(PASS_SIZES[0], span.hidden_size), [Part(span.new_row(), 0, PASS_SIZES[0])])
        return ObservedSpeed(tuple(block_ms))

    def keep(self, span: Span, model: str, speed: ObservedSpeed) -> None:
        """Remembers what was measured, in place of what was before."""
        self._known.keep(_key(span, model), list(speed.block_ms))


def _is_speed(block_ms: Any) -> bool:
    return (
        isinstance(block_ms, list)
        and len(block_ms) == len(PASS_SIZES)
        and all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in block_ms)
    )


def _key(span: Span, model: str) -> str:
    """All that a speed depends on and does not change by itself."""
    device = torch.cuda.get_device_name(span.device) if span.device.type == "cuda" else kernels.processor()
    return " ".join(
        (
            *(f"splitnet-{__version__}", f"torch-{torch.__version__}", f"kernels-{kernels.version()}"),
            *(f"{platform.node()}/{span.device}/{device}", f"threads-{torch.get_num_threads()}"),
            *(model, f"{span.start}:{span.end}", span.weights.kind, str(span.dtype)),
        )
    )
