"""An outline of blocks that are elsewhere.

It has the names of all their modules, the sizes of the linear layers, and no weights. It is what libraries look through
that put adapters on layers by name, such as PEFT; what they put there, the client hands to the peers or refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Never

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitnet.errors import AdapterError


class AbsentWeight(torch.Tensor):
    """Shape, type and device of a weight that is elsewhere. Whatever needs its numbers is refused.

    It is on the CPU: what is put on a layer goes to the device of its weight.
    """

    @staticmethod
    def __new__(cls, rows: int, columns: int, dtype: torch.dtype) -> AbsentWeight:
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, (rows, columns), dtype=dtype, device="cpu")

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: Any = (), kwargs: Any = None) -> Never:
        raise _absent()

    def __deepcopy__(self, memo: object) -> AbsentWeight:
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AbsentWeight{tuple(self.shape)}"


class RemotePart(nn.Module):
    """A module that has no weights here; what is within it has neither, unless an adapter was put there."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Raises AdapterError if there are none: who asks this of a part needs some."""
        first = next(found := super().parameters(recurse), None)
        if first is None:
            raise _absent()
        yield first
        yield from found


class RemoteLinear(nn.Linear):
    """A linear layer whose weight is elsewhere."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = AbsentWeight(out_features, in_features, dtype)  # type: ignore[assignment]
        self.bias = None  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Raises AdapterError."""
        raise _absent()


class RemoteConv1D(Conv1D):
    """The same for the layers of GPT-2, whose weight is `[inputs, outputs]`."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.nx = in_features
        self.nf = out_features
        self.weight = AbsentWeight(in_features, out_features, dtype)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raises AdapterError."""
        raise _absent()


def outline_of(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The modules of a block, by their names."""
    if isinstance(block, nn.Linear):
        return RemoteLinear(block.in_features, block.out_features, dtype)
    if isinstance(block, Conv1D):
        conv: Any = block
        return RemoteConv1D(conv.nx, conv.nf, dtype)
    outline = RemotePart()
    for name, part in block.named_children():
        outline.add_module(name, outline_of(part, dtype))
    return outline


def _absent() -> AdapterError:
    return AdapterError(
        "this needs weights of the blocks, as PiSSA, OLoRA, DoRA, AdaptionPrompt, modules_to_save and merging do, and "
        "they are on the peers: use LoRA that begins without them (init_lora_weights=True), a prompt or a prefix, and "
        "load the model again"
    )
