"""Experts that hold their weights in codes, for every family whose experts transformers runs through one interface.

A class with this interface (`transformers.integrations.moe.use_experts_implementation`) declares the layout of its
tensors and its gating, so one implementation serves all families. A decode step reads only the chosen experts; the
positions of a prefill are sorted by expert. On GPUs, torch's grouped product runs experts in floats where a test proves
it right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from splitnet.errors import first_line
from splitnet.quant.device import milliseconds
from splitnet.quant.grouped import JoinedWeight, hold_experts, runs
from splitnet.quant.packed_tensor import PackedTensor

log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Maximum error of a row, relative to the norm of the family's own result: both results are rounded to half precision.
One wrong expert among a row's four causes a larger error."""

_GROUPED, _OWN = "grouped_mm", "eager"
_ROWS = 1, 33, 132
_CHOSEN = 4
_TIMED_CALLS = 5


_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")


class QuantizedExperts(nn.Module):
    """Base class, before a family's own class of experts, for experts with weights that are held in codes."""

    held: nn.ModuleDict

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Runs each position through its experts: `[positions, hidden]` -> `[positions, hidden]`. The chosen experts
        `top_k_index`, int64, and their shares `top_k_weights` are `[positions, chosen]`."""
        own: Any = self
        positions, chosen = top_k_index.shape
        experts, order = top_k_index.flatten().sort(stable=True)
        rows = hidden_states[order // chosen]
        first = "gate_up_proj" if own.has_gate else "up_proj"
        inner = self._product(first, rows, experts)
        inner = own._apply_gate(inner) if own.has_gate else own.act_fn(inner)
        outer = self._product("down_proj", inner, experts)
        if getattr(own, "has_post_expert_norm", False):
            outer = own.post_expert_norm(outer)
        weighted = outer * top_k_weights.flatten()[order, None]
        unsorted = torch.empty_like(weighted).index_copy(0, order, weighted)
        return unsorted.view(positions, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def _product(self, name: str, rows: Tensor, experts: Tensor) -> Tensor:
        own: Any = self
        if name in self.held:
            product: Any = multiply_by_expert(own.held[name], rows, experts)
        else:  # this weight came in floats, the other in codes
            weight = getattr(self, name)
            lies = weight.transpose(1, 2) if own.is_transposed else weight
            product = torch.cat([rows[of] @ lies[expert].T for expert, of in runs(experts)])
        return product + getattr(self, f"{name}_bias")[experts] if own.has_bias else product


def hold_weight_of_experts(experts: nn.Module, name: str, device: torch.device) -> None:
    """Holds one weight of experts, a `PackedTensor` that `can_hold_experts` accepts, in its codes."""
    own: Any = experts
    stored: Any = own.get_parameter(name).detach()
    if not isinstance(experts, QuantizedExperts):
        experts.__class__ = _held_class(type(experts))
        own.held = nn.ModuleDict()
    own.held[name] = hold_experts(stored.transpose(1, 2) if own.is_transposed else stored, device)
    delattr(experts, name)
    # For code that only inspects the weight. The stored weight would keep the files mapped.
    experts.__dict__[name] = torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def is_weight_of_experts(layer: nn.Module, name: str) -> bool:
    """Whether a parameter is a weight of experts that implement transformers' interface."""
    return name in _WEIGHTS and all(hasattr(layer, attribute) for attribute in _INTERFACE)


def can_hold_experts(layer: nn.Module, name: str, stored: PackedTensor) -> bool:
    """Whether a parameter is a weight of experts whose codes lie along its inputs."""
    own: Any = layer
    return is_weight_of_experts(layer, name) and stored.stacked and stored.transposed == own.is_transposed


