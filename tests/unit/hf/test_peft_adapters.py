"""Adapters whose two matrices cannot be multiplied are refused before a step fails."""

from __future__ import annotations

import pytest
import torch

from splitnet.blocks.adapters import AdapterTensors
from splitnet.errors import AdapterError

LAYER = "0.self_attn.q_proj"


def low_rank(a: torch.dtype, b: torch.dtype) -> dict[str, torch.Tensor]:
    return {f"{LAYER}.lora_A": torch.zeros(2, 8, dtype=a), f"{LAYER}.lora_B": torch.zeros(8, 2, dtype=b)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_keeps_the_common_type_of_its_two_matrices(dtype: torch.dtype) -> None:
    kept = AdapterTensors(low_rank(dtype, dtype)).tensors.values()
    assert {tensor.dtype for tensor in kept} == {dtype}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.float64, torch.float64),
    ],
)
def test_matrices_of_different_or_unsupported_types_are_refused(a: torch.dtype, b: torch.dtype) -> None:
    with pytest.raises(AdapterError, match=r"float"):
        AdapterTensors(low_rank(a, b))
