"""How well a model does on examples that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from splitnet.tuning.encoding import IGNORED, Encoded, collate


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result on held-out examples.

    Attributes:
        loss: mean over the learned tokens, or with a head over the examples.
        accuracy: share of examples whose label was told right; None if they have none.
    """

    loss: float
    accuracy: float | None


@torch.no_grad()
def evaluate(
    model: Any,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad: int,
    words: Sequence[int] | None = None,
    head: bool = False,
    advance: Callable[[int], None] | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Runs a model over rows, by forward passes.

    Args:
        words: the first token of each label, for accuracy by words: the model's label is that of the likeliest token.
        device: of the model.
        head: whether the model's logits are those of labels.
        advance: told how many rows are done after each batch.
    """
    model.eval()
    loss_sum, weight_sum, right = 0.0, 0, 0
    in_parts = not head and getattr(model, "loss_in_parts", False)
    by_length = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(by_length), batch_size):
        part = by_length[start : start + batch_size]
        places = _before_answers(part) if words is not None and not head else [-1] * len(part)
        kept: dict[str, Any] = {}
        if in_parts:
            asked = sorted(set(places))
            kept = {"logits_to_keep": torch.tensor(asked, device=device)}
            places = [asked.index(place) for place in places]
        output = model(**collate(part, pad, head=head, device=device), **kept)
        weight = len(part) if head else sum(row.learned for row in part)
        loss_sum += float(output.loss) * weight
        weight_sum += weight
        if head:
            right += sum(int(output.logits[index].argmax()) == row.choice for index, row in enumerate(part))
        elif words is not None:
            scores = [logits[place, list(words)] for logits, place in zip(output.logits, places, strict=True)]
            right += sum(int(one.argmax()) == row.choice for one, row in zip(scores, part, strict=True))
        if advance:
            advance(len(part))
    classified = head or words is not None
    return Evaluation(loss_sum / weight_sum, right / len(rows) if classified else None)


def _before_answers(rows: Sequence[Encoded]) -> list[int]:
    """The position before the first learned token of each row, from the end: soft prompts come before the rows."""
    longest = max(len(row.ids) for row in rows)
    return [next(at for at, target in enumerate(row.targets) if target != IGNORED) - 1 - longest for row in rows]