def weights_of_experts(block: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """The weights of experts in a block: path, weight, and whether the weight is `[experts, inputs, outputs]`."""
    for path, layer in block.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if is_weight_of_experts(layer, name):
                own: Any = layer
                yield f"{path}.{name}", parameter, own.is_transposed


@cache
def _held_class(family: type[nn.Module]) -> type[nn.Module]:
    return type(family.__name__, (QuantizedExperts, family), {"__module__": family.__module__})


def multiply_by_expert(form: JoinedWeight, rows: Tensor, experts: Tensor) -> Tensor:
    """`[n, inputs]` -> `[n, outputs]`: each row times the weight of its expert; gradients flow to the rows.

    `experts`: `[n]`, int64, ascending.
    """
    if torch.is_grad_enabled() and rows.requires_grad:
        return _ExpertProduct.apply(rows, experts, form)  # pyright: ignore[reportReturnType]
    return _multiplied(form, rows, experts)


def _multiplied(form: JoinedWeight, rows: Tensor, experts: Tensor) -> Tensor:
    many = form.many_from(rows.dtype)
    if len(rows) < many or rows.device.type != "cpu":
        return form.multiply(rows, experts)
    product = rows.new_empty(len(rows), form.outputs)
    few = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for expert, of in runs(experts):
        if of.stop - of.start >= many:
            product[of] = form.multiply_many(rows[of], expert)
            few[of] = False
    if few.any():
        product[few] = form.multiply(rows[few], experts[few])
    return product


class _ExpertProduct(torch.autograd.Function):
    """Rows times the weights of their experts. For the backward pass only the held weights are kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, experts: Tensor, form: JoinedWeight) -> Tensor:
        ctx.experts, ctx.form = experts, form
        return _multiplied(form, rows, experts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        given = gradient.new_empty(len(gradient), ctx.form.inputs)
        for expert, of in runs(ctx.experts):
            given[of] = gradient[of] @ ctx.form.dequantised(gradient.dtype, expert)
        return given, None, None


@torch.inference_mode()
def prove_grouped_product(model: nn.Module) -> None:
    """Makes experts on a GPU run the family's own code where the grouped product is wrong, or slower for one row and
    for many rows."""
    experts: list[Any] = [module for module in model.modules() if _is_grouped(module)]
    if not experts:
        return
    device = next(experts[0].parameters()).device
    try:
        fault = next((fault for module in experts if (fault := fault_of(module)) is not None), None)
        pays = fault is None and any(_is_faster(experts[0], count) for count in (_ROWS[0], _ROWS[-1]))
    except Exception as error:  # there is no kernel, or too little memory to try it
        fault, pays = first_line(error), False
    if fault is not None:
        log.warning("experts on %s run one by one, as torch's grouped product cannot be used: %s", device, fault)
    if not pays:
        for module in experts:
            module.config._experts_implementation = _OWN


def fault_of(experts: Any) -> str | None:
    """The first error found in the grouped product of these experts; None: there is none."""
    for count in _ROWS:
        given = _given(experts, count)
        got, exact = experts(*given).float(), type(experts).forward.__wrapped__(experts, *given).float()
        away = (got - exact).norm(dim=1) / exact.norm(dim=1)
        if not bool((away <= TOLERANCE).all()):  # also true if the error is NaN
            return f"{count} rows are off by {float(away.max()):.3g} of their size"
    return None


def _is_grouped(module: Any) -> bool:
    return (
        not isinstance(module, QuantizedExperts)
        and any(
            is_weight_of_experts(module, name) and weight.device.type != "cpu"
            for name, weight in module.named_parameters(recurse=False)
        )
        and getattr(getattr(module, "config", None), "_experts_implementation", None) == _GROUPED
        and hasattr(type(module).forward, "__wrapped__")
    )


def _given(experts: Any, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the experts of each row, and their shares; a quarter of the experts have no rows."""
    weight = experts.gate_up_proj if experts.has_gate else experts.up_proj
    width = weight.shape[1 if experts.is_transposed else 2]
    noise = torch.Generator().manual_seed(0)
    rows = torch.randn(count, width, generator=noise, dtype=torch.float32)
    some = max(1, experts.num_experts * 3 // 4)
    shares, chosen = torch.rand(count, some, generator=noise, dtype=torch.float32).topk(min(_CHOSEN, some))
    return rows.to(weight), chosen.to(weight.device), shares.to(weight)


def _is_faster(experts: Any, count: int) -> bool:
    given = _given(experts, count)
    device = given[0].device
    before = milliseconds(device, partial(type(experts).forward.__wrapped__, experts, *given), _TIMED_CALLS)
    after = milliseconds(device, partial(experts, *given), _TIMED_CALLS)
    log.info("experts on %s, %d rows: %.3f ms grouped, %.3f ms one by one", device, count, after, before)
    return after < before
