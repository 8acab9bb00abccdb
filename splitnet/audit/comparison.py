"""Whether the output of a span, computed by a peer, is that of the blocks and the weight format that the peer claims.

The auditor computes the same positions with the claimed weights in float32 (`expected`). Honest peers differ from it by
rounding: `coarse` shows how much, as it is the same computation in half precision, so the tolerance follows the model,
the span and the text, and not a table of models. Three statistics are judged:

- the distance, the median over positions of the difference in units of that rounding, so that no single position
  decides;
- the worst position, for changes of few positions;
- the share of an alternative: where on the line from `expected` to the output of other weights the peer's output lies,
  0 to 1. Rounding has no reason to point along that line, so that even weights whose effect is as small as the rounding
  are found (docs/audits.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitnet.errors import SplitnetError
from splitnet.wire.codecs import Codec

DISTANCE, DISTANCE_ROUTED, WORST, SHARE = 2.5, 6.0, 12.0, 0.5
"""Limits of the three statistics, at least twice what any honest computation reached in `benchmarks/tolerance.py`. The
second is the limit of the distance where blocks choose experts."""

SIGMAS = 5.0
"""An alternative counts if this many standard errors of its share, estimated from `coarse`, are less than `SHARE`. Five
give one false alarm in three million comparisons with normal errors."""
_DEVIATION = 1.4826 * 1.2533  # of a median of normal errors, times the root of their number, in median magnitudes

QUANTILE, QUANTILE_ROUTED = 0.75, 1.0
"""Positions have at least the relative rounding of this quantile of all positions, as single positions may come out
nearly exact by chance. Where blocks choose experts, rounding changes the choice for some positions: the largest
relative rounding counts."""
FLOOR = 2.0**-10
"""Rounding relative to the change that a span makes, if blocks compute in float32: integer kernels round activations to
2^-15 of their largest number, which was seen to grow to 2^-10.4 through ten blocks."""
FLOOR_OF_HALF = 2.0**-6
"""The same if blocks compute in half precision, and the auditor has no weights to measure it: 2^-6.6 was seen between
two kernels after ten blocks (docs/audits.md)."""
EPSILON = 2.0**-22  # rounding relative to the output itself, which may be much larger than the change
MIN_POSITIONS = 8
_TINY = 1e-100  # for divisions of nothing by nothing


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison.

    Attributes:
        distance: median distance over positions, in units of rounding.
        worst: the largest distance of a position.
        shares: the share of each alternative that can be told from the claimed weights.
        reason: the statistic that is above its limit, "distance", "position" or the name of an alternative; empty if
            none is.
        margin: the largest statistic relative to its limit; above 1 for liars.
    """

    distance: float
    worst: float
    shares: Mapping[str, float]
    reason: str
    margin: float

    @property
    def honest(self) -> bool:
        return not self.reason


EQUAL = Verdict(0.0, 0.0, {}, "", 0.0)  # of the same bytes


def coarse_type(claimed: str) -> torch.dtype | None:
    """The type to compute `coarse` in for weights and a type such as `int8/float32`, or None: `FLOOR` is enough.

    int8 in float32 needs it, because products of many rows with int8 are computed in bfloat16 where CPUs can.
    """
    kind, _, computes = claimed.partition("/")
    if (computes or kind) == "float32":
        return torch.bfloat16 if kind == "int8" else None
    return torch.float16 if (computes or kind) == "float16" else torch.bfloat16


