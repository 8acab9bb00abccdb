"""Weights held in the codes of a checkpoint: the only error is the rounding of rows to 16 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitnet.errors import UnsupportedModel
from splitnet.quant import forms, grouped, tiles
from splitnet.quant.grouped import BlockQuantWeight, JoinedWeight, held_bytes, hold_experts, hold_stored
from splitnet.quant.native import Kernels, convert_grouped, kernels_here, multiplies_bfloat16, multiply_grouped
from splitnet.quant.packed_tensor import CodeLayout, Codes, PackedTensor, ScaleFormat, StoredMatrix, number_of
from splitnet.quant.tiles import TileLayout
from tests.unit.random_codes import LAYOUTS, codes_of, matrix_of

CPU = torch.device("cpu")
layouts = st.sampled_from(sorted(LAYOUTS)).map(LAYOUTS.__getitem__)
seeds = st.integers(0, 2**31)
needs_compiled = pytest.mark.skipif(kernels_here() is Kernels.NONE, reason="the kernels were not compiled")
of_both = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Settings of a test that runs with each value of `way`, which stays the same for all examples."""
sizes = st.integers(1, 70), st.integers(1, 40).map(lambda count: 32 * count) | st.integers(1, 1300)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With splitnet's kernels, or without."""
    if request.param == "torch":
        monkeypatch.setattr(grouped, "kernels_here", lambda: Kernels.NONE)
    elif kernels_here() is Kernels.NONE:
        pytest.skip("the kernels were not compiled")
    return request.param


def rows_of(count: int, length: int, seed: int) -> torch.Tensor:
    """Random rows with an outlier and a row of zeros."""
    rows = torch.randn(count, length, generator=torch.Generator().manual_seed(seed))
    rows[0, seed % length] = 1e3
    rows[-1] *= seed % 2
    return rows


@of_both
@given(layouts, *sizes, seeds)
def test_the_weight_comes_back(way: str, layout: CodeLayout, outputs: int, inputs: int, seed: int) -> None:
    matrix = matrix_of(layout, outputs, inputs, seed)
    held = hold_stored([matrix], CPU)
    assert isinstance(held, BlockQuantWeight)
    assert torch.equal(held.dequantised(torch.float32), matrix.to_floats())
    indices = torch.randint(0, outputs, (7,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(held.rows(indices), matrix.to_floats()[indices])
    assert held.tiles.nbytes == held_bytes(layout, outputs, inputs)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 4096), (2048, 5632), (5632, 2048), (1024, 768)])
def test_bytes(name: str, outputs: int, inputs: int) -> None:
    layout = LAYOUTS[name]
    assert held_bytes(layout, outputs, inputs) <= 1.1 * layout.nbytes(outputs, inputs)


def test_two_bits_take_the_bytes_of_their_file() -> None:
    assert held_bytes(LAYOUTS["Q2_K"], 4096, 4096) <= 1.02 * 84 / 256 * 4096 * 4096


def test_steps_too_large_for_half_a_byte_are_kept() -> None:
    codes = codes_of(LAYOUTS["Q2_K"], 5, 256, 1)
    codes.scales[2, 3] = 200
    held = hold_stored([StoredMatrix(LAYOUTS["Q2_K"], (5, 256), lambda: codes)], CPU)
    assert torch.equal(held.dequantised(torch.float32), codes.to_floats(LAYOUTS["Q2_K"]))


def far(products: torch.Tensor, rows: torch.Tensor, matrix: StoredMatrix, *, many: bool = False) -> bool:
    """Whether the error of products exceeds the rounding of the rows, and of sums in float32.

    Args:
        many: products may be in bfloat16.
    """
    weight, codes = matrix.to_floats().double(), matrix.read()
    layout = matrix.layout
    given = rows.double()
    exact = layout.table == "e5m2"
    largest = given.abs().amax(1, keepdim=True)
    allowed = (2**-22 if exact else 2**-14) * largest * weight.norm(dim=1)
    # The factors of the codes, as unsigned bytes, may be much larger than the weight.
    scales = number_of(layout.scale, codes.scales, codes.scale_units, layout.group or rows.shape[1]).double()
    zeros = codes.zeros if layout.zero is ScaleFormat.STEPS else None
    parts = (256 if layout.table in ("", "iq4_nl", "e4m3", "nf4") else 2**16) * scales.abs().amax(1)
    if zeros is not None:
        parts += number_of(layout.zero, zeros, codes.zero_units, layout.group).double().abs().amax(1)
    allowed = allowed + 2**-22 * given.abs().sum(1, keepdim=True) * (weight.abs().amax(1) + parts)
    expected = given @ weight.T
    if many:
        allowed = allowed + 2**-8 * (expected.abs() + 2 * (given.abs() @ weight.abs().T))
    return bool(((products.double() - expected).abs() > allowed + 1e-30).any())


