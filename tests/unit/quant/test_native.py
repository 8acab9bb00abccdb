"""splitnet's compiled kernels: the error of integer products is at most the rounding of the rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitnet.errors import KernelsError
from splitnet.quant import native
from splitnet.quant.choose import INT8_TILES
from splitnet.quant.native import BLOCK, multiply_floats, multiply_listed
from splitnet.quant.packed_tensor import TABLES, StoredMatrix
from tests.unit.quant.test_grouped_forms import far, hold_stored
from tests.unit.random_codes import LAYOUTS, matrix_of

pytestmark = [
    pytest.mark.skipif(not native.has_float_kernels(), reason="the kernels were not compiled for this CPU"),
    pytest.mark.default_cases(path=(native.PLAIN_PATH, native.path_in_use())),
]

LARGEST = 255 * 127 + 127
"""The integer of the largest value of a row."""

outputs = st.integers(1, 9)
inputs = st.integers(1, 200)
counts = st.integers(1, 9)
seeds = st.integers(0, 2**31)


@pytest.fixture(params=native.paths_here(), autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path whose instructions this CPU has."""
    before = native.path_in_use()
    assert before is not None
    native.use_path(request.param)
    yield request.param
    native.use_path(before)


each_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
needs_floats = pytest.mark.parametrize("path", [each for each in native.paths_here() if each != "plain"], indirect=True)


def rows_of(count: int, length: int, seed: int) -> torch.Tensor:
    """Random rows with an outlier and a row of zeros."""
    rows = torch.randn(count, length, generator=torch.Generator().manual_seed(seed))
    rows[0, seed % length] = 1e4
    rows[-1] *= seed % 2
    return rows


