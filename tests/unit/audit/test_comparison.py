from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from splitnet.audit.comparison import MIN_POSITIONS, Verdict, coarse_type, judge
from splitnet.wire.codecs import CODECS

HIDDEN = 512
LIES = {
    "dropped": lambda change: 0.9 * change,
    "noise": lambda change: change + 0.1 * noise(2) * change.norm(dim=1, keepdim=True),
    "steering": lambda change: change + 0.1 * noise(2)[0] * change.norm(dim=1).median(),
    "scaled": lambda change: 1.1 * change,
    "swapped": lambda change: change[[1, 0, *range(2, len(change))]],
    "of one position": lambda change: torch.cat((change[:-1], -change[-1:])),
}


def noise(seed: int, positions: int = MIN_POSITIONS) -> Tensor:
    """Of norm 1 at each position."""
    return torch.randn(positions, HIDDEN, generator=torch.Generator().manual_seed(seed)) / HIDDEN**0.5


class Audit:
    """A span in bfloat16, whose rounding is 1 % of its change, and other weights, whose effect is as large."""

    def __init__(self) -> None:
        self.inputs = 30 * noise(0)
        self.inputs[:, 7] = 2000  # a massive activation
        self.change = 10 * noise(1)
        self.expected = self.inputs + self.change
        self.coarse: Tensor | None = self.expected + 0.1 * noise(3)
        self.alternatives: Mapping[str, Tensor] = {"int8": self.expected + 0.1 * noise(4)}

    def judge(self, outputs: Tensor, codec: str = "none", *, routed: bool = False) -> Verdict:
        used = next(each for each in CODECS.values() if each.name == codec)
        sent = used.decode(used.encode(outputs), *outputs.shape) if codec != "none" else outputs
        return judge(self.inputs, sent, self.expected, self.coarse, self.alternatives, used, routed=routed)


@pytest.mark.parametrize("codec", ["none", "bf16", "int8"])
def test_other_rounding_is_honest(codec: str):
    audit = Audit()
    for seed in range(10, 60):
        verdict = audit.judge(audit.expected + 0.1 * noise(seed), codec)
        assert verdict.honest and verdict.margin < 0.7 and verdict.reason == ""


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_found(lie: str):
    audit = Audit()
    verdict = audit.judge(audit.inputs + LIES[lie](audit.change) + 0.1 * noise(5))
    assert not verdict.honest and verdict.margin > 1


def test_weights_within_rounding_are_found_by_their_direction():
    audit = Audit()
    verdict = audit.judge(audit.alternatives["int8"] + 0.1 * noise(5))
    assert verdict.reason == "int8" and verdict.distance < 2
    assert verdict.shares["int8"] == pytest.approx(1, abs=0.2)


def test_an_alternative_that_rounding_hides_does_not_count():
    audit = Audit()
    audit.alternatives = {"int8": audit.expected + 0.002 * noise(4)}
    verdict = audit.judge(audit.expected + 0.1 * noise(5))
    assert verdict.honest and not verdict.shares


def test_one_position_names_nobody_where_blocks_choose_experts():
    audit = Audit()
    outputs = audit.inputs + LIES["of one position"](audit.change)
    assert audit.judge(outputs).reason == "position"
    assert audit.judge(outputs, routed=True).honest


def test_the_first_position_may_be_rounded_coarsely():
    audit = Audit()
    audit.coarse = torch.cat((audit.expected[:1] + 5 * noise(3)[:1], audit.expected[1:] + 0.1 * noise(3)[1:]))
    assert audit.judge(audit.expected + 0.1 * noise(5)).honest
    assert audit.judge(torch.cat((audit.expected[:1] + 10 * noise(6)[:1], audit.expected[1:]))).honest
    assert not audit.judge(audit.inputs + LIES["noise"](audit.change)).honest


def test_without_coarse_results_a_floor_holds():
    audit = Audit()
    audit.coarse = None
    assert audit.judge(audit.expected + 0.003 * noise(5)).honest
    assert audit.judge(audit.expected + 0.05 * noise(5)).reason == "distance"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_a_lie(value: float):
    audit = Audit()
    outputs = audit.expected.clone()
    outputs[2, 3] = value
    assert not audit.judge(outputs).honest


def test_an_auditor_whose_results_are_not_finite_proves_nothing():
    audit = Audit()
    audit.coarse = audit.expected / 0
    with pytest.raises(ValueError, match="not finite"):
        audit.judge(audit.expected)


def test_blocks_without_effect_are_judged():
    audit = Audit()
    audit.expected = audit.coarse = audit.inputs.clone()
    assert audit.judge(audit.inputs).honest
    assert not audit.judge(audit.inputs + noise(5)).honest


def test_few_positions_and_other_shapes_are_refused():
    audit = Audit()
    with pytest.raises(ValueError, match="8 positions"):
        audit.judge(audit.expected[:, 1:])
    audit.inputs, audit.expected, audit.alternatives = audit.inputs[1:], audit.expected[1:], {}
    audit.coarse = None
    with pytest.raises(ValueError, match="8 positions"):
        audit.judge(audit.expected)


@pytest.mark.parametrize(
    ("claimed", "computes"),
    [
        ("float32", None),
        ("bfloat16/float32", None),
        ("int4/float32", None),
        ("int8/float32", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("int4/bfloat16", torch.bfloat16),
        ("int8/float16", torch.float16),
    ],
)
def test_the_type_of_coarse_results(claimed: str, computes: torch.dtype | None):
    assert coarse_type(claimed) == computes
