"""What stands in a model for all of its blocks, and what can be found out about a model with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from splitnet.errors import UnsupportedModel
from splitnet.model.backbone import parent_of


class AllBlocks(nn.Module):
    """Stands in the list of blocks as the only one: calls `blocks` and answers as the family's own blocks do.

    The backbone's mask, positions and cache are not handed on: who provides `blocks` has taken from them what it
    needs (see `splitnet.model.shell.backbone_of`).
    """

    attention_type = "full_attention"  # some backbones choose a mask by it
    layer_type = "full_attention"

    def __init__(self, blocks: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self._returns_tuple = returns_tuple

    def forward(
        self, hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """`[batch, sequence, hidden]` -> `[batch, sequence, hidden]`."""
        output = self.blocks(hidden_states)
        return (output,) if self._returns_tuple else output


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


def blocks_return_tuple(model: PreTrainedModel, container: str) -> bool:
    """Whether a family's backbone takes `output[0]` of what a block returns: found by trying both.

    To take `[0]` of a tensor would drop the batch dimension, often without an error.

    Args:
        container: name of the list of blocks in `model`; it may be empty.

    Raises:
        UnsupportedModel: it takes neither a tensor nor a tuple.
    """
    backbone = parent_of(model, container)[0]
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long, device=model.device)}
    for returns_tuple in (False, True):
        with _without_blocks(model, container, returns_tuple):
            output = _attempt(backbone, inputs)
        if output is not None and output.shape[:2] == (2, 3):
            return returns_tuple
    raise UnsupportedModel(f"the client's part of the family {model.config.model_type!r} does not run on its own")


def check_neutral(backbone: PreTrainedModel, container: str, dtype: torch.dtype) -> None:
    """Checks that a backbone does nothing besides its blocks: with none, what goes in must come out.

    Raises:
        UnsupportedModel: it does.
    """
    size = backbone.config.hidden_size
    hidden = torch.linspace(-1, 1, 6 * size, device=backbone.device).reshape(2, 3, size).to(dtype)
    inputs = {"inputs_embeds": hidden, "position_ids": torch.arange(4, 7, device=backbone.device)[None].expand(2, -1)}
    for returns_tuple in (False, True):
        with _without_blocks(backbone, container, returns_tuple):
            output = _attempt(backbone, inputs)
        if output is not None and output.shape == hidden.shape and torch.equal(output, hidden):
            return
    raise UnsupportedModel(
        f"models of the family {backbone.config.model_type!r} cannot be cut into spans: they change the hidden state "
        "outside their blocks in a way that is not known here"
    )


@contextmanager
def _without_blocks(model: PreTrainedModel, container: str, returns_tuple: bool) -> Iterator[None]:
    parent, name = parent_of(model, container)
    blocks: nn.Module = getattr(parent, name)
    config: Any = parent.config
    count = config.num_hidden_layers
    setattr(parent, name, nn.ModuleList([AllBlocks(nn.Identity(), returns_tuple)]))
    config.num_hidden_layers = 1
    try:
        yield
    finally:
        setattr(parent, name, blocks)
        config.num_hidden_layers = count


def _attempt(backbone: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    try:
        with torch.inference_mode():
            output = backbone(**inputs, use_cache=False)[0]
    except (IndexError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return output if isinstance(output, torch.Tensor) else None
