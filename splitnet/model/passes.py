"""Forward and backward passes over whole sequences, block by block.

Only the input of the span need have been kept for a backward pass: the rest is computed again (Chen et al., "Training
Deep Nets with Sublinear Memory Cost", arXiv:1604.06174), so that the activations of one pass are in memory, not those
of all. The weights of the blocks stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from splitnet.model.adapters import Adapter, block_of
from splitnet.model.span import Span


class SpanPasses:
    """Passes through a span. Use it from the thread that uses the span.

    Args:
        span: the blocks.
        between: called between two blocks, so that more urgent work need not wait for the end of a pass.
    """

    def __init__(self, span: Span, between: Callable[[], None] = lambda: None) -> None:
        self._span = span
        self._between = between
        self._views: dict[int, Span] = {}

    def forward(
        self, hidden: torch.Tensor, lengths: Sequence[int], adapter: Adapter | None, start: int, end: int
    ) -> torch.Tensor:
        """Runs whole sequences through blocks `[start, end)`.

        Args:
            hidden: `[positions, hidden]`: the sequences one after the other.
            lengths: positions of each.
            adapter: one that the span fits.

        Returns:
            `[positions, hidden]`.
        """
        for block in range(start, end):
            with torch.no_grad():
                hidden = self._view(block).sequences(hidden, lengths, adapter)
            self._between()
        return hidden

    def backward(
        self,
        hidden: torch.Tensor,
        lengths: Sequence[int],
        gradient: torch.Tensor,
        adapter: Adapter | None,
        start: int,
        end: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradients of a loss by what a forward pass was given.

        Args:
            hidden, lengths, adapter, start, end: as in `forward`.
            gradient: `[positions, hidden]`, of the loss by the output.

        Returns:
            The gradient by `hidden`, and those by the tensors of the adapter in these blocks.

        Raises:
            ValueError: the gradient does not fit `hidden`.
        """
        if gradient.shape != hidden.shape:
            raise ValueError(f"expected a gradient of {list(hidden.shape)}, got {list(gradient.shape)}")
        traced = Adapter(adapter.within(start, end)).traced() if adapter is not None else None
        ways: list[tuple[torch.Tensor, torch.Tensor]] = []
        for block in range(start, end):
            with torch.enable_grad():
                given = hidden.detach().requires_grad_()
                hidden = self._view(block).sequences(given, lengths, traced)
            ways.append((given, hidden))
            self._between()
        found: dict[str, torch.Tensor] = {}
        gradient = gradient.to(hidden)
        for block in reversed(range(start, end)):
            given, output = ways.pop()
            names = [name for name in (traced.tensors if traced else ()) if block_of(name) == block]
            leaves = [traced.tensors[name] for name in names] if traced else []
            gradient, *by_adapter = torch.autograd.grad(output, [given, *leaves], gradient)
            found.update(zip(names, by_adapter, strict=True))
            self._between()
        return gradient, found

    def _view(self, block: int) -> Span:
        view = self._views.get(block)
        if view is None:
            view = self._views[block] = self._span.view(block, block + 1)
        return view
