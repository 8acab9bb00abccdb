"""Which codec a link uses."""

from __future__ import annotations

from collections.abc import Mapping

CODING_MS: Mapping[str, float] = {"none": 0.004, "int8": 0.031}
"""Time to encode and decode one decode token in ms: measured with 576 values on one CPU core, see docs/codecs.md.

Only codecs whose loss does not show in the text are chosen without being asked for.
"""


def choose_codec(bytes_per_position: Mapping[str, int], bytes_per_ms: float) -> str:
    """The codec with the least time per decode token on a link.

    Args:
        bytes_per_position: size of an encoded position by codec name, of the codecs that both ends know.
        bytes_per_ms: bandwidth of the link; a link that was not measured counts as slow.

    Raises:
        ValueError: none of the codecs may be chosen.
    """
    costs = {
        name: CODING_MS[name] + size / bytes_per_ms for name, size in bytes_per_position.items() if name in CODING_MS
    }
    if not costs:
        raise ValueError(f"no codec to choose from: {', '.join(bytes_per_position) or 'none'}")
    return min(costs, key=lambda name: costs[name])
