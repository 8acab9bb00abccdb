"""Rotary embeddings: how they turn, and those whose frequencies depend on the length of a sequence."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import torch
from torch import nn


@dataclass(frozen=True)
class Turning:
    """How a family turns the first numbers of heads by cosines and sines.

    Attributes:
        repeats: how often these stand beside each other; some families give those of one half alone.
        adjacent: numbers that are turned together stand side by side, else half of those that are turned lie between.
    """

    repeats: int = 1
    adjacent: bool = False

    @classmethod
    def of(cls, attention: Any, rope: nn.Module) -> Self | None:
        """By trying the function of the family's module that does it; None: it does something else."""
        own: Any = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if own is None:
            return None
        device = next((buffer.device for buffer in rope.buffers()), torch.device("cpu"))
        if device.type == "meta":  # where nothing has values
            return None
        hidden, positions = torch.zeros(1, 3, attention.q_proj.in_features), torch.tensor([[1, 2, 30]])
        cosines, sines = rope(hidden.to(device), positions.to(device))
        heads = torch.randn(1, 2, 3, attention.head_dim, generator=torch.Generator().manual_seed(0)).to(device)
        found = own(heads, heads, cosines, sines)[0]
        for likely in (cls(*each) for each in product((1, 2), (False, True))):
            if cosines.shape[-1] * likely.repeats <= attention.head_dim:
                turns = (cosines.repeat(1, 1, likely.repeats), sines.repeat(1, 1, likely.repeats))
                if torch.allclose(likely._turned(heads, *turns), found, atol=1e-4):
                    return likely
        return None

    def _turned(self, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        turned, rest = heads.split([cosines.shape[-1], heads.shape[-1] - cosines.shape[-1]], dim=-1)
        cosines, sines = cosines.chunk(2, dim=-1)[0], sines.chunk(2, dim=-1)[0]
        pairs = turned.unflatten(-1, (-1, 2) if self.adjacent else (2, -1))
        axis = -1 if self.adjacent else -2
        first, second = pairs.unbind(axis)
        pairs = torch.stack((first * cosines - second * sines, second * cosines + first * sines), dim=axis)
        return torch.cat((pairs.flatten(-2), rest), dim=-1)


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
