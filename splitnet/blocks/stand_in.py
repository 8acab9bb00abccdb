"""What stands in a model for all of its blocks, and what can be found out about a model with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Never

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from splitnet.blocks.backbone import parent_of
from splitnet.errors import AdapterError, UnsupportedModel


class AllBlocks(nn.Module):
    """Stands in the list of blocks as the only one: calls `blocks` and answers as the family's own blocks do.

    The backbone's mask, positions and cache are not handed on: who provides `blocks` has taken from them what it
    needs (see `splitnet.blocks.client_part.backbone_of`).
    """

    attention_type = "full_attention"  # some backbones choose a mask by it
    layer_type = "full_attention"
    block_type = "full_attention"

    def __init__(self, blocks: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self._returns_tuple = returns_tuple

    def forward(
        self, hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        """`[batch, sequence, hidden]` -> `[batch, sequence, hidden]`."""
        output = self.blocks(hidden_states)
        return (output, None) if self._returns_tuple else output  # some unpack two


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
