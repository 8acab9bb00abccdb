"""Faster ways for decode steps, taken only if they give what the family's own code gives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import nn

from splitnet.blocks.attention import Chunk
from splitnet.blocks.fast.graph_step import GraphStep, with_recordings
from splitnet.blocks.fast.native_step import NativeStep
from splitnet.blocks.fast.torch_step import TorchStep
from splitnet.blocks.kv_cache import SequenceCache

FastStep = TorchStep | GraphStep | NativeStep

LEAN_PROMPT = 5
LEAN_TRIALS = 3
LEAN_TOLERANCE = 0.02
LEAN_TOLERANCE_HALF = 0.3
"""Of what blocks add to their input; the second where they compute in half precision, whose rounding grows on noise
through many blocks. Another structure differs by as much as there is.
"""

LEAN_TOLERANCE_ALONE = 0.04
LEAN_ROUNDING_ALONE = 2.0**-8
"""Of what one block adds in half precision, and of its input, to which it is added: each block is tried alone as well,
as through many of them 30 % let pass what some do otherwise."""


class Runs(Protocol):
    """A span, as far as it is needed to compare with."""

    start: int
    hidden_size: int
    device: torch.device
    dtype: torch.dtype

    end: int

    def new_row(self, room: int | None = None) -> SequenceCache: ...

    def forward(self, hidden: torch.Tensor, parts: Sequence[Chunk]) -> torch.Tensor: ...

    def view(self, start: int, end: int) -> Runs: ...


def find_fast_step(
    span: Runs, blocks: Sequence[nn.Module], rope: nn.Module | None, windows: Sequence[int | None], *, of_torch: bool
) -> FastStep | None:
    """The fastest way through `blocks` that gives the same as `span`, which has these; None: there is none.

    Args:
        of_torch: whether there may be a `TorchStep`.
    """
    compiled = _compiled(blocks, rope, windows, span.dtype) if span.device.type == "cpu" else None
    for step in (compiled, TorchStep.of(blocks, rope, windows) if of_torch else None):
        # Where shapes do not fit, it is another structure with the same names.
        with suppress(RuntimeError):
            if step is None or not _gives_the_same(span, step):
                continue
            if span.dtype == torch.float32 or _each_gives_the_same(span, step, blocks, rope, windows):
                return with_recordings(span, step) if isinstance(step, TorchStep) else step
    return None


def same_kind(
    former: FastStep,
    blocks: Sequence[nn.Module],
    rope: nn.Module | None,
    windows: Sequence[int | None],
    dtype: torch.dtype,
) -> FastStep | None:
    """For some of the blocks that `former` was found for: the same way through these."""
    if isinstance(former, NativeStep):
        return _compiled(blocks, rope, windows, dtype)
    lean = TorchStep.of(blocks, rope, windows)
    return former.with_blocks_of(lean) if isinstance(former, GraphStep) and lean is not None else lean


def _compiled(
    blocks: Sequence[nn.Module], rope: nn.Module | None, windows: Sequence[int | None], dtype: torch.dtype
) -> NativeStep | None:
    with suppress(Exception):  # whatever another structure leads to: there is the family's own code
        return NativeStep.of(blocks, rope, windows, dtype)
    return None


def _each_gives_the_same(
    span: Runs, step: FastStep, blocks: Sequence[nn.Module], rope: nn.Module | None, windows: Sequence[int | None]
) -> bool:
    for index, block in enumerate(blocks, span.start):
        if any(hasattr(module, "top_k") for module in block.modules()):
            continue  # rounding may choose another expert
        alone = same_kind(step, [block], rope, windows, span.dtype)
        if alone is None or not _gives_the_same(span.view(index, index + 1), alone, alone=True):
            return False
    return True


@torch.inference_mode()
def _gives_the_same(span: Runs, step: FastStep, *, alone: bool = False) -> bool:
    """Whether some steps after a prompt come out as the family's own code has them; `alone`: of one block, closely."""
    rows = span.new_row(), span.new_row()
    noise = torch.Generator().manual_seed(0)
    tolerance, rounding = LEAN_TOLERANCE if span.dtype == torch.float32 else LEAN_TOLERANCE_HALF, 0.0
    if alone:
        tolerance, rounding = LEAN_TOLERANCE_ALONE, LEAN_ROUNDING_ALONE
    prompt = torch.randn(LEAN_PROMPT, span.hidden_size, generator=noise, dtype=torch.float32)
    span.forward(torch.cat((prompt, prompt)), [Chunk(row, 0, LEAN_PROMPT) for row in rows])
    for position in range(LEAN_PROMPT, LEAN_PROMPT + LEAN_TRIALS):
        given = torch.randn(1, span.hidden_size, generator=noise).to(device=span.device, dtype=span.dtype)
        expected = span.forward(given, [Chunk(rows[0], position, 1)])
        got = step.forward(given, [Chunk(rows[1], position, 1)])
        rows[1].advance(1)
        allowed = tolerance * (expected - given).float().norm() + rounding * given.float().norm()
        if not (got - expected).float().norm() <= allowed:
            return False
    return True
