"""The codec of a link is the one with which a session's tokens arrive soonest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cost import Encoding, choose_codec, encodings_of

SIZES = {"none": 2304, "fp16": 1152, "int8": 594, "int4": 306}


def test_a_slow_link_gets_int8() -> None:
    assert choose_codec(SIZES, bytes_per_ms=1_250) == "int8"


def test_a_fast_link_gets_no_codec() -> None:
    assert choose_codec(SIZES, bytes_per_ms=100_000) == "none"


def test_codecs_that_change_the_text_are_never_chosen() -> None:
    with pytest.raises(ValueError, match="int4"):
        choose_codec({"int4": 306}, bytes_per_ms=1.0)
    assert [encoding.name for encoding in encodings_of(SIZES)] == ["none", "int8"]


@given(st.floats(min_value=1e-3, max_value=1e9))
def test_no_other_codec_is_faster(bytes_per_ms: float) -> None:
    costs = {encoding.name: encoding.ms(2, bytes_per_ms) for encoding in encodings_of(SIZES)}
    assert costs[choose_codec(SIZES, bytes_per_ms)] == min(costs.values())


def test_the_time_of_a_step_is_the_sum_of_coding_and_sending() -> None:
    assert Encoding("x", 100, step_ms=0.5, position_ms=0.25).ms(4, bytes_per_ms=50) == 0.5 + 4 * (0.25 + 2)
