"""Experts in floats on GPUs: transformers runs them by torch's grouped product, which proves itself here.

That has kernels for some devices, types and sizes. Otherwise the family's own code runs experts one by one, and waits
for the GPU to name those that were chosen.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import nn

from splitnet.errors import first_line
from splitnet.model.device_clock import milliseconds
from splitnet.model.held_experts import HeldExperts, is_weight_of_experts

log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""How far a row may be from that of the family's own code, relative to its size: both are rounded in half precision. If
one of its four experts is another, it is off by more."""

_GROUPED, _OWN = "grouped_mm", "eager"
_ROWS = 1, 33, 132
_CHOSEN = 4
_TIMED_CALLS = 5

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.inference_mode()
def prove_grouped_product(model: nn.Module) -> None:
    """Has the experts of a model that is on a GPU run by the family's own code where the grouped product is wrong, or
    slower for one row and for many."""
    experts: list[Any] = [module for module in model.modules() if _is_grouped(module)]
    if not experts:
        return
    device = next(experts[0].parameters()).device
    try:
        fault = next((fault for module in experts if (fault := fault_of(module)) is not None), None)
        pays = fault is None and any(_is_faster(experts[0], count) for count in (_ROWS[0], _ROWS[-1]))
    except Exception as error:  # there is no kernel, or no memory to try it
        fault, pays = first_line(error), False
    if fault is not None:
        log.warning("experts on %s run one by one, as torch's grouped product cannot be used: %s", device, fault)
    if not pays:
        for module in experts:
            module.config._experts_implementation = _OWN


def fault_of(experts: nn.Module) -> str | None:
    """What is wrong with the grouped product of these experts; None: nothing."""
    for count in _ROWS:
        given = _given(experts, count)
        got, exact = experts(*given).float(), _by_the_family(experts, *given).float()
        away = (got - exact).norm(dim=1) / exact.norm(dim=1)
        if not bool((away <= TOLERANCE).all()):  # nor if it is no number
            return f"{count} rows are off by {float(away.max()):.3g} of their size"
    return None


def _is_grouped(module: Any) -> bool:
    return (
        not isinstance(module, HeldExperts)
        and any(
            is_weight_of_experts(module, name) and weight.device.type != "cpu"
            for name, weight in module.named_parameters(recurse=False)
        )
        and getattr(getattr(module, "config", None), "_experts_implementation", None) == _GROUPED
        and hasattr(type(module).forward, "__wrapped__")
    )


def _by_the_family(experts: Any, *given: torch.Tensor) -> torch.Tensor:
    return type(experts).forward.__wrapped__(experts, *given)


def _given(experts: Any, count: int) -> Given:
    """Rows, the experts of each, and their shares; not all experts have rows."""
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
    before = milliseconds(device, partial(_by_the_family, experts, *given), _TIMED_CALLS)
    after = milliseconds(device, partial(experts, *given), _TIMED_CALLS)
    log.info("experts on %s, %d rows: %.3f ms grouped, %.3f ms one by one", device, count, after, before)
    return after < before
