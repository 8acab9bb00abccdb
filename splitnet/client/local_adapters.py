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
        self._seen: tuple[list[Any], list[torch.Tensor], Adapter | None, Adapter | None] = ([], [], None, None)
        """What `recent` has returned last, for what, and by what to tell that it still holds."""

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

    def current(self, held: Adapter | None, prefix: Prefixes = ()) -> Adapter | None:
        """The adapter that is active now: `held` itself if that has the same values."""
        adapter = self.adapter_of(self.parameters_for(prefix))
        if adapter is None or held is None or adapter.tensors.keys() != held.tensors.keys():
            return adapter
        same = all(torch.equal(tensor, held.tensors[name]) for name, tensor in adapter.tensors.items())
        return held if same else adapter

    def recent(self, held: Adapter | None, prefix: Prefixes) -> Adapter | None:
        """As `current`, quickly, for every token: what torch does not count, by way of `.data`, is not seen."""
        layers = [(layer, name) for _, layer, names in self._active() for name in names]
        tensors = [tensor for pair in prefix for tensor in pair]
        tensors += [module[name].weight for layer, name in layers for module in (layer.lora_A, layer.lora_B)]
        marks = [*(layer.scaling[name] for layer, name in layers), *((id(one), one._version) for one in tensors)]
        seen, _, before, adapter = self._seen
        if marks != seen or held is not before:
            adapter = self.current(held, prefix)
            self._seen = marks, tensors, held, adapter
        return adapter

    def _active(self) -> Iterator[tuple[str, Any, list[str]]]:
        """The layers that have LoRA which is switched on, and the names of it."""
        if self.outline is None or "peft" not in sys.modules:
            return
        from peft.tuners.lora import LoraLayer

        for path, layer in self.outline.named_modules():
            if isinstance(layer, LoraLayer) and not layer.disable_adapters:
                yield path, layer, [name for name in layer.active_adapters if name in layer.lora_A]

    def _low_rank_pairs(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for path, layer, names in self._active():
            pairs = [self._pair(path, layer, name) for name in names]
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
