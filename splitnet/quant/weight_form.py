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

    @classmethod
    def fits(cls, outputs: int, inputs: int) -> bool:
        """Whether a weight of this shape can be held so, and is the smaller for it than as float32."""
        return True

    @classmethod
    def bytes_for(cls, outputs: int, inputs: int) -> int:
        """Bytes that a weight of this shape takes."""
        raise NotImplementedError

    @classmethod
    def of(cls, weight: torch.Tensor) -> WeightForm | None:
        """Brings a weight into this form (or one of as many bytes), on its device; None if its values do not allow it.

        Args:
            weight: `[outputs, inputs]`, float32; it is left alone and not kept.
        """
        raise NotImplementedError

    @property
    def untracked_bytes(self) -> int:
        """Bytes that it takes besides its tensors."""
        return 0

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


class ScaledOutputs(WeightForm):
    """Codes `[outputs, inputs]` of eight bits, and a scale for each output, `[outputs]`."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.codes: torch.Tensor
        self.scales: torch.Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return self.codes.to(dtype).mul_(self.scales.to(dtype)[:, None])


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
