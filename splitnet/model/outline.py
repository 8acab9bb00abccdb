"""Where the blocks of a model were: one module that runs them all, and an outline of their linear layers.

The outline has the names and sizes of the layers and no weights. It is what libraries look through that put adapters on
layers by name, such as PEFT; what they put there, the client hands to the peers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class BlockList(nn.ModuleList):
    """In the place of the list of blocks: to the model's own code one module, to whoever looks for layers the outline.

    Args:
        all_blocks: called in the place of every block.
        outlines: of each block.
    """

    def __init__(self, all_blocks: nn.Module, outlines: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__["_called"] = [all_blocks]
        for index, outline in enumerate(outlines):
            self.add_module(str(index), outline)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.__dict__["_called"])

    def __len__(self) -> int:
        return len(self.__dict__["_called"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_called"][index]


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
