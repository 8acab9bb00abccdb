"""What PEFT has put on a model: the adapter that the peers are to run its blocks with, and prompts that were trained.

A prompt is embeddings before the input, or keys and values before the first position. PEFT hands the latter to a model
as a cache that holds something already. Here keys and values live on the peers, so they are taken out of the call and
given to them as an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Final

import torch
from torch import nn
from transformers import DynamicCache

from splitnet.client.parameters import refuse
from splitnet.errors import AdapterError
from splitnet.model.adapters import LORA_A, LORA_B, PREFIX_KEYS, PREFIX_VALUES, Adapter
from splitnet.model.outline import RemoteConv1D, RemoteLinear, RemotePart

Prefixes = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each block, `[kv heads, positions, head size]`."""


HARMLESS: Final = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "trainable_token_indices", "ensure_weight_tying", "modules_to_save"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
        *("init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"),
    }
)
"""Fields of a `LoraConfig` that say nothing of blocks by themselves, or nothing that their layers do not show."""


PROMPTS: Final = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE"}
)
"""PEFT's methods that train embeddings before a text, or keys and values."""


class LocalAdapters:
    """Collects the parameters of adapters.

    Attributes:
        outline: the blocks, which LoRA is put on; None: there are none.
        configs: of what PEFT has put on layers, by the names of the adapters; None: nothing.
    """

    def __init__(self) -> None:
        self.outline: nn.Module | None = None
        self.configs: Mapping[str, Any] | None = None
        self._latest: dict[tuple[str, ...], Adapter] = {}
        self._seen: tuple[list[Any], list[torch.Tensor], Adapter | None, Adapter | None] = ([], [], None, None)
        """What `recent` has returned last, for what, and by what to tell that it still holds."""

    def parameters_for(self, prefix: Prefixes) -> dict[str, torch.Tensor]:
        """The tensors of the active adapter as `splitnet.model.adapters` names them, connected to what is trained.

        Args:
            prefix: that of the running call; empty: none.

        Raises:
            AdapterError: see `check`.
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
        """As `current`, quickly, for every token: what torch does not count, by way of `.data`, is not seen.

        Of tensors that were made in `torch.inference_mode()` it counts nothing, so their values are compared.
        """
        layers = [(layer, name) for _, layer, names in self._active() for name in names]
        tensors = [tensor for pair in prefix for tensor in pair]
        tensors += [module[name].weight for layer, name in layers for module in (layer.lora_A, layer.lora_B)]
        if any(one.is_inference() for one in tensors):
            return self.current(held, prefix)
        marks = [*(float(layer.scaling[name]) for layer, name in layers), *((id(one), one._version) for one in tensors)]
        seen, _, before, adapter = self._seen
        if marks != seen or held is not before:
            adapter = self.current(held, prefix)
            self._seen = marks, tensors, held, adapter
        return adapter

    def check(self) -> None:
        """Raises AdapterError if there is something on the blocks that peers do not do."""
        for path, layer, names in self._active():
            for name in names:
                _check_matrices(path, layer, name)

    def _active(self) -> Iterator[tuple[str, Any, list[str]]]:
        """The layers that have LoRA which is switched on, and the names of it."""
        if self.outline is None or "peft" not in sys.modules:
            return
        for name, config in (self.configs or {}).items():
            check_config(name, config)
        for path, layer in _lora_layers(self.outline, ""):
            if not layer.disable_adapters:
                yield path, layer, [name for name in layer.active_adapters if name in layer.lora_A]

    def _low_rank_pairs(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for path, layer, names in self._active():
            pairs = [self._pair(path, layer, name) for name in names]
            if pairs:
                # Several adapters add up: so does one with all their ranks.
                yield path, torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)

    @staticmethod
    def _pair(path: str, layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        _check_matrices(path, layer, name)
        if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0:
            raise AdapterError("peers know no dropout in LoRA: use lora_dropout=0.0")
        return layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]


_INSTEAD: Final = "use plain LoRA on linear layers, a prompt or a prefix, and load the model again"


def check_config(name: str, config: Any) -> None:
    """Raises AdapterError if layers do not show all that an adapter is to do to blocks."""
    from peft import LoraConfig, TrainableTokensConfig

    if type(config) is TrainableTokensConfig:  # of embeddings, which are here
        return
    if type(config) is not LoraConfig:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise AdapterError(f"the adapter {name!r} is {kind}, which peers do not run: {_INSTEAD}")
    for field in fields(config):
        value, usual = getattr(config, field.name), _default(field)
        # What is empty is switched off to PEFT, whichever way it is so.
        if field.name not in HARMLESS and value != usual and (value or usual):
            raise AdapterError(
                f"the adapter {name!r} has {field.name}={value!r}, which peers do not apply: leave it out of its "
                "LoraConfig, and load the model again"
            )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _lora_layers(part: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """The layers with LoRA in a part of the outline, by their paths.

    Raises:
        AdapterError: there is something else.
    """
    from peft.tuners.lora import Linear

    for name, module in part.named_children():
        kind, where = type(module), f"{path}{name}"
        base: Any = module.base_layer if kind is Linear else module
        if type(base) not in (RemotePart, RemoteLinear, RemoteConv1D):
            raise AdapterError(
                f"{where} is a {type(base).__name__} now, and peers only add LoRA to linear layers: leave it out of "
                "target_modules and modules_to_save, and load the model again"
            )
        if _is_watched(module) or _is_watched(base):
            raise AdapterError(
                f"{where} has a hook, and peers run the blocks without it: leave out what puts it there, such as "
                "adapter_names, and load the model again"
            )
        if kind is Linear:
            yield where, module
        elif kind is RemotePart:
            yield from _lora_layers(module, f"{where}.")


def _check_matrices(path: str, layer: Any, name: str) -> None:
    """Raises AdapterError if an adapter does more in a layer than to add the product of its two matrices."""
    for part in (layer.lora_A[name], layer.lora_B[name]):
        if type(part) is not nn.Linear or part.bias is not None or _is_watched(part) or name in layer.lora_variant:
            raise AdapterError(f"{path} has more than LoRA's two matrices, which peers do not run: {_INSTEAD}")


def _is_watched(module: nn.Module) -> bool:
    """Whether something is done when a module is called, besides what its class does."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def take_prefix(given: dict[str, Any], model: Any) -> Prefixes:
    """Takes the prefix that PEFT has handed over out of what `model` is called with; empty if there is none.

    Raises:
        UnsupportedParameter: it is no prefix, but a cache of somebody else's.
        AdapterError: it is of a method that is not known here.
    """
    name = next((name for name in ("cache", "past_key_values") if isinstance(given.get(name), DynamicCache)), None)
    if name is None or not given[name].get_seq_length():
        return ()
    wrapper = _calling_wrapper(model)
    if wrapper is None:
        raise refuse(
            name,
            "is a DynamicCache, and the blocks are remote: leave it out, or use model.new_cache()",
        )
    _check_prompt(wrapper)
    prefix = prefix_in(given.pop(name))
    given["use_cache"] = False
    length = prefix[0][0].shape[1]
    mask = given.get("attention_mask")
    if mask is not None:
        given["attention_mask"] = mask[:, length:]
    if given.get("position_ids") is None:
        inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        given["position_ids"] = torch.arange(length, length + inputs.shape[1], device=inputs.device)[None]
    return prefix


