"""The codec of a link is the one with which a token gets across soonest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.codec_choice import CODING_MS, choose_codec

SIZES = {"none": 2304, "fp16": 1152, "int8": 594, "int4": 306}


def test_a_slow_link_is_worth_encoding_for() -> None:
    assert choose_codec(SIZES, bytes_per_ms=1_250) == "int8"


def test_a_fast_link_is_not() -> None:
    assert choose_codec(SIZES, bytes_per_ms=1_000_000) == "none"


def test_codecs_that_change_the_text_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="int4"):
        choose_codec({"int4": 306}, bytes_per_ms=1.0)


@given(st.floats(min_value=1e-3, max_value=1e9))
def test_no_other_choice_is_sooner(bytes_per_ms: float) -> None:
    chosen = choose_codec(SIZES, bytes_per_ms)
    assert all(
        CODING_MS[chosen] + SIZES[chosen] / bytes_per_ms <= CODING_MS[name] + SIZES[name] / bytes_per_ms
        for name in CODING_MS
    )
