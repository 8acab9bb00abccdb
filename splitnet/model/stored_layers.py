"""Layers whose weight the checkpoint has in codes, once transformers has loaded them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitnet.model.grouped_forms import GroupedForm, JoinedForm, hold_stored
from splitnet.model.held_experts import can_hold_experts, hold_weight_of_experts
from splitnet.model.held_linear import HeldLinear, is_router, matrices_of, sizes_of
from splitnet.model.stored import StoredMatrix, StoredTensor


class HeldEmbedding(nn.Embedding):
    """A frozen embedding whose weight is held in the codes of the checkpoint.

    Its `weight` is for those who look at it, or want all of it as numbers: it is read from the files when it is used.
    """

    held: GroupedForm | JoinedForm
    parameter_like: nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[...]` -> `[..., hidden]`."""
        rows = self.held.rows(input.reshape(-1), self.parameter_like.dtype)
        return rows.view(*input.shape, self.embedding_dim)


def hold_codes(model: nn.Module, codes_on: torch.device | None) -> None:
    """Leaves no parameter of a model in the codes of a checkpoint: a layer holds them, or they become numbers.

    Layers that share a weight share what holds it.

    Args:
        codes_on: the device on which the model will be; None: all become numbers.
    """
    forms: dict[int, GroupedForm | JoinedForm] = {}
    numbers: dict[int, nn.Parameter] = {}
    found = [
        (path, layer, name, parameter)
        for path, layer in model.named_modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if isinstance(parameter, StoredTensor)
    ]
    for path, layer, name, parameter in found:
        stored: Any = parameter
        matrices: Sequence[StoredMatrix] | None = None
        if codes_on is not None and can_hold_experts(layer, name, stored):
            hold_weight_of_experts(layer, name, codes_on)
            continue
        if codes_on is not None and name == "weight" and can_hold_codes(path, layer):
            matrices = matrices_of(stored, transposed=isinstance(layer, Conv1D))
        if codes_on is None or matrices is None:
            if id(stored) not in numbers:
                numbers[id(stored)] = nn.Parameter(stored.floats(), requires_grad=stored.requires_grad)
            layer.register_parameter(name, numbers[id(stored)])
            continue
        if id(stored) not in forms:
            forms[id(stored)] = hold_stored(matrices, codes_on)
        if isinstance(layer, nn.Embedding):
            _hold_embedding(layer, forms[id(stored)])
        else:
            model.set_submodule(path, HeldLinear.holding(layer, forms[id(stored)], codes_on))


def can_hold_codes(path: str, layer: nn.Module) -> bool:
    """Whether a layer can hold its weight in codes; others need numbers."""
    return isinstance(layer, nn.Embedding) or (sizes_of(layer) is not None and not is_router(path))


def _hold_embedding(layer: Any, held: GroupedForm | JoinedForm) -> None:
    """In place, as some families' embeddings do more: they scale what they give."""
    stored = layer.weight.detach()
    del layer.weight
    own = type(layer)
    layer.__class__ = HeldEmbedding if own is nn.Embedding else type(own.__name__, (own, HeldEmbedding), {})
    layer.held = held
    layer.parameter_like = nn.Parameter(torch.empty(0, dtype=stored.dtype), requires_grad=False)
    layer.__dict__["weight"] = stored
