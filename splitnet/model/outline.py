"""An outline of the linear layers of blocks that are elsewhere.

It has the names and sizes of the layers and no weights. It is what libraries look through that put adapters on
layers by name, such as PEFT; what they put there, the client hands to the peers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class RemoteLinear(nn.Linear):
    """A linear layer whose weight is elsewhere; the tensor of this name has its shape and takes no memory."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = _absent(out_features, in_features, dtype)  # type: ignore[assignment]
        self.bias = None  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Raises RuntimeError."""
        raise RuntimeError("the weights of this layer are on the peers")


class RemoteConv1D(Conv1D):
    """The same for the layers of GPT-2, whose weight is `[inputs, outputs]`."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.nx = in_features
        self.nf = out_features
        self.weight = _absent(in_features, out_features, dtype)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raises RuntimeError."""
        raise RuntimeError("the weights of this layer are on the peers")


def outline_of(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The linear layers of a block, by their names."""
    outline = nn.Module()
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            layer: nn.Module = RemoteLinear(module.in_features, module.out_features, dtype)
        elif isinstance(module, Conv1D):
            conv: Any = module
            layer = RemoteConv1D(conv.nx, conv.nf, dtype)
        else:
            continue
        *parents, name = path.split(".")
        owner = outline
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.add_module(name, layer)
    return outline


def _absent(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    # Models are built on the meta device, and what is put on a layer goes to the device of its weight.
    return torch.zeros((), dtype=dtype, device="cpu").expand(rows, columns)
