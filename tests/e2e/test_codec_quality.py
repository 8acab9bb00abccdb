"""The codecs on real boundary activations: none may be worse than docs/codecs.md promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.codec_quality import VARIED_TEXT, Comparison
from splitnet.wire.codecs import CODECS, DEFAULT_INT8

pytestmark = pytest.mark.e2e

TOKENS = 512
CUTS = [(10, 20), (5, 25)]
LARGEST_DIVERGENCE = {"none": 0.0, "fp16": 1e-6, "bf16": 5e-5, "int8-block": 5e-3, "int6": 3e-3, "int4": 4e-2}
"""In nats, with cuts before blocks 10 and 20: about twice the measured values, so that a real loss of quality fails."""


@pytest.fixture(scope="module")
def comparison(demo_checkpoint: Path) -> Comparison:
    return Comparison(demo_checkpoint, VARIED_TEXT.read_text(encoding="utf-8"), TOKENS)


@pytest.mark.default_cases(cuts=CUTS[:1])
@pytest.mark.parametrize("cuts", CUTS)
def test_the_divergence_of_int8_is_below_5e_4(comparison: Comparison, cuts: tuple[int, int]) -> None:
    assert comparison.ids.shape == (1, TOKENS)
    quality = comparison.quality(CODECS[DEFAULT_INT8], cuts)
    assert 0 < quality.divergence < 5e-4
    assert quality.top1 > 0.98


@pytest.mark.full
@pytest.mark.parametrize("name", LARGEST_DIVERGENCE)
def test_the_divergence_of_every_other_codec_is_bounded(comparison: Comparison, name: str) -> None:
    assert comparison.quality(CODECS[name], CUTS[0]).divergence <= LARGEST_DIVERGENCE[name]


def test_every_codec_has_a_bound() -> None:
    assert {*LARGEST_DIVERGENCE, DEFAULT_INT8} == set(CODECS)
