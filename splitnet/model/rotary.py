"""Rotary embeddings whose frequencies depend on the length of the sequence that passes through them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class LengthDependentRopes:
    """Those of a backbone. Their modules keep the frequencies, so one sequence passes at a time. Thread-safe."""

    def __init__(self, backbone: nn.Module) -> None:
        self._dynamic: list[Any] = []
        self._any = False
        self._lock = threading.Lock()
        for module in backbone.modules():
            kind: Any = getattr(module, "rope_type", None)
            kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
            self._any |= bool(kinds & {"dynamic", "longrope"})
            if kind == "dynamic":
                self._dynamic.append(module)

    @contextmanager
    def one_sequence(self) -> Iterator[None]:
        """For the time of a pass of one sequence: the frequencies are its own, whatever has passed before."""
        if not self._any:
            yield
            return
        with self._lock:
            for rope in self._dynamic:  # it remembers the longest sequence so far
                rope.inv_freq = rope.original_inv_freq.to(rope.inv_freq.device)
                rope.max_seq_len_cached = rope.original_max_seq_len
            yield