def most(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Maximum error of products: half a step per input, plus the rounding of sums in float32."""
    steps = rows.double().abs().amax(1, keepdim=True) / LARGEST
    sizes = weight.double().abs().sum(1)
    return 0.51 * steps * sizes + 1e-5 * (rows.double().abs() @ weight.double().abs().T) + 1e-30


@each_path
@given(outputs, inputs, counts, seeds)
def test_int8(outputs: int, inputs: int, count: int, seed: int) -> None:
    rows = rows_of(count, inputs, seed)
    held = INT8_TILES.of(torch.randn(outputs, inputs))
    assert held is not None
    weight = held.dequantised(torch.float32)
    product = held.multiply(rows)
    assert ((product - rows.double() @ weight.double().T).abs() <= most(rows, weight)).all()


@needs_floats
def test_no_kernel_writes_beyond_its_products_while_another_thread_loads_a_model() -> None:
    """transformers sets torch's default type, for all threads, while it loads; a kernel must not rely on that type."""
    rows, weight = torch.randn(3, 256), torch.randn(4096, 256)
    held = hold_stored([matrix_of(LAYOUTS["FP8 in blocks"], 4096, 256, 3)], torch.device("cpu"))
    expected = multiply_floats(rows, weight), held.multiply(rows.bfloat16())
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = multiply_floats(rows, weight), held.multiply(rows.bfloat16())
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@needs_floats
@each_path
@given(outputs, inputs, counts, seeds)
def test_floats(dtype: torch.dtype, outputs: int, inputs: int, count: int, seed: int) -> None:
    rows = rows_of(count, inputs, seed)
    weight = torch.randn(outputs, inputs).to(dtype)
    product = multiply_floats(rows, weight)
    assert torch.equal(product, torch.cat([multiply_floats(row[None], weight) for row in rows]))
    size = rows.double().abs() @ weight.double().abs().T
    assert ((product - rows.double() @ weight.double().T).abs() <= 1e-5 * size + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [1, 33, 576])
@needs_floats
def test_listed_outputs_have_the_bits_of_the_whole_product(dtype: torch.dtype, inputs: int) -> None:
    row, weight = rows_of(1, inputs, 1)[0], torch.randn(403, inputs).to(dtype)
    whole = multiply_floats(row[None], weight)[0]
    for count in (0, 1, 5, 64, 1001):
        indices = torch.randint(len(weight) // BLOCK * BLOCK, (count,))
        assert torch.equal(multiply_listed(row, weight, indices), whole[indices])
    for unknown in (-1, 403):
        with pytest.raises(IndexError, match=f"there are 403 outputs, and {unknown} is asked for"):
            multiply_listed(row, weight, torch.tensor([0, unknown]))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_infinity_stay_in_their_row(value: float) -> None:
    rows = torch.randn(3, 64)
    rows[1, 5] = value
    held = INT8_TILES.of(torch.randn(16, 64))
    assert held is not None
    product = held.multiply(rows)
    assert not product[1].isfinite().any()
    assert product[[0, 2]].isfinite().all()


def test_largest_numbers_do_not_overflow() -> None:
    rows = torch.ones(1, 2**15)
    held = INT8_TILES.of(torch.ones(1, 2**15))
    assert held is not None
    assert held.multiply(rows).item() == pytest.approx(2**15, rel=1e-2)


@needs_floats
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_outputs(threads: int) -> None:
    rows = torch.randn(2, 96)
    held = INT8_TILES.of(torch.randn(50, 96))
    assert held is not None
    half = torch.randn(50, 96).half()

    def products() -> list[torch.Tensor]:
        return [held.multiply(rows), multiply_floats(rows, half)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = products()
        torch.set_num_threads(threads)
        shared = products()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


@pytest.mark.default_cases(outputs=(33, 5))
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("outputs", "inputs", "count"), [(16, 64, 1), (33, 640, 2), (70, 1300, 9), (5, 96, 3), (20, 48, 4)]
)
def test_codes(name: str, outputs: int, inputs: int, count: int) -> None:
    matrix = matrix_of(LAYOUTS[name], outputs, inputs, 3)
    held = hold_stored([matrix], torch.device("cpu"))
    rows = rows_of(count, inputs, 5)
    assert not far(held.multiply(rows), rows, matrix)
    assert torch.equal(held.dequantised(torch.float32), matrix.to_floats())


@pytest.mark.parametrize("name", LAYOUTS)
def test_largest_codes_and_numbers(name: str) -> None:
    """All values are largest at once, so that sums that are too narrow overflow."""
    matrix = matrix_of(LAYOUTS[name], 18, 2048, 7)
    codes = matrix.read()
    layout = matrix.layout
    values = TABLES[layout.table] if layout.table else torch.arange(1 << layout.bits) - float(layout.offset)
    codes.codes.fill_(int(values.nan_to_num(0, 0, 0).abs().argmax()))
    largest = StoredMatrix(layout, matrix.shape, lambda: codes)
    rows = torch.tensor([1.0, -1.0, 1.0]).repeat(2048, 1).T.contiguous()
    assert not far(hold_stored([largest], torch.device("cpu")).multiply(rows), rows, largest)


@pytest.mark.parametrize("power", [-100, -20, 20, 90])
def test_rows_of_any_size_times_e4m3(power: int) -> None:
    matrix = matrix_of(LAYOUTS["FP8 in blocks"], 20, 256, 3)
    held = hold_stored([matrix], torch.device("cpu"))
    rows = rows_of(3, 256, 5)
    assert torch.equal(held.multiply(rows * 2.0**power), held.multiply(rows) * 2.0**power)


def test_denormal_numbers_count_for_all_settings_of_a_thread() -> None:
    matrix = matrix_of(LAYOUTS["FP8 in blocks"], 20, 256, 3)
    matrix.read().codes.bitwise_and_(0x87)  # codes without an exponent
    held = hold_stored([matrix], torch.device("cpu"))
    rows = rows_of(2, 256, 5)
    expected = held.multiply(rows)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.set_flush_denormal(True)
        found = held.multiply(rows)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert expected.abs().max() > 0 and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "reason"), [("avx3", "there are no such kernels"), ("avx-vnni", "no instructions for")]
)
def test_a_path_that_cannot_be_used_is_refused_by_name(name: str, reason: str, path: str) -> None:
    if name in native.paths_here() or path != native.PLAIN_PATH:
        pytest.skip("it can be used, or was refused already")
    program = "from splitnet.quant import native as kernels"
    environment = {**os.environ, native.PATH_VARIABLE: name}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode and name in ran.stderr and "use one of" in ran.stderr
    ran = subprocess.run([sys.executable, "-c", program], env={**environment, native.PATH_VARIABLE: path})
    assert ran.returncode == 0


