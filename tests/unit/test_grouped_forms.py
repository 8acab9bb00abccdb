"""Weights held in the codes of a checkpoint: nothing is lost but the rounding of the rows to 16 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitnet.model.grouped_forms import ExpertForm, GroupedForm, JoinedForm, held_bytes, hold_experts, hold_stored
from splitnet.model.stored import STEPS_GROUP, Codes, Kind, Layout, StoredMatrix, StoredTensor

CPU = torch.device("cpu")
LAYOUTS = {
    "Q4_0": Layout(4, 32, Kind.FLOAT16, offset=8),
    "Q4_1": Layout(4, 32, Kind.FLOAT16, Kind.FLOAT16),
    "Q5_0": Layout(5, 32, Kind.FLOAT16, offset=16),
    "Q5_1": Layout(5, 32, Kind.FLOAT16, Kind.FLOAT16),
    "Q8_0": Layout(8, 32, Kind.FLOAT16, offset=128),
    "Q2_K": Layout(2, 16, Kind.STEPS, Kind.STEPS),
    "Q3_K": Layout(3, 16, Kind.STEPS, offset=4),
    "Q4_K": Layout(4, 32, Kind.STEPS, Kind.STEPS),
    "Q5_K": Layout(5, 32, Kind.STEPS, Kind.STEPS),
    "Q6_K": Layout(6, 16, Kind.STEPS, offset=32),
    "IQ4_NL": Layout(4, 32, Kind.FLOAT16, table="iq4_nl"),
    "IQ4_XS": Layout(4, 32, Kind.STEPS, table="iq4_nl"),
    "MXFP4": Layout(4, 32, Kind.E8M0, table="e2m1"),
    "NVFP4": Layout(4, 16, Kind.FLOAT32, table="e2m1"),
    "NF4": Layout(4, 64, Kind.FLOAT32, table="nf4"),
    "FP8 in blocks": Layout(8, 128, Kind.FLOAT32, table="e4m3"),
    "FP8 by output": Layout(8, 0, Kind.BFLOAT16, table="e4m3"),
    "FP8 e5m2": Layout(8, 32, Kind.E8M0, table="e5m2"),
    "GPTQ": Layout(4, 128, Kind.FLOAT16, Kind.CODES),
    "GPTQ in 8 bits": Layout(8, 128, Kind.FLOAT16, Kind.CODES),
    "int8 by output": Layout(8, 0, Kind.BFLOAT16, offset=128),
    "int4 by output": Layout(4, 0, Kind.FLOAT32, Kind.CODES, offset=8),
    "int4": Layout(4, 32, Kind.BFLOAT16, Kind.BFLOAT16, offset=8),
    "int2": Layout(2, 64, Kind.FLOAT32, Kind.FLOAT16, offset=2),
    "int6": Layout(6, 64, Kind.BFLOAT16, Kind.CODES),
}
"""Of the formats of these names, and others."""

layouts = st.sampled_from(sorted(LAYOUTS)).map(LAYOUTS.__getitem__)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 70), st.integers(1, 40).map(lambda count: 32 * count) | st.integers(1, 1300)


def codes_of(layout: Layout, outputs: int, inputs: int, seed: int) -> Codes:
    """Random ones."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def floats(count: int, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(outputs, count, generator=generator) * 0.1).to(dtype)

    groups = -(-inputs // layout.group) if layout.group else 1
    units = -(-inputs // STEPS_GROUP)
    signed = layout.zero is not Kind.STEPS
    largest = 15 if layout.bits == 2 else 63

    def numbers(kind: Kind) -> torch.Tensor | None:
        if kind is Kind.NONE:
            return None
        if kind is Kind.STEPS:
            if signed:
                return integers(-128, 128, outputs, groups, dtype=torch.int8)
            return integers(0, largest + 1, outputs, groups)
        if kind is Kind.E8M0:
            return integers(110, 130, outputs, groups)
        if kind is Kind.CODES:
            return integers(0, 1 << layout.bits, outputs, groups)
        return floats(groups, {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind.value, torch.float32))

    codes = integers(0, 1 << layout.bits, outputs, inputs)
    if layout.table == "e4m3":
        codes[codes & 127 == 127] = 3  # which are no numbers
    if layout.table == "e5m2":
        codes[codes & 124 == 124] = 3
    scales = numbers(layout.scale)
    assert scales is not None
    steps = [floats(units, torch.float16) * 0.1 if kind is Kind.STEPS else None for kind in (layout.scale, layout.zero)]
    return Codes(codes, scales, numbers(layout.zero), *steps)


def matrix_of(layout: Layout, outputs: int, inputs: int, seed: int) -> StoredMatrix:
    codes = codes_of(layout, outputs, inputs, seed)
    return StoredMatrix(layout, (outputs, inputs), lambda: codes)


@given(layouts, *sizes, seeds)
def test_the_weight_comes_back(layout: Layout, outputs: int, inputs: int, seed: int) -> None:
    matrix = matrix_of(layout, outputs, inputs, seed)
    held = hold_stored([matrix], CPU)
    assert isinstance(held, GroupedForm)
    assert torch.equal(held.dequantised(torch.float32), matrix.floats())
    indices = torch.randint(0, outputs, (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(held.rows(indices), matrix.floats()[indices])
    assert held.tiles.nbytes == held_bytes(layout, outputs, inputs)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 4096), (2048, 5632), (5632, 2048), (1024, 768)])
def test_bytes(name: str, outputs: int, inputs: int) -> None:
    layout = LAYOUTS[name]
    assert held_bytes(layout, outputs, inputs) <= 1.1 * layout.nbytes(outputs, inputs)


def test_two_bits_take_what_their_file_does() -> None:
    assert held_bytes(LAYOUTS["Q2_K"], 4096, 4096) <= 1.02 * 84 / 256 * 4096 * 4096


def test_steps_too_large_for_half_a_byte_are_kept() -> None:
    codes = codes_of(LAYOUTS["Q2_K"], 5, 256, 1)
    codes.scales[2, 3] = 200
    held = hold_stored([StoredMatrix(LAYOUTS["Q2_K"], (5, 256), lambda: codes)], CPU)
    assert torch.equal(held.dequantised(torch.float32), codes.floats(LAYOUTS["Q2_K"]))


@given(st.lists(layouts, min_size=2, max_size=4), seeds)
def test_matrices_of_several_layouts_stand_below_each_other(several: list[Layout], seed: int) -> None:
    matrices = [matrix_of(layout, 5 + index, 64, seed) for index, layout in enumerate(several)]
    held = hold_stored(matrices, CPU)
    assert isinstance(held, JoinedForm) == (len(set(several)) > 1) or len(set(several)) < len(several)
    expected = torch.cat([matrix.floats() for matrix in matrices])
    assert torch.equal(held.dequantised(torch.float32), expected)
    indices = torch.randint(0, len(expected), (9,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(held.rows(indices), expected[indices])


@given(layouts, layouts, st.integers(1, 20), seeds)
def test_experts(first: Layout, second: Layout, outputs: int, seed: int) -> None:
    experts = [
        [matrix_of(first, outputs, 64, seed + 2 * index), matrix_of(second, 3, 64, seed + 2 * index + 1)]
        for index in range(3)
    ]
    stored = StoredTensor.__new__(StoredTensor, experts, stacked=True)
    held = hold_experts(stored, CPU)
    assert isinstance(held, ExpertForm)
    assert (held.experts, held.outputs, held.inputs) == (3, outputs + 3, 64)
    for index in range(3):
        assert torch.equal(held.dequantised(index, torch.float32), stored.floats()[index])
