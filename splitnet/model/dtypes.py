"""Types of weights by name."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from its name; None stays None.

    Raises:
        ValueError: there is no floating-point type of that name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{dtype!r} is not a type of weights: use float32, bfloat16 or float16")
    return found


def is_number_type(dtype: Any) -> TypeGuard[torch.dtype]:
    """Whether it is a type that weights stand for: floating-point numbers of 16 bits or more, not codes."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
