"""What every form is in which the weight of a linear layer may be held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import nn


class WeightForm(nn.Module):
    """A frozen weight `[outputs, inputs]`. Its tensors are buffers, so that they follow the model to its device.

    They are persistent ones: transformers fills others anew when it has loaded a model.
    """

    exact: bool = False
    """Whether it is known to stand for exactly the values that it was made of."""

    @property
    def alone_as_together(self) -> bool:
        """Whether a row, of a few, gives the same whatever others are with it."""
        return False

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """`[rows, inputs]` -> `[rows, outputs]`, in the type of `rows`; records nothing for gradients."""
        raise NotImplementedError

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that it stands for, `[outputs, inputs]`: a new tensor, made at every call."""
        raise NotImplementedError

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The same in pieces, one below the other, `[some outputs, inputs]`; each is there until the next is asked for.

        They are small where the form can be made floats a part at a time.
        """
        yield self.dequantised(dtype)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """`[rows, outputs]` -> `[rows, inputs]`, in the type of `gradient`: the way back through `multiply`."""
        found: torch.Tensor | None = None
        begin = 0
        for piece in self.pieces(gradient.dtype):
            product = gradient[:, begin : begin + len(piece)] @ piece
            found = product if found is None else found.float().add_(product)
            begin += len(piece)
        assert found is not None
        return found.to(gradient.dtype)


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
