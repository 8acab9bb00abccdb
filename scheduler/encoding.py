"""What it takes to write activations on a link, and which way of writing them is the soonest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Encoding:
    """A codec as the planner sees it.

    bytes_per_position: of an encoded position. step_ms: to encode and decode any step, position_ms: more per position.
    """

    name: str
    bytes_per_position: float
    step_ms: float = 0.0
    position_ms: float = 0.0

    def ms(self, positions: float, bytes_per_ms: float) -> float:
        """Ms to get a step of so many positions over a link, without its latency."""
        per_position = self.position_ms + self.bytes_per_position / bytes_per_ms
        return self.step_ms + positions * per_position


CODING_MS: Final[Mapping[str, tuple[float, float]]] = {"none": (0.0, 0.0001), "int8": (0.24, 0.0029)}
"""(step_ms, position_ms) of the codecs whose loss does not show in the text: only these are chosen without being asked.

Measured on one CPU core with 576 values. A step between two passes finds cold caches, so it costs far more than in a
loop: int8 adds 0.24 ms to a hop (docs/benchmarks.md); the rest is the time for 512 positions at once (docs/codecs.md).
"""


def encodings_of(bytes_per_position: Mapping[str, float]) -> tuple[Encoding, ...]:
    """The codecs that may be chosen, of those with these sizes.

    Raises:
        ValueError: none of the codecs may be chosen.
    """
    known = [Encoding(name, size, *CODING_MS[name]) for name, size in bytes_per_position.items() if name in CODING_MS]
    if not known:
        raise ValueError(f"no codec to choose from: {', '.join(bytes_per_position) or 'none'}")
    return tuple(known)


def choose_codec(bytes_per_position: Mapping[str, float], bytes_per_ms: float) -> str:
    """The codec of a link over which as many positions come in one prefill as in single decode steps.

    Args:
        bytes_per_position: size of an encoded position by codec name, of the codecs that both ends know.
        bytes_per_ms: bandwidth of the link; a link that was not measured counts as slow.

    Raises:
        ValueError: none of the codecs may be chosen.
    """
    return soonest(encodings_of(bytes_per_position), bytes_per_ms).name


def soonest(encodings: Sequence[Encoding], bytes_per_ms: float) -> Encoding:
    """Which of them `choose_codec` takes."""
    return min(encodings, key=lambda encoding: encoding.ms(2, bytes_per_ms))
