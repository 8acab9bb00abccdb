"""The client's head: threads share its products, and each thread gets the result that it would get alone."""

from __future__ import annotations

import copy
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from splitnet.blocks import head as head_module
from splitnet.blocks.head import MOST_ROWS, Head, QuantizedHead, SharedProduct, hold_head
from splitnet.quant.choose import choose_weights
from splitnet.quant.native import has_fast_kernels
from splitnet.session.options import ConnectionOptions
from tests.unit.random_models import random_config

WAIT_S = 20.0
compiled = pytest.mark.skipif(not has_fast_kernels(), reason="the kernels were not compiled for this CPU")
CPU = torch.device("cpu")


class Product:
    """Doubles rows; the first call waits for `go`."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(rows))
        self.begun.set()
        assert self.go.wait(WAIT_S)
        if bool(rows.isnan().any()):
            raise ValueError("no number")
        return 2 * rows


def run_together(product: Product, rows: list[torch.Tensor]) -> list[Any]:
    """Runs one call, and further calls from other threads while it works."""
    shared = SharedProduct(product)
    with ThreadPoolExecutor(len(rows) + 1) as threads:
        first = threads.submit(shared, torch.ones(1, 3))
        assert product.begun.wait(WAIT_S)
        futures = [threads.submit(shared, each) for each in rows]
        while len(shared._waiting) < len(rows):  # each thread adds its rows before it waits
            time.sleep(0)
        product.go.set()
        assert torch.equal(first.result(WAIT_S), 2 * torch.ones(1, 3))
        return [future.exception(WAIT_S) or future.result() for future in futures]


def test_waiting_threads_share_a_product() -> None:
    product = Product()
    rows = [torch.full((count, 3), float(count)) for count in (1, 3, 2)]
    for given, got in zip(rows, run_together(product, rows), strict=True):
        assert torch.equal(got, 2 * given)
    assert product.sizes == [1, 6]


def test_products_are_bounded() -> None:
    product = Product()
    rows = [torch.full((MOST_ROWS - 1, 3), float(number)) for number in range(3)]
    for given, got in zip(rows, run_together(product, rows), strict=True):
        assert torch.equal(got, 2 * given)
    assert product.sizes == [1, MOST_ROWS - 1, MOST_ROWS - 1, MOST_ROWS - 1]


def test_an_error_reaches_all_callers_of_its_product_and_no_later_ones() -> None:
    product = Product()
    shared = SharedProduct(product)
    product.go.set()
    with pytest.raises(ValueError, match="no number"):
        shared(torch.full((1, 3), float("nan")))
    assert torch.equal(shared(torch.ones(2, 3)), 2 * torch.ones(2, 3))


def model_with(dtype: torch.dtype) -> Any:
    config = random_config("llama", blocks=1, hidden=64, vocab=304)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_head_as_it_is_stored_gives_the_same(dtype: torch.dtype) -> None:
    model = model_with(dtype)
    plain = copy.deepcopy(model.lm_head)
    hold_head(model, choose_weights(None, dtype, dtype, CPU))
    assert isinstance(model.lm_head, Head)
    for count in (1, MOST_ROWS, MOST_ROWS + 1):
        hidden = torch.randn(1, count, 64).to(dtype)
        assert torch.allclose(model.lm_head(hidden), plain(hidden), atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_exact_links_imply_an_exact_head() -> None:
    held = {codec: ConnectionOptions(codec=codec).held_as for codec in ("auto", "int8", "none")}
    assert held == {"auto": "auto", "int8": "auto", "none": None}
    assert ConnectionOptions(codec="none", local_weights="int8").held_as == "int8"


@compiled
@torch.no_grad()
def test_a_float32_head_has_a_narrow_copy_of_its_present_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHANGES_S", -1.0)  # every use counts as the first for a long time
    model = model_with(torch.float32)
    hold_head(model, choose_weights("auto", None, torch.float32, CPU))
    head, hidden = model.lm_head, torch.randn(2, 64)

    def narrow() -> bool:
        """Whether products use float16."""
        weight = head.weight.detach()
        exact, rounded = hidden @ weight.T, hidden @ weight.half().float().T
        got = head(hidden)
        assert torch.allclose(got, rounded, atol=1e-3)
        return float((got - rounded).norm()) < 0.1 * float((got - exact).norm())

    assert isinstance(head, nn.Linear) and narrow()
    head.weight.data[7] += 1.0  # torch does not report this change
    assert narrow()
    assert narrow() and copy.deepcopy(head)._copy is None
    head.weight.data = torch.full_like(head.weight.data, 1e6)  # too large for float16
    assert torch.allclose(head(hidden), hidden @ head.weight.T, rtol=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        head.weight.data = torch.randn(304, 64).to(dtype).float()
        assert torch.allclose(head(hidden), hidden @ head.weight.T, atol=1e-5), "nothing is rounded"
    many = torch.randn(MOST_ROWS + 1, 64)
    head.weight.data = torch.randn(304, 64)
    assert torch.allclose(head(many), many @ head.weight.T, atol=1e-5)


@compiled
@torch.no_grad()
@pytest.mark.parametrize("way", ["told", "untold", "permuted", "one row"])
def test_a_weight_that_was_changed_since_the_last_product_is_seen_at_once(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHANGES_S", math.inf)
    head, hidden = Head(nn.Parameter(torch.randn(3000, 64)), None, narrows=True), torch.randn(2, 64)
    head(hidden)
    if way == "told":
        head.weight.mul_(2.0)  # as optimizers change weights
    elif way == "untold":
        head.weight.data += torch.randn(3000, 64)  # as PEFT merges adapters
    elif way == "permuted":
        head.weight.data = head.weight.data.flip(0).clone()
    else:
        head.weight.data[7] *= 2.0
        head.expect_changes()
    assert torch.allclose(head(hidden), hidden @ head.weight.T, atol=2e-2)


@compiled
@torch.no_grad()
def test_a_head_that_is_converted_later_still_works() -> None:
    model = model_with(torch.float32)
    hold_head(model, choose_weights(None, None, torch.float32, CPU))
    hidden = torch.randn(2, 64)
    expected = model.lm_head(hidden)
    assert torch.allclose(model.double().lm_head(hidden.double()).float(), expected, atol=1e-5)
    turned = model.float().lm_head
    turned.weight = nn.Parameter(turned.weight.T.contiguous().T)
    assert torch.allclose(turned(hidden), expected, atol=1e-5)


@compiled
def test_gradients_flow_through_a_head() -> None:
    model = model_with(torch.float32)
    hold_head(model, choose_weights(None, None, torch.float32, CPU))
    hidden = torch.randn(1, 2, 64, requires_grad=True)
    model.lm_head(hidden).sum().backward()
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad, model.lm_head.weight.sum(0).expand(1, 2, -1), atol=1e-5)


@compiled
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int8", "int4"])
@torch.no_grad()
def test_rows_of_a_held_head_are_the_same_alone_and_together(kind: str) -> None:
    model = model_with(torch.float32)
    exact: nn.Module = copy.deepcopy(model.lm_head)
    dtype = torch.float32 if kind == "bfloat16" else None
    hold_head(model, choose_weights(kind, dtype, torch.float32, CPU))
    assert isinstance(model.lm_head, QuantizedHead)
    hidden = torch.randn(4, 64)
    together = model.lm_head(hidden)
    assert torch.equal(together, torch.cat([model.lm_head(row[None]) for row in hidden]))
    assert torch.nn.functional.cosine_similarity(together, exact(hidden)).min() > 0.98


@compiled
@pytest.mark.parametrize("kind", [None, "int8"])
@torch.no_grad()
def test_a_copied_head_shares_nothing(kind: str | None) -> None:
    model = model_with(torch.float32)
    hold_head(model, choose_weights(kind, None, torch.float32, CPU))
    hidden = torch.randn(2, 64)
    before = model.lm_head(hidden)
    head = copy.deepcopy(model.lm_head)
    assert torch.equal(head(hidden), before)
    for tensor in (*head.parameters(), *head.buffers()):
        tensor.zero_()
    assert not head(hidden).any()
    assert torch.equal(model.lm_head(hidden), before)
