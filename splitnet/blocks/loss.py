"""The loss of a causal model, computed for some positions at a time, so that never all logits are there.

Logits over a vocabulary are by far the largest tensors of a client that trains. Here those of a part give its loss and,
if anything is trained, their gradient in the same place, which goes back through the head at once. What is kept is the
gradient by the hidden states. Positions without a label are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The label of a position that is not learned, as in transformers."""

PART_BYTES = 32 * 2**20
"""Of the logits of a part, in float32. Some families make a few tensors of that size of them."""

Score = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states `[positions, hidden]` -> logits `[positions, vocabulary]`."""


def loss_in_parts(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    score: Score,
    vocabulary: int,
    *,
    trained: Sequence[torch.Tensor] = (),
    items: torch.Tensor | float | None = None,
    part_bytes: int = PART_BYTES,
) -> torch.Tensor:
    """The cross-entropy of each position and the label of the next, as `ForCausalLMLoss` of transformers has it.

    Args:
        hidden: `[batch, positions, hidden]`.
        labels: `[batch, positions]`; `IGNORED` where nothing is learned.
        score: what the head does to each position; it records gradients where they are enabled.
        vocabulary: how many logits a position has.
        trained: what may be trained within `score`; it gets gradients if it is used there.
        items: what the sum is divided by; None: the number of labels.
        part_bytes: of the logits of a part; one position is the least.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: labels are of another shape.
    """
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels must be [batch, positions] = {list(hidden.shape[:2])}, not {list(labels.shape)}")
    if not torch.is_grad_enabled():
        hidden, trained = hidden.detach(), ()
    following = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(hidden.device)
    learned = following != IGNORED
    positions = max(1, part_bytes // (vocabulary * torch.float32.itemsize))
    total: Any = _Sum.apply(score, positions, hidden[learned], following[learned], *trained)
    if items is None:
        return total / learned.sum()
    return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)


class _Sum(torch.autograd.Function):
    """The sum over positions. Gradients are computed on the way forward, for a sum that counts once."""

    @staticmethod
    def forward(
        ctx: Any, score: Score, positions: int, hidden: torch.Tensor, labels: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        _, _, by_hidden, _, *by_trained = ctx.needs_input_grad
        wanted = [tensor for tensor, needed in zip(trained, by_trained, strict=True) if needed]
        gradient = torch.empty_like(hidden) if by_hidden else None
        found: list[torch.Tensor | None] = [None] * len(wanted)
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(labels), positions):
            part = slice(begin, begin + positions)
            given = hidden[part].detach().requires_grad_(by_hidden)
            with torch.set_grad_enabled(by_hidden or bool(wanted)):
                logits = score(given)
            losses[part], by_logits = _entropy(logits, labels[part])
            if not logits.requires_grad:
                continue
            leaves = [*([given] if by_hidden else []), *wanted]
            grown = list(torch.autograd.grad(logits, leaves, by_logits.to(logits.dtype), allow_unused=True))
            if gradient is not None:
                gradient[part] = grown.pop(0)
            for index, one in enumerate(grown):
                before = found[index]
                found[index] = one if before is None or one is None else before.add_(one)
        ctx.save_for_backward(gradient, *found)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (factor,) = gradients
        gradient, *found = (None if saved is None else saved * factor for saved in ctx.saved_tensors)
        by_trained = [found.pop(0) if needed else None for needed in ctx.needs_input_grad[4:]]
        return None, None, gradient, None, *by_trained


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each position, and the gradient of their sum by the logits, in whose place it is put.

    torch tells if the way back needs the logits themselves: with what is detached it counts changes.
    """
    scores = logits.detach().float()
    labels = labels[:, None]
    largest = scores.amax(dim=-1, keepdim=True)
    chosen = scores.gather(1, labels) - largest
    total = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    scores.div_(total).scatter_add_(1, labels, torch.full_like(chosen, -1))
    return (total.log() - chosen)[:, 0], scores
