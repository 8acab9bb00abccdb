"""The adapter that a model has here, as PEFT has put it: what the peers are to run its blocks with."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from splitnet.errors import AdapterError
from splitnet.model.adapters import LORA_A, LORA_B, PREFIX_KEYS, PREFIX_VALUES, Adapter

Prefixes = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each block, `[kv heads, positions, head size]`."""


class LocalAdapters:
    """Collects the parameters of adapters.

    Attributes:
        outline: the linear layers of the blocks, which LoRA is put on; None: there are none.
    """

    def __init__(self) -> None:
        self.outline: nn.Module | None = None
        self._latest: dict[tuple[str, ...], Adapter] = {}

    def parameters_for(self, prefix: Prefixes) -> dict[str, torch.Tensor]:
        """The tensors of the active adapter as `splitnet.model.adapters` names them, connected to what is trained.

        Args:
            prefix: that of the running call; empty: none.

        Raises:
            AdapterError: an adapter of a kind that peers do not know.
        """
        tensors: dict[str, torch.Tensor] = {}
        for path, a, b in self._low_rank_pairs():
            tensors[path + LORA_A], tensors[path + LORA_B] = a, b
        for block, (keys, values) in enumerate(prefix):
            tensors[f"{block}.{PREFIX_KEYS}"], tensors[f"{block}.{PREFIX_VALUES}"] = keys, values
        return tensors

    def adapter_of(self, parameters: dict[str, torch.Tensor]) -> Adapter | None:
        """What peers are given; the same object as long as the values stay the same."""
        if not parameters:
            return None
        names = tuple(parameters)
        latest = self._latest.get(names)
        if latest is not None:
            now = parameters.values()
            if all(torch.equal(was, tensor.cpu()) for was, tensor in zip(latest.tensors.values(), now, strict=True)):
                return latest
        copied = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in parameters.items()}
        self._latest[names] = Adapter(copied)
        return self._latest[names]

    def _low_rank_pairs(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        if self.outline is None or "peft" not in sys.modules:
            return
        from peft.tuners.lora import LoraLayer

        for path, layer in self.outline.named_modules():
            if not isinstance(layer, LoraLayer) or layer.disable_adapters:
                continue
            active = [name for name in layer.active_adapters if name in layer.lora_A]
            pairs = [self._pair(path, layer, name) for name in active]
            if pairs:
                # Several adapters add up: so does one with all their ranks.
                yield path, torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)

    @staticmethod
    def _pair(path: str, layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if layer.use_dora.get(name) or layer.lora_bias.get(name):
            raise AdapterError(f"{path} has LoRA with DoRA or a bias, which peers do not know: leave these out")
        if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0:
            raise AdapterError("peers know no dropout in LoRA: use lora_dropout=0.0")
        return layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