@of_both
@given(layouts, *sizes, st.integers(1, 9), seeds)
def test_products(way: str, layout: CodeLayout, outputs: int, inputs: int, count: int, seed: int) -> None:
    matrix = matrix_of(layout, outputs, inputs, seed)
    held = hold_stored([matrix], CPU)
    rows = rows_of(count, inputs, seed)
    products = held.multiply(rows)
    assert products.shape == (count, outputs) and not far(products, rows, matrix)
    assert not far(held.multiply(rows.repeat(30, 1))[:count], rows, matrix)
    half = held.multiply(rows.bfloat16())
    assert half.dtype == torch.bfloat16


@of_both
@given(layouts, *sizes, st.integers(10, 600), seeds)
def test_products_of_many_rows(way: str, layout: CodeLayout, outputs: int, inputs: int, count: int, seed: int) -> None:
    matrix = matrix_of(layout, outputs, inputs, seed)
    held = hold_stored([matrix], CPU)
    rows = rows_of(count, inputs, seed).bfloat16()
    products = held.multiply(rows)
    assert products.shape == (count, outputs) and products.dtype == torch.bfloat16
    assert not far(products, rows, matrix, many=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_many_rows_in_parts(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_PART", 2**14)
    matrix = matrix_of(LAYOUTS[name], 150, 160, 1)
    rows = rows_of(70, 160, 1).bfloat16()
    assert not far(hold_stored([matrix], CPU).multiply(rows), rows, matrix, many=True)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="for CPUs that multiply bfloat16")
@given(layouts, *sizes, seeds)
def test_conversion_to_bfloat16_rounds_once(layout: CodeLayout, outputs: int, inputs: int, seed: int) -> None:
    matrix = matrix_of(layout, outputs, inputs, seed)
    held = hold_stored([matrix], CPU)
    assert isinstance(held, BlockQuantWeight)
    if held.has_fast_kernel:
        numbers = torch.empty(outputs, inputs, dtype=torch.bfloat16)
        convert_grouped(held.description, held.tiles, numbers)
        assert torch.equal(numbers, matrix.to_floats().bfloat16())


@needs_compiled
@given(layouts, *sizes, st.integers(1, 9), seeds)
def test_plain_loops(layout: CodeLayout, outputs: int, inputs: int, count: int, seed: int) -> None:
    matrix = matrix_of(layout, outputs, inputs, seed)
    held = hold_stored([matrix], CPU)
    assert isinstance(held, BlockQuantWeight)
    rows = rows_of(count, inputs, seed)
    products = torch.empty(count, outputs)
    multiply_grouped(rows, held.description, held.tiles, products, plainly=True)
    assert not far(products, rows, matrix)


@given(st.lists(layouts, min_size=2, max_size=4), seeds)
def test_matrices_of_several_layouts_are_joined(several: list[CodeLayout], seed: int) -> None:
    matrices = [matrix_of(layout, 5 + index, 64, seed) for index, layout in enumerate(several)]
    held = hold_stored(matrices, CPU)
    assert isinstance(held, JoinedWeight) == (len(set(several)) > 1) or len(set(several)) < len(several)
    expected = torch.cat([matrix.to_floats() for matrix in matrices])
    assert torch.equal(held.dequantised(torch.float32), expected)
    indices = torch.randint(0, len(expected), (9,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(held.rows(indices), expected[indices])


@of_both
@given(layouts, layouts, st.integers(1, 20), seeds)
def test_experts(way: str, first: CodeLayout, second: CodeLayout, outputs: int, seed: int) -> None:
    experts = [
        [matrix_of(first, outputs, 64, seed + 2 * index), matrix_of(second, 3, 64, seed + 2 * index + 1)]
        for index in range(3)
    ]
    stored = PackedTensor.__new__(PackedTensor, experts, stacked=True)
    held = hold_experts(stored, CPU)
    assert isinstance(held, JoinedWeight)
    assert (held.experts, held.outputs, held.inputs) == (3, outputs + 3, 64)
    for index in range(3):
        assert torch.equal(held.dequantised(torch.float32, index), stored.to_floats()[index])
    rows = rows_of(8, 64, seed)
    chosen = torch.tensor([2, 0, 0, 0, 0, 0, 1, 0])
    products = held.multiply(rows, chosen)
    alone = [hold_stored(experts[index], CPU).multiply(row[None]) for index, row in zip(chosen, rows, strict=True)]
    assert torch.equal(products, torch.cat(alone)) or way == "torch"
    for index in range(3):
        its = chosen == index
        parts = zip(products[its].split((outputs, 3), dim=1), experts[index], strict=True)
        assert not any(far(part, rows[its], matrix) for part, matrix in parts)


def test_an_expert_that_does_not_exist_is_refused(way: str) -> None:
    matrices = [[matrix_of(LAYOUTS["Q4_0"], 16, 64, seed)] for seed in range(3)]
    held = hold_experts(PackedTensor.__new__(PackedTensor, matrices, stacked=True), CPU)
    for index in (3, -1):
        with pytest.raises(IndexError):
            held.multiply(torch.randn(2, 64), torch.tensor([0, index]))
        with pytest.raises(IndexError):
            held.dequantised(torch.float32, index)


def test_experts_that_differ_are_refused() -> None:
    matrices = [[matrix_of(LAYOUTS[name], 16, 64, 1)] for name in ("Q4_0", "Q8_0")]
    with pytest.raises(UnsupportedModel, match="different ways"):
        hold_experts(PackedTensor.__new__(PackedTensor, matrices, stacked=True), CPU)


@pytest.mark.parametrize(
    "layout",
    [
        CodeLayout(7, 32, ScaleFormat.FLOAT16),
        CodeLayout(4, 24, ScaleFormat.FLOAT16),
        CodeLayout(4, 0, ScaleFormat.STEPS),
    ],
)
def test_other_layouts_are_refused_by_name(layout: CodeLayout) -> None:
    with pytest.raises(UnsupportedModel, match=f"bits={layout.bits}"):
        held_bytes(layout, 16, 64)


def test_scales_of_another_type_than_the_layout_says_are_refused() -> None:
    codes = codes_of(LAYOUTS["Q4_0"], 16, 64, 1)
    wrong = Codes(codes.codes, codes.scales.bfloat16())
    with pytest.raises(ValueError, match="float16"):
        hold_stored([StoredMatrix(LAYOUTS["Q4_0"], (16, 64), lambda: wrong)], CPU)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "FP8 in blocks", "NF4"])
def test_nan_and_infinity_stay_in_their_row(name: str, value: float, way: str) -> None:
    rows = torch.randn(3, 256)
    rows[1, 5] = value
    product = hold_stored([matrix_of(LAYOUTS[name], 16, 256, 1)], CPU).multiply(rows)
    assert not product[1].isfinite().any() or name in ("FP8 in blocks", "NF4")
    assert not product[1].isfinite().all()
    assert product[[0, 2]].isfinite().all()


def test_a_nan_weight_gives_nan(way: str) -> None:
    codes = codes_of(LAYOUTS["FP8 in blocks"], 16, 256, 1)
    codes.codes[3, 4] = 127
    held = hold_stored([StoredMatrix(LAYOUTS["FP8 in blocks"], (16, 256), lambda: codes)], CPU)
    product = held.multiply(torch.randn(2, 256))
    assert product[:, 3].isnan().all() and product[:, [2, 4]].isfinite().all()


@needs_compiled
@pytest.mark.parametrize("name", ["Q4_0", "GPTQ in 8 bits", "int8 by output"])
def test_largest_numbers_do_not_overflow(name: str) -> None:
    layout = LAYOUTS[name]
    codes = codes_of(layout, 16, 2**15, 1)
    codes.codes.fill_((1 << layout.bits) - 1)
    matrix = StoredMatrix(layout, (16, 2**15), lambda: codes)
    rows = torch.ones(1, 2**15)
    assert not far(hold_stored([matrix], CPU).multiply(rows), rows, matrix)


@needs_compiled
@pytest.mark.parametrize("name", ["FP8 in blocks", "FP8 by output"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_both_orders_of_e4m3(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs without products of bfloat16 have another order and another kernel."""
    codes = codes_of(LAYOUTS[name], 19, 416, 1)
    codes.codes[:2, :256] = torch.arange(256, dtype=torch.uint8)
    codes.codes[codes.codes & 127 == 127] = 0
    matrix = StoredMatrix(LAYOUTS[name], (19, 416), lambda: codes)
    rows = rows_of(count, 416, 1)
    for pairs in {not tiles.multiplies_bfloat16(), True}:
        monkeypatch.setattr(tiles, "multiplies_bfloat16", lambda pairs=pairs: not pairs)
        held = hold_stored([matrix], CPU)
        assert isinstance(held, BlockQuantWeight) and held.order.pairs == pairs
        assert torch.equal(held.dequantised(torch.float32), matrix.to_floats())
        assert not far(held.multiply(rows), rows, matrix)
        again = TileLayout.of(held.layout, 416).unpacked(held.tiles)
        assert torch.equal(again.codes[:19], codes.codes)


@needs_compiled
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_tiles(threads: int) -> None:
    rows = torch.randn(2, 512)
    forms = [hold_stored([matrix_of(layout, 50, 512, 1)], CPU) for layout in LAYOUTS.values()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [form.multiply(rows) for form in forms]
        torch.set_num_threads(threads)
        shared = [form.multiply(rows) for form in forms]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
