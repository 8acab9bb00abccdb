"""Speeds that were measured on this machine before: a peer that starts again need not measure first."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
import threading
from pathlib import Path
from typing import Any, Final

import torch

import splitnet
from peers.speed import ObservedSpeed
from scheduler.swarm import PASS_SIZES
from splitnet.model import kernels
from splitnet.model.span import Part, Span

log = logging.getLogger(__name__)

MAX_KNOWN: Final = 64
"""So many are kept, the latest."""


class KnownSpeeds:
    """The speeds in a file. What cannot be read is as if it were not there; what cannot be written is only logged.

    A peer measures again when it is idle, so a speed that is not right any more (another clock, other loads) is not
    used for long.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def find(self, span: Span, model: str) -> ObservedSpeed | None:
        """What was measured of the same blocks, held and computed in the same way; `model`: the fingerprint.

        The span computes once, as it would have done when it was measured.
        """
        block_ms: Any = self._read().get(_key(span, model))
        if not _is_speed(block_ms):
            return None
        span.forward(torch.zeros(PASS_SIZES[0], span.hidden_size), [Part(span.new_row(), 0, PASS_SIZES[0])])
        return ObservedSpeed(tuple(block_ms))

    def keep(self, span: Span, model: str, speed: ObservedSpeed) -> None:
        """Remembers what was measured, in place of what was before."""
        known = self._read()
        key = _key(span, model)
        known.pop(key, None)
        known[key] = list(speed.block_ms)
        latest = dict(list(known.items())[-MAX_KNOWN:])
        # Peers that write at the same time may lose what the others write, and never more than that.
        partial = self._file.with_name(f".{self._file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(latest, indent=1), encoding="utf-8")
            partial.replace(self._file)
        except OSError as error:
            log.info("the speed of this device is not kept in %s: %s", self._file, error.strerror)

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def _is_speed(block_ms: Any) -> bool:
    return (
        isinstance(block_ms, list)
        and len(block_ms) == len(PASS_SIZES)
        and all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in block_ms)
    )


def _key(span: Span, model: str) -> str:
    """All that a speed depends on and does not change by itself."""
    device = torch.cuda.get_device_name(span.device) if span.device.type == "cuda" else _cpu()
    return " ".join(
        (
            *(f"splitnet-{splitnet.__version__}", f"torch-{torch.__version__}", f"kernels-{_kernels()}"),
            *(f"{platform.node()}/{span.device}/{device}", f"threads-{torch.get_num_threads()}"),
            *(model, f"{span.start}:{span.end}", span.weights.kind, str(span.dtype)),
        )
    )


def _kernels() -> str:
    """The path in use, and when these kernels were compiled."""
    module = sys.modules.get("splitnet.model._kernels")
    compiled_at = os.stat(module.__file__).st_mtime_ns if module is not None and module.__file__ else 0
    return f"{kernels.path_in_use()}@{compiled_at}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
