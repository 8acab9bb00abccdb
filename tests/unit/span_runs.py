"""Runs of a span's blocks on noise, for tests that compare two implementations."""

from __future__ import annotations

import torch

from splitnet.blocks.span import RowChunk, Span


def decoded(span: Span, lengths: tuple[int, ...], steps: int) -> torch.Tensor:
    """Outputs of decode steps of sequences that share passes, after prompts of the given lengths."""
    torch.manual_seed(7)
    rows = [span.new_row() for _ in lengths]
    prompts = torch.randn(sum(lengths), span.hidden_size)
    span.forward(prompts, [RowChunk(row, 0, length) for row, length in zip(rows, lengths, strict=True)])
    outputs = [
        span.forward(torch.randn(len(rows), span.hidden_size), [RowChunk(row, row.length, 1) for row in rows])
        for _ in range(steps)
    ]
    return torch.stack(outputs).float()


def windows_of_drafts(span: Span, counts: tuple[int, ...]) -> torch.Tensor:
    """Outputs of passes with several positions per sequence, where some positions are cropped before the next pass."""
    torch.manual_seed(8)
    rows = [span.new_row() for _ in counts]
    outputs: list[torch.Tensor] = []
    for _ in range(5):
        hidden = torch.randn(sum(counts), span.hidden_size)
        outputs.append(
            span.forward(hidden, [RowChunk(row, row.length, n) for row, n in zip(rows, counts, strict=True)])
        )
        for row, count in zip(rows, counts, strict=True):
            row.crop(row.length - count // 3)
    return torch.stack(outputs).float()
