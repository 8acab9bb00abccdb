"""Weights in the layouts of torch's kernels for GPUs: here with the kernels that also exist on CPUs."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from splitnet.quant import gpu
from splitnet.quant.choose import INT4_TILES, INT8_SCALED
from splitnet.quant.forms import ScaledForm, WeightForm
from splitnet.quant.gpu import DeviceFp8, DeviceInt4, DeviceInt8, device_form, fault_of, use_device_kernels
from splitnet.quant.grouped import hold_stored
from splitnet.quant.linear import QuantizedLinear
from tests.unit.random_codes import LAYOUTS, matrix_of

CPU = torch.device("cpu")
EXPECTED = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K", "GPTQ", "int4", "int4 by output"), DeviceInt4),
    **dict.fromkeys(("int8 by output",), DeviceInt8),
    "FP8 by output": DeviceFp8,
}
"""The form for each layout; other layouts have none."""


@pytest.mark.default_cases(dtype=(torch.bfloat16,))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_layouts_that_a_kernel_takes_multiply_as_before(name: str, dtype: torch.dtype) -> None:
    matrix = matrix_of(LAYOUTS[name], 64, 512, seed=1)
    made = device_form(hold_stored([matrix], CPU), dtype)
    expected = EXPECTED.get(name)
    if expected is DeviceInt4 and dtype == torch.float32:
        expected = None  # its kernel would round the rows
    assert (None if made is None else type(made)) is expected
    if made is None:
        return
    rows = torch.randn(9, 512, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = rows.clone()
    product = made.multiply(rows)
    assert torch.equal(rows, before) and product.dtype == dtype
    exact = rows.double() @ matrix.to_floats().double().T
    tolerance = 2**-7 if dtype == torch.bfloat16 or expected is DeviceFp8 else 2**-13
    assert (product.double() - exact).norm() <= tolerance * exact.norm()


@given(st.sampled_from([(64, 32), (128, 96), (64, 640), (192, 256)]), st.integers(1, 80), st.integers(0, 2**31))
def test_weights_that_were_floats(shape: tuple[int, int], count: int, seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(seed + 1)).bfloat16()
    for kind in (INT4_TILES, INT8_SCALED):
        held = kind.of(weight)
        assert held is not None
        made = device_form(held, torch.bfloat16)
        assert made is not None
        exact = rows.float() @ held.dequantised(torch.float32).T
        assert (made.multiply(rows).float() - exact).norm() <= 2**-7 * exact.norm()


def test_outliers_and_zeros_keep_their_bits() -> None:
    made = device_form(hold_stored([matrix_of(LAYOUTS["int8 by output"], 32, 64, seed=3)], CPU), torch.float32)
    assert isinstance(made, DeviceInt8)
    rows = torch.randn(3, 64)
    rows[0, 5], rows[1] = 1e4, 0
    exact = rows.double() @ made.dequantised(torch.float32).double().T
    products = made.multiply(rows)
    assert torch.equal(products[1], torch.zeros(32))
    largest = rows.abs().amax(dim=1) * made.dequantised(torch.float32).norm()
    assert ((products - exact).norm(dim=1) <= 2**-13 * largest).all()


class Transposed(DeviceInt8):
    """A kernel with wrong results."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return super().multiply(rows.flip(1))


class Late(DeviceInt8):
    """A kernel that is correct only for a single row."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return super().multiply(rows) * (1 if len(rows) == 1 else 2)


class Absent(DeviceInt8):
    """A kernel that torch lacks on this device."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("Could not run 'aten::_int_mm' on this device\nand much more")


class NotFinite(DeviceInt8):
    """A kernel whose sums are too large."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return super().multiply(rows) * float("nan")


@pytest.mark.parametrize(
    ("kernel", "sentence"),
    [
        (Transposed, "one row: the product is off by"),
        (Late, "some rows: the product is off by"),
        (NotFinite, "one row: the product is off by nan"),
        (Absent, "Could not run 'aten::_int_mm' on this device"),
    ],
)
def test_a_wrong_kernel_is_named_once_and_not_used(
    kernel: type[DeviceInt8], sentence: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "FORMS", (kernel,))
    held = ScaledForm.of(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    assert held is not None
    gpu._warn.cache_clear()
    with caplog.at_level(logging.WARNING, gpu.__name__):
        assert device_form(held, torch.bfloat16) is None
        assert device_form(held, torch.bfloat16) is None
    (record,) = caplog.records
    assert sentence in record.getMessage() and "is converted at every call" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_without_memory_to_try_a_kernel_the_layer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(DeviceInt8):
        def multiply(self, rows: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(gpu, "FORMS", (Full,))
    held = ScaledForm.of(torch.randn(16, 64))
    assert held is not None
    assert device_form(held, torch.bfloat16) is None


def test_the_proof_sees_a_wrong_weight() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    held = ScaledForm.of(weight)
    assert held is not None
    assert fault_of(held, held.dequantised(torch.float32), torch.float32) is None
    assert fault_of(held, weight.flip(0), torch.float32) is not None


def linear_of(held: WeightForm, outputs: int, inputs: int) -> QuantizedLinear:
    return QuantizedLinear.holding(nn.Linear(inputs, outputs, bias=False), held, None)


@pytest.mark.parametrize("faster", [True, False])
def test_layers_take_a_kernel_only_if_it_pays(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = ScaledForm.of(torch.randn(16, 64))
    assert held is not None
    model = nn.ModuleList([linear_of(held, 16, 64)])
    layer = model[0]
    assert isinstance(layer, QuantizedLinear)
    use_device_kernels(model, torch.bfloat16)
    assert layer.held is held  # CPUs use splitnet's kernels
    monkeypatch.setattr(gpu, "_on_gpu", lambda layer: True)
    monkeypatch.setattr(gpu, "_ms", lambda form, row: float((form is held) == faster))
    gpu._faster.clear()
    use_device_kernels(model, torch.bfloat16)
    gpu._faster.clear()
    assert isinstance(layer.held, DeviceInt8) == faster


def test_a_weight_that_layers_share_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    held = ScaledForm.of(torch.randn(16, 64))
    assert held is not None
    monkeypatch.setattr(gpu, "_on_gpu", lambda layer: True)
    model = nn.ModuleList([linear_of(held, 16, 64), linear_of(held, 16, 64)])
    use_device_kernels(model, torch.bfloat16)
    assert all(layer.held is held for layer in model)
