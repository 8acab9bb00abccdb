"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMOOTHED_OVER = 10
"""Steps whose mean the smoothed line shows."""


def draw_loss_curve(metrics: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Writes a PNG of the lines of `metrics.jsonl`."""
    from matplotlib.figure import Figure  # without pyplot there is no window, and no global state

    steps = [line["step"] for line in metrics if "loss" in line]
    losses = [line["loss"] for line in metrics if "loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss of the step")
    if len(losses) > SMOOTHED_OVER:
        windows = [losses[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(losses) + 1)]
        means = [sum(window) / len(window) for window in windows]
        axes.plot(steps, means, color="tab:blue", label=f"mean of {SMOOTHED_OVER} steps")
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="loss on held-out examples")
    accuracy = [(line["step"], line["eval_accuracy"]) for line in metrics if line.get("eval_accuracy") is not None]
    handles = axes.get_legend_handles_labels()
    if accuracy:
        right = axes.twinx()
        right.plot(*zip(*accuracy, strict=True), "s--", color="tab:green", label="accuracy on held-out examples")
        right.set_ylim(0, 1)
        right.set_ylabel("accuracy")
        handles = tuple(a + b for a, b in zip(handles, right.get_legend_handles_labels(), strict=True))
    axes.legend(*handles)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