@pytest.fixture
def no_prefetch_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without earlier measurements."""
    before = native.prefetch_in_use()
    monkeypatch.setattr(native, "_prefetch", None)
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path))
    yield
    native.use_prefetch(before or native.PREFETCHES[0])


@needs_floats
@pytest.mark.usefixtures("no_prefetch_yet")
def test_a_prefetch_is_kept_when_two_undisturbed_measurements_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    best, other = native.PREFETCHES[2], native.PREFETCHES[1]
    seen = [(best, False), (best, True), (other, True), (best, True), (best, True)]
    measure = Mock(side_effect=[*seen, (other, True)])
    monkeypatch.setattr(native, "fastest_prefetch", measure)

    def start() -> native.Prefetch | None:
        monkeypatch.setattr(native, "_prefetch", None)
        multiply_floats(torch.ones(1, 4), torch.ones(4, 4))
        return native.prefetch_in_use()

    assert [start() for _ in seen] == [found for found, _ in seen] and measure.call_count == len(seen)
    assert start() == best and measure.call_count == len(seen), "it is known from the file"
    monkeypatch.setattr(native, "processor", lambda: "another")
    assert start() == other and measure.call_count == len(seen) + 1


@needs_floats
def test_a_measurement_beside_other_work_is_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = Mock(return_value=dict.fromkeys(native.PREFETCHES, 1.0))
    monkeypatch.setattr(native, "time_prefetches", times)
    for computed_s, undisturbed in ((0.95, True), (0.5, False)):
        monkeypatch.setattr(native.time, "perf_counter", Mock(side_effect=[10.0, 11.0]))
        monkeypatch.setattr(native.time, "thread_time", Mock(side_effect=[5.0, 5.0 + computed_s]))
        assert native.fastest_prefetch() == (native.PREFETCHES[0], undisturbed)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([{0: 1.0, 1: 0.97}, {0: 1.0, 1: 0.97}], 0),
        ([{0: 1.0, 1: 0.9, 2: 0.95}, {0: 1.0, 1: 0.9}], 1),
        ([{0: 1.0, 1: 0.5}, {0: 1.0, 1: 1.0}], 0),
        ([{0: 1.0, 1: 1.5}], 0),
    ],
)
def test_a_prefetch_must_be_faster_twice(
    seen: list[dict[int, float]], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [{native.PREFETCHES[index]: seconds for index, seconds in each.items()} for each in seen]
    monkeypatch.setattr(native, "time_prefetches", Mock(side_effect=times))
    assert native.fastest_prefetch()[0] == native.PREFETCHES[expected]


@needs_floats
def test_products_do_not_depend_on_the_prefetch() -> None:
    before = native.prefetch_in_use()
    rows, weight = rows_of(2, 300, 1), torch.randn(70, 300)
    held = hold_stored([matrix_of(LAYOUTS["Q4_K"], 64, 512, 3)], torch.device("cpu"))
    found: list[tuple[torch.Tensor, ...]] = []
    for each in (*native.PREFETCHES, native.Prefetch("nta", 999999)):
        native.use_prefetch(each)
        found.append((multiply_floats(rows, weight), held.multiply(rows_of(2, 512, 1))))
    native.use_prefetch(before or native.PREFETCHES[0])
    assert all(torch.equal(one, first) for some in found for one, first in zip(some, found[0], strict=True))


@needs_floats
def test_all_prefetches_are_timed_and_none_stays_in_use() -> None:
    before = native.Prefetch("nta", 4096)
    native.use_prefetch(before)
    times = native.time_prefetches(native.PREFETCHES)
    assert native.prefetch_in_use() == before
    native.use_prefetch(native.PREFETCHES[0])
    assert set(times) == set(native.PREFETCHES) and all(0 < seconds < float("inf") for seconds in times.values())


@needs_floats
def test_the_environment_names_path_and_prefetch(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.prefetch_in_use()
    for names, expected in (("nta+4096", "nta+4096"), (f"{path},none", "none"), (f"t0,{path}", "t0+8192")):
        native.use_as_named(names)
        assert (native.path_in_use(), str(native.prefetch_in_use())) == (path, expected)
    with pytest.raises(KernelsError, match=r"nta\+x"):
        native.use_as_named("nta+x")
    native.use_prefetch(before or native.PREFETCHES[0])
