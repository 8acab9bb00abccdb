"""A chart of what became of clients under each policy, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from scheduler.simulation.variants import POLICIES

LABEL: Final = 230
PANEL: Final = 250
GAP: Final = 24
ROW: Final = 26
HEAD: Final = 64
OWN: Final = "#1f6f8b"
OTHER: Final = "#9aa5ab"
INK: Final = "#222222"


Figures = Mapping[str, float]
"""Of one policy, as `Outcome.figures` gives them."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity. bar: the figure that the bar shows; mark: that of a stroke further on, empty for no such thing."""

    title: str
    bar: str
    mark: str = ""


PANELS: Final[Sequence[Panel]] = (
    Panel("time to first token, s: p50 | p95", "ttft_p50_s", "ttft_p95_s"),
    Panel("time per token, ms: p50 | p95", "token_p50_ms", "token_p95_ms"),
    Panel("failed sessions", "failed"),
)


def chart(outcomes: Mapping[str, Figures], title: str) -> str:
    """An SVG document: a row for each policy, a panel for each quantity, the policies of splitnet in a colour."""
    width = LABEL + len(PANELS) * (PANEL + GAP)
    height = HEAD + len(outcomes) * ROW + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for row, name in enumerate(outcomes):
        parts.append(_text(LABEL - 10, _middle(row), POLICIES[name].label, "end"))
    for number, panel in enumerate(PANELS):
        left = LABEL + number * (PANEL + GAP)
        parts.append(_text(left, HEAD - 10, panel.title, "start"))
        parts += _bars(panel, outcomes, left)
    return "\n".join([*parts, "</svg>", ""])


def _middle(row: int) -> float:
    return HEAD + row * ROW + ROW / 2 + 4


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bars(panel: Panel, outcomes: Mapping[str, Figures], left: float) -> list[str]:
    bars = [outcome[panel.bar] for outcome in outcomes.values()]
    marks = [outcome[panel.mark] for outcome in outcomes.values()] if panel.mark else bars
    longest = max((value for value in [*bars, *marks] if value == value), default=0.0) or 1.0
    scale = (PANEL - 90) / longest
    parts: list[str] = []
    for row, (name, bar, mark) in enumerate(zip(outcomes, bars, marks, strict=True)):
        top = HEAD + row * ROW + 5
        if bar != bar:
            parts.append(_text(left, _middle(row), "nobody got one", "start"))
            continue
        colour = OWN if name.startswith("own") else OTHER
        parts.append(f'<rect x="{left}" y="{top}" width="{bar * scale:.1f}" height="{ROW - 10}" fill="{colour}"/>')
        told = f"{bar:.3g}"
        if panel.mark:
            end = left + mark * scale
            parts.append(
                f'<path d="M{left + bar * scale:.1f} {top + 8}H{end:.1f}M{end:.1f} {top + 2}v12" stroke="{colour}" '
                'stroke-width="2"/>'
            )
            told += f" | {mark:.3g}"
        parts.append(_text(left + max(bar, mark) * scale + 6, _middle(row), told, "start"))
    return parts