def _calling_wrapper(model: Any) -> Any:
    """The PEFT model around `model` that calls it, as what it hands over does not tell; None: there is none."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, PeftModel) and caller.get_base_model() is model:
            return caller
        frame = frame.f_back
    return None


def _check_prompt(wrapper: Any) -> None:
    """Raises AdapterError if what a trained prompt does is not known here."""
    kind = wrapper.active_peft_config.peft_type
    kind = getattr(kind, "value", kind)
    if kind not in PROMPTS:
        raise AdapterError(f"the adapter {wrapper.active_adapter!r} is {kind}, which is not known here: {_INSTEAD}")


def prefix_in(cache: DynamicCache) -> Prefixes:
    """Keys and values in a cache, block by block; PEFT has the same ones for all rows, so those of the first."""
    layers: list[Any] = list(cache.layers)
    return tuple((layer.keys[0], layer.values[0]) for layer in layers)


def prompt_wrapper(model: Any) -> Any:
    """The PEFT model that generates with `model` and a prompt that was trained; None if there is none."""
    replaced = model.__dict__.get("prepare_inputs_for_generation")
    wrapper = getattr(replaced, "__self__", None)
    if wrapper is None or wrapper is model or not wrapper.active_peft_config.is_prompt_learning:
        return None
    _check_prompt(wrapper)
    return wrapper


def with_trained_prompt(wrapper: Any, given: dict[str, Any]) -> tuple[dict[str, Any], Prefixes]:
    """What `generate()` is to be called with: the trained prompt is put before the user's, or returned as a prefix.

    PEFT's own way to do so changes the inputs of every step, by names of arguments that transformers has given up.
    """
    model = wrapper.base_model
    model.__dict__.pop("prepare_inputs_for_generation", None)
    given = dict(given)
    task_ids = given.pop("task_ids", None)
    input_ids = given.pop("input_ids", None)
    if given.get("inputs") is not None:
        input_ids = given.pop("inputs")
    if input_ids is None or given.get("inputs_embeds") is not None:
        raise refuse("inputs_embeds", "do not go together with a trained prompt: give input_ids")
    given["input_ids"] = input_ids
    with torch.no_grad():
        prompt = wrapper.get_prompt(batch_size=input_ids.shape[0], task_ids=task_ids)
        if isinstance(prompt, DynamicCache):
            return given, prefix_in(prompt)
        embeddings = model.get_input_embeddings()(input_ids)
    mask = given.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(torch.long)
    # The trained prompt comes first in the text, so behind the padding on the left.
    padding = [int(pad) for pad in (mask.cumsum(1) == 0).sum(1).tolist()]
    given["inputs_embeds"] = _inserted(embeddings, prompt.to(embeddings.dtype), padding)
    given["attention_mask"] = _inserted(mask, mask.new_ones(prompt.shape[:2]), padding)
    return given, ()


def _inserted(rows: torch.Tensor, inserted: torch.Tensor, places: list[int]) -> torch.Tensor:
    """`[batch, seq, ...]`: each row with another inserted at its place."""
    pairs = zip(rows, inserted, places, strict=True)
    return torch.stack([torch.cat((row[:place], more, row[place:])) for row, more, place in pairs])
