"""A chart of what became of clients under each policy, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from simulator.variants import POLICIES

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
    """One quantity: from the figure `low` to the figure `high`; only a bar of `low` where `high` is empty."""

    title: str
    low: str
    high: str = ""


PANELS: Final[Sequence[Panel]] = (
    Panel("time to first token, s: p50 | p95 (log)", "ttft_p50_s", "ttft_p95_s"),
    Panel("time per token, ms: p50 | p95 (log)", "token_p50_ms", "token_p95_ms"),
    Panel("failed sessions", "failed"),
)


def chart(figures: Mapping[str, Figures], title: str) -> str:
    """An SVG document: a row for each policy, a panel for each quantity, the policies of splitnet in a colour."""
    width = LABEL + len(PANELS) * (PANEL + GAP)
    height = HEAD + len(figures) * ROW + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for row, name in enumerate(figures):
        parts.append(_text(LABEL - 10, _middle(row), POLICIES[name].label, "end"))
    for number, panel in enumerate(PANELS):
        left = LABEL + number * (PANEL + GAP)
        parts.append(_text(left, HEAD - 10, panel.title, "start"))
        parts += (_ranges if panel.high else _bars)(panel, figures, left)
    return "\n".join([*parts, "</svg>", ""])


def _middle(row: int) -> float:
    return HEAD + row * ROW + ROW / 2 + 4


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _told(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _colour(name: str) -> str:
    return OWN if POLICIES[name].label.startswith("own") else OTHER


def _ranges(panel: Panel, figures: Mapping[str, Figures], left: float) -> list[str]:
    """From one figure to another on a logarithmic scale."""
    low = min((row[panel.low] for row in figures.values() if row[panel.low] > 0), default=1.0)
    high = max((row[panel.high] for row in figures.values() if row[panel.high] > 0), default=low)
    scale = (PANEL - 120) / max(math.log(high / low), 1e-9)
    parts: list[str] = []
    for row, (name, values) in enumerate(figures.items()):
        begin, end = values[panel.low], values[panel.high]
        if math.isnan(begin):
            parts.append(_text(left, _middle(row), "nobody got one", "start"))
            continue
        middle = HEAD + row * ROW + ROW / 2
        at, to = (left + 5 + scale * math.log(max(value, low) / low) for value in (begin, end))
        parts.append(f'<circle cx="{at:.1f}" cy="{middle}" r="5" fill="{_colour(name)}"/>')
        parts.append(
            f'<path d="M{at:.1f} {middle}H{to:.1f}M{to:.1f} {middle - 6}v12" stroke="{_colour(name)}" '
            'stroke-width="2"/>'
        )
        parts.append(_text(to + 6, _middle(row), f"{_told(begin)} | {_told(end)}", "start"))
    return parts


def _bars(panel: Panel, figures: Mapping[str, Figures], left: float) -> list[str]:
    longest = max((row[panel.low] for row in figures.values()), default=0.0) or 1.0
    parts: list[str] = []
    for row, (name, values) in enumerate(figures.items()):
        value = values[panel.low]
        length = (PANEL - 120) * value / longest
        top = HEAD + row * ROW + 5
        parts.append(f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{ROW - 10}" fill="{_colour(name)}"/>')
        parts.append(_text(left + length + 6, _middle(row), _told(value), "start"))
    return parts