def judge(
    inputs: Tensor,
    outputs: Tensor,
    expected: Tensor,
    coarse: Tensor | None,
    alternatives: Mapping[str, Tensor],
    codec: Codec,
    *,
    routed: bool = False,
    floor: float = FLOOR,
) -> Verdict:
    """Compares a peer's output of one span with the auditor's.

    Args:
        inputs: what the peer received, decoded, `[positions, hidden]`, at least `MIN_POSITIONS` positions of one row.
        outputs: what the peer sent, decoded.
        expected: the claimed blocks and weights, computed from `inputs` in float32 by steps of few positions.
        coarse: the same in the type that `coarse_type` gives, by `Span.sequences`, as compiled steps round a third as
            much as the family's own code; None if it gives none.
        alternatives: outputs of other weights, by name, computed as `expected`.
        codec: encoded the outputs.
        routed: whether the blocks choose experts: rounding changes this choice for some positions, which then differ
            as much as those of a liar, so that the worst position is not judged.
        floor: least rounding, relative to the change that the span makes.

    Raises ValueError if the shapes differ, there are too few positions, or the auditor's results are not finite.
    """
    tensors = [inputs, expected, *([] if coarse is None else [coarse]), *alternatives.values()]
    if any(tensor.shape != outputs.shape for tensor in tensors) or len(outputs) < MIN_POSITIONS:
        raise ValueError(f"an audit compares at least {MIN_POSITIONS} positions, all of the shape of the inputs")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError("the auditor's own results are not finite, so they prove nothing")
    if not bool(torch.isfinite(outputs).all()):
        return Verdict(torch.inf, torch.inf, {}, "distance", torch.inf)
    given, found, expected = inputs.double(), outputs.double(), expected.double()
    change, error = (expected - given).norm(dim=1).clamp_min(_TINY), found - expected
    coded = codec.decode(codec.encode(expected.float()), *expected.shape).double() - expected
    rounded = torch.zeros_like(expected) if coarse is None else coarse.double() - expected
    squares = rounded.square().sum(1) + coded.square().sum(1)
    noise = (squares + (floor * change + EPSILON * expected.norm(dim=1)).square()).sqrt()
    noise = noise.maximum((noise / change).quantile(QUANTILE_ROUTED if routed else QUANTILE) * change)
    distances = error.norm(dim=1) / noise
    distance, worst = float(distances.median()), float(distances.max())
    values = {"distance": distance / (DISTANCE_ROUTED if routed else DISTANCE)}
    if not routed:
        values["position"] = worst / WORST
    shares: dict[str, float] = {}
    for name, other in alternatives.items():
        away = other.double() - expected
        spread = _shares(rounded + coded, away).abs().median() * _DEVIATION / len(outputs) ** 0.5
        if SIGMAS * float(spread) < SHARE:
            shares[name] = float(_shares(error, away).median())
            values[name] = shares[name] / SHARE
    reason = max(values, key=lambda each: values[each])
    return Verdict(distance, worst, shares, "" if values[reason] <= 1 else reason, values[reason])


def judge_all(
    inputs: Tensor,
    outputs: Tensor,
    expected: Tensor,
    coarse: Tensor | None,
    alternatives: Mapping[str, Tensor],
    codec: Codec,
    *,
    routed: bool,
    floor: float = FLOOR,
) -> Verdict:
    """As `judge`, for each `MIN_POSITIONS` positions; the verdict with the largest margin. Raises SplitnetError in
    place of ValueError."""
    verdicts: list[Verdict] = []
    for first in range(0, max(1, len(outputs)), MIN_POSITIONS):
        within = slice(max(0, min(first, len(outputs) - MIN_POSITIONS)), first + MIN_POSITIONS)
        rounded = None if coarse is None else coarse[within]
        others = {name: each[within] for name, each in alternatives.items()}
        facts = inputs[within], outputs[within], expected[within], rounded, others, codec
        try:
            verdicts.append(judge(*facts, routed=routed, floor=floor))
        except ValueError as error:
            raise SplitnetError(str(error)) from None
    return max(verdicts, key=lambda verdict: verdict.margin)


def _shares(error: Tensor, away: Tensor) -> Tensor:
    """The part of `error` along `away`, by position, in units of `away`."""
    return (error * away).sum(1) / away.square().sum(1).clamp_min(_TINY)
