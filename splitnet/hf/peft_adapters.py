"""Reads PEFT's adapters and trained prompts from a model, for the peers.

A trained prompt is embeddings before the input, or keys and values before the first position. PEFT passes keys and
values to a model as a filled cache. This module takes them out of the call; peers get them as an adapter, see
`splitnet.blocks.adapters`.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Never, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import DynamicCache

from splitnet.blocks.adapters import (
    LORA_A,
    LORA_B,
    MAX_PREFIX,
    MAX_RANK,
    PREFIX_KEYS,
    PREFIX_VALUES,
    SCALE_IN,
    SCALE_OUT,
    AdapterTensors,
    linear_layers,
)
from splitnet.blocks.client_part import RemoteConv1D, RemoteLinear, RemotePart
from splitnet.errors import AdapterError, SplitnetError
from splitnet.hf.parameters import refuse
from splitnet.hf.side_network import KIND, SideNetwork
from splitnet.limits import Patterns

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
"""Fields of a `LoraConfig` without effect on blocks, or with an effect that the layers show."""

PROMPTS: Final = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT", "PREFIX_TUNING", "CARTRIDGE")
"""PEFT's methods that train embeddings, or keys and values, before a text."""


class LocalAdapters:
    """Collects the parameters of adapters."""

    def __init__(self) -> None:
        self.outline: nn.Module | None = None  # outline of the blocks, to which PEFT adds layers
        self.configs: Mapping[str, Any] | None = None  # PEFT's configs, by the names of the adapters
        self._latest: dict[tuple[str, ...], AdapterTensors] = {}
        # The last call of `recent`: marks of the tensors, the tensors, the held adapter, and the result.
        self._seen: tuple[list[Any], list[torch.Tensor], AdapterTensors | None, AdapterTensors | None] = (
            [],
            [],
            None,
            None,
        )

    def parameters_for(self, prefix: Prefixes) -> dict[str, torch.Tensor]:
        """The tensors of the active adapter by name, with gradients to the trained parameters. Raises as
        `check_blocks`."""
        tensors: dict[str, torch.Tensor] = {}
        for path, layer, names in self._active():
            parts = [part for name in names if (part := _parts(path, layer, name))]
            for end in parts[0] if parts else ():
                each = [part[end] for part in parts]
                # The sum of low-rank adapters is one adapter with all their ranks; scaling factors are multiplied.
                joined = torch.cat(each, dim=int(end == LORA_B)) if end in (LORA_A, LORA_B) else math.prod(each)
                tensors[path + end] = cast("torch.Tensor", joined)
        for block, (keys, values) in enumerate(prefix):
            tensors[f"{block}.{PREFIX_KEYS}"], tensors[f"{block}.{PREFIX_VALUES}"] = keys, values
        return tensors

    def adapter_of(self, parameters: dict[str, torch.Tensor]) -> AdapterTensors | None:
        """The adapter for the peers; the same object as long as the values are equal."""
        if not parameters:
            return None
        names = tuple(parameters)
        latest = self._latest.get(names)
        if latest is not None:
            now = parameters.values()
            if all(torch.equal(was, tensor.cpu()) for was, tensor in zip(latest.tensors.values(), now, strict=True)):
                return latest
        copied = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in parameters.items()}
        self._latest[names] = AdapterTensors(copied)
        return self._latest[names]

    def current(self, held: AdapterTensors | None, prefix: Prefixes = ()) -> AdapterTensors | None:
        """The active adapter; `held` if its values are equal."""
        adapter = self.adapter_of(self.parameters_for(prefix))
        if adapter is None or held is None or adapter.tensors.keys() != held.tensors.keys():
            return adapter
        same = all(torch.equal(tensor, held.tensors[name]) for name, tensor in adapter.tensors.items())
        return held if same else adapter

    def recent(self, held: AdapterTensors | None, prefix: Prefixes) -> AdapterTensors | None:
        """As `current`, but fast enough for every token: compares torch's version counters, which `.data` bypasses.

        Tensors of `torch.inference_mode()` have no counters, so their values are compared.
        """
        layers = [(layer, name) for _, layer, names in self._active() for name in names]
        tensors = [tensor for pair in prefix for tensor in pair]
        tensors += [tensor for layer, name in layers for tensor in _kinds()[type(layer)].made_of(layer, name)]
        if any(one.is_inference() for one in tensors):
            return self.current(held, prefix)
        scalings = (float(getattr(layer, "scaling", {}).get(name, 1.0)) for layer, name in layers)
        marks = [*scalings, *((id(one), one._version) for one in tensors)]
        seen, _, before, adapter = self._seen
        if marks != seen or held is not before:
            adapter = self.current(held, prefix)
            self._seen = marks, tensors, held, adapter
        return adapter

    def check_blocks(self) -> None:
        """Raises AdapterError: peers cannot apply an adapter on the blocks."""
        for path, layer, names in self._active():
            for name in names:
                _made(path, layer, name)

    def _active(self) -> Iterator[tuple[str, Any, list[str]]]:
        """The layers with active adapters, and the names of these adapters."""
        if self.outline is None or "peft" not in sys.modules:
            return
        for name, config in (self.configs or {}).items():
            check_config(name, config)
        for path, layer in _adapted_layers(self.outline, ""):
            if not layer.disable_adapters:
                made_of = _kinds()[type(layer)].made_of
                yield path, layer, [name for name in layer.active_adapters if any(True for _ in made_of(layer, name))]


class _AdapterKind(NamedTuple):
    """The message form of a PEFT layer. holders: attributes of the layer that are dictionaries by adapter name. parts:
    makes tensors, by the end of their names, from a layer and an adapter name."""

    holders: tuple[str, ...]
    parts: Callable[[Any, str], dict[str, torch.Tensor]]

    def made_of(self, layer: Any, name: str) -> Iterator[torch.Tensor]:
        """The tensors of an adapter in a layer; empty if the adapter does not change the layer."""
        for held in (getattr(layer, holder) for holder in self.holders):
            if held is not None and name in held:
                yield held[name].weight if isinstance(held[name], nn.Module) else held[name]


@cache
def _kinds() -> dict[type, _AdapterKind]:
    """Message forms by type of layer. All changes that are linear in the input are sent as a low-rank pair."""
    from peft.tuners import adalora, ia3, loha, lokr, lora, vera

    return {
        lora.Linear: _AdapterKind(("lora_A", "lora_B"), _lora_parts),
        adalora.SVDLinear: _AdapterKind(("lora_A", "lora_B", "lora_E", "ranknum"), _adalora_parts),
        ia3.Linear: _AdapterKind(("ia3_l",), _ia3_parts),
        vera.Linear: _AdapterKind(("vera_lambda_d", "vera_lambda_b", "vera_A", "vera_B"), _vera_parts),
        loha.Linear: _AdapterKind(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha_parts),
        lokr.Linear: _AdapterKind(
            tuple(f"lokr_w{part}" for part in ("1", "1_a", "1_b", "2", "2_a", "2_b")), _lokr_parts
        ),
    }


def _made(path: str, layer: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter for a layer; none for rank 0. Raises AdapterError: peers cannot apply the adapter."""
    _check_layer(path, layer, name)
    parts = _kinds()[type(layer)].parts(layer, name)
    if LORA_A not in parts or 0 < len(parts[LORA_A]) <= MAX_RANK:
        return parts
    if not len(parts[LORA_A]):
        return {}
    raise AdapterError(
        f"{path} has the rank {len(parts[LORA_A]):,}, and peers take at most {MAX_RANK:,}: give a lower r"
    )


def _parts(path: str, layer: Any, name: str) -> dict[str, torch.Tensor]:
    """As `_made`; also raises AdapterError: the layer is training with dropout."""
    rates = [getattr(layer, f"{each}_dropout", {}) for each in ("lora", "vera", "rank", "module")]
    dropouts = [each[name] for each in rates if name in each]
    if layer.training and any(getattr(one, "p", one if isinstance(one, float | int) else 0.0) > 0 for one in dropouts):
        raise AdapterError(
            "peers apply no dropout in LoRA and similar methods: set lora_dropout=0.0, or the method's own dropout"
        )
    return _made(path, layer, name)


def _lora_parts(layer: Any, name: str) -> dict[str, torch.Tensor]:
    return {LORA_A: layer.lora_A[name].weight, LORA_B: layer.lora_B[name].weight * layer.scaling[name]}


def _adalora_parts(layer: Any, name: str) -> dict[str, torch.Tensor]:
    """Zhang et al., arXiv:2303.10512, section 3.1, with the scaling of PEFT."""
    scaling = layer.scaling[name] / (layer.ranknum[name] + 1e-5)
    return {LORA_A: layer.lora_A[name] * layer.lora_E[name], LORA_B: layer.lora_B[name] * scaling}


def _ia3_parts(layer: Any, name: str) -> dict[str, torch.Tensor]:
    return {SCALE_IN if layer.is_feedforward else SCALE_OUT: layer.ia3_l[name].flatten()}


def _vera_parts(layer: Any, name: str) -> dict[str, torch.Tensor]:
    """Kopiczko et al., arXiv:2310.11454, section 3.1: shared matrices, whose rows each layer scales."""
    a, b = layer.vera_A[name][:, : layer.in_features], layer.vera_B[name][: layer.out_features]
    return {LORA_A: layer.vera_lambda_d[name][:, None] * a, LORA_B: layer.vera_lambda_b[name][:, None] * b}


def _loha_parts(layer: Any, name: str) -> dict[str, torch.Tensor]:
    """The Hadamard product of two low-rank matrices (Hyeon-Woo et al., arXiv:2108.06098). Its rank is the product of
    the two ranks: it is made of the products of all pairs of columns, and of rows."""
    (b1, a1), (b2, a2) = (
        (getattr(layer, f"hada_w{one}_a")[name], getattr(layer, f"hada_w{one}_b")[name]) for one in (1, 2)
    )
    a = (a1[:, None] * a2[None]).flatten(0, 1)
    return {LORA_A: a, LORA_B: (b1[:, :, None] * b2[:, None]).flatten(1) * layer.scaling[name]}


def _lokr_parts(layer: Any, name: str) -> dict[str, torch.Tensor]:
    """A Kronecker product (LyCORIS, arXiv:2309.14859). With w2 = b a: kron(w1, w2) = kron(w1, b) kron(1, a) =
    kron(1, b) kron(w1, a). The latter has the lower rank if w1 has fewer rows than columns."""

    def of(factor: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in (whole := getattr(layer, factor)):
            return getattr(layer, f"{factor}_a")[name], getattr(layer, f"{factor}_b")[name]
        rows, columns = (torch.eye(size).to(whole[name]) for size in whole[name].shape)
        return (rows, whole[name]) if len(rows) < len(columns) else (whole[name], columns)

    (left, right), (b, a) = of("lokr_w1"), of("lokr_w2")
    w1 = left @ right
    rows, columns = (torch.eye(size).to(w1) for size in w1.shape)
    (first, second) = (rows, w1) if len(rows) < len(columns) else (w1, columns)
    return {
        LORA_A: torch.kron(second, a.contiguous()),
        LORA_B: torch.kron(first, b.contiguous()) * layer.scaling[name],
    }


_INSTEAD: Final = "use LoRA, (IA)3, a prompt or another method of docs/tuning.md, and load the model again"
_MORE_HARMLESS: Final = {
    "AdaLoraConfig": frozenset(
        {*("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")}
    ),
    "IA3Config": frozenset({"feedforward_modules", "init_ia3_weights"}),
    "VeraConfig": frozenset({"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}),
    "LoHaConfig": frozenset({"alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}),
    "LoKrConfig": frozenset(
        {
            *("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"),
            *("decompose_both", "decompose_factor", "rank_dropout_scale"),
        }
    ),
}
"""As `HARMLESS`, for other classes of configs."""


def check_config(name: str, config: Any) -> None:
    """Raises AdapterError: a config has effects on blocks that the layers do not show."""
    import peft

    if type(config) is peft.TrainableTokensConfig:  # trains tokens of the embeddings, which are local
        return
    known = {peft.LoraConfig: HARMLESS}
    known |= {getattr(peft, each): HARMLESS | names for each, names in _MORE_HARMLESS.items()}
    if type(config) not in known:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise AdapterError(f"the adapter {name!r} is {kind}, which peers do not run: {_INSTEAD}")
    for field in fields(config):
        usual = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        # PEFT takes every empty value, such as None or [], as switched off.
        if field.name not in known[type(config)] and value != usual and (value or usual):
            raise AdapterError(
                f"the adapter {name!r} has {field.name}={value!r}, which peers do not apply: leave it out of its "
                f"{type(config).__name__}, and load the model again"
            )


def _adapted_layers(part: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """Layers with adapters in a part of the outline, with their paths. Raises AdapterError: an unsupported layer."""
    for name, module in part.named_children():
        kind, where = type(module), f"{path}{name}"
        base: Any = module.base_layer if kind in _kinds() else module
        if type(base) not in (RemotePart, RemoteLinear, RemoteConv1D):
            raise AdapterError(
                f"{where} is a {type(base).__name__} now, and peers change linear layers only: leave it out of "
                "target_modules and modules_to_save, and load the model again"
            )
        if _is_watched(module) or _is_watched(base):
            raise AdapterError(
                f"{where} has a hook, and peers run the blocks without it: leave out what puts it there, such as "
                "adapter_names, and load the model again"
            )
        if kind in _kinds():
            yield where, module
        elif kind is RemotePart:
            yield from _adapted_layers(module, f"{where}.")


def _check_layer(path: str, layer: Any, name: str) -> None:
    """Raises AdapterError: LoRA does more in a layer than add the product of its two matrices."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return
    for part in (layer.lora_A[name], layer.lora_B[name]):
        if type(part) is not nn.Linear or part.bias is not None or _is_watched(part) or name in layer.lora_variant:
            raise AdapterError(f"{path} has more than LoRA's two matrices, which peers do not run: {_INSTEAD}")


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks or a replaced `forward`."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def take_prefix(given: dict[str, Any], model: Any) -> Prefixes:
    """Takes PEFT's prefix out of the arguments of a call of `model`; empty if there is none.

    Raises UnsupportedParameter: the cache is not of PEFT; AdapterError: the method of PEFT is unknown.
    """
    name = next((name for name in ("cache", "past_key_values") if isinstance(given.get(name), DynamicCache)), None)
    if name is None or not given[name].get_seq_length():
        return ()
    wrapper = _calling_wrapper(model)
    if wrapper is None:
        raise refuse(name, "is a DynamicCache, and the blocks are remote: leave it out, or use model.new_cache()")
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
    """The PEFT model that calls `model`, found on the stack because the arguments do not show it; None: there is
    none."""
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
    """Raises AdapterError: the method of a trained prompt is unknown."""
    kind = wrapper.active_peft_config.peft_type
    kind = getattr(kind, "value", kind)
    if kind not in PROMPTS:
        raise AdapterError(f"the adapter {wrapper.active_adapter!r} is {kind}, which is not known here: {_INSTEAD}")


def prefix_in(cache: DynamicCache) -> Prefixes:
    """Keys and values of a cache, block by block, from its first row: PEFT gives all rows the same keys and
    values."""
    layers: list[Any] = list(cache.layers)
    return tuple((layer.keys[0], layer.values[0]) for layer in layers)


def prompt_wrapper(model: Any) -> Any:
    """The PEFT model that generates with `model` and a trained prompt; None: there is none."""
    replaced = model.__dict__.get("prepare_inputs_for_generation")
    wrapper = getattr(replaced, "__self__", None)
    if wrapper is None or wrapper is model or not wrapper.active_peft_config.is_prompt_learning:
        return None
    _check_prompt(wrapper)
    return wrapper


def with_trained_prompt(wrapper: Any, given: dict[str, Any]) -> tuple[dict[str, Any], Prefixes]:
    """The arguments of `generate()` with a trained prompt before the user's text, or with this prompt as a prefix.

    PEFT itself changes the inputs of every step, by former names of transformers' arguments.
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
    # The trained prompt stands between the padding on the left and the text.
    padding = [int(pad) for pad in (mask.cumsum(1) == 0).sum(1).tolist()]
    given["inputs_embeds"] = _inserted(embeddings, prompt.to(embeddings.dtype), padding)
    given["attention_mask"] = _inserted(mask, mask.new_ones(prompt.shape[:2]), padding)
    return given, ()


def _inserted(rows: torch.Tensor, inserted: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Inserts a row of `inserted` at its place into each row, `[batch, seq, ...]`."""
    pairs = zip(rows, inserted, places, strict=True)
    return torch.stack([torch.cat((row[:place], more, row[place:])) for row, more, place in pairs])


CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_MODEL = "base_model.model."
_PLAIN: Final = re.compile(r"[\w.-]+")
_PAIRS: Final = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
"""Ends of names in the file: the end for the matrix that is applied first -> the end for the second matrix."""

Shapes = Mapping[str, tuple[int, ...]]


def load_adapter(model: Any, folder: Path) -> Any:
    """Loads the adapter of a folder; returns PEFT's model, or with a side network the model itself. Raises
    AdapterError: the adapter does not fit, or peers cannot apply it.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(f"the adapter in {folder} has no {WEIGHTS_FILE}: save it with safe_serialization=True")
    try:
        return _load(model, folder)
    except SplitnetError as error:
        raise AdapterError(f"the adapter in {folder} cannot be used, as {error}") from error
    except Exception as error:  # PEFT and safetensors raise any exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise AdapterError(f"the adapter in {folder} does not fit this model ({reason}): {_OTHER}") from error


def check_served(model: Any, folder: Path) -> None:
    """Raises AdapterError: servers cannot use the adapter of `load_adapter`, which changes prompts."""
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise AdapterError(f"the adapter in {folder} puts vectors before prompts, which servers do not do: use LoRA")


def _load(model: Any, folder: Path) -> Any:
    values = _values(folder / CONFIG_FILE)
    if values.get("peft_type") == KIND:
        ends = model.ends
        model.use_side(SideNetwork.load(values, folder / WEIGHTS_FILE, ends.hidden_size, ends.num_blocks))
        return model
    from peft import PeftModel, get_peft_model_state_dict

    config = _config(values)
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if config.is_prompt_learning:
        _check_saved_prompt(config, shapes)
    else:
        _check_tokens(config, shapes)
        if config.peft_type == "LORA":
            _name_layers(config, shapes, model)
    loaded = PeftModel.from_pretrained(model, str(folder), config=config).eval()
    taken = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
    lacks = sorted(taken - shapes.keys())
    unused = sorted(shapes.keys() - taken - loaded.state_dict().keys())
    if lacks or unused:
        raise AdapterError(f"{lacks[0]} is missing: {_OTHER}" if lacks else f"nothing takes its {unused[0]}: {_OTHER}")
    return loaded


_OTHER: Final = "take an adapter for this model"


def _values(path: Path) -> dict[str, Any]:
    """Reads a config. Raises ValueError or AdapterError: the file is not a config."""
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{path.name} is too long for a config: {_OTHER}")
    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    if not isinstance(values, dict):
        raise AdapterError(f"{path.name} is not a config: {_OTHER}")
    return values


def _config(values: dict[str, Any]) -> Any:
    """PEFT's config of these values. Raises ValueError or AdapterError: PEFT must not load the adapter."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = values.get("peft_type")
    if kind not in {*PROMPTS, "LORA", "TRAINABLE_TOKENS"} or kind == "MULTITASK_PROMPT_TUNING":
        raise AdapterError(
            f"it is {kind!r}, which commands cannot use: train LoRA, a prompt, a prefix or a side network"
        )
    values.pop("runtime_config", None)
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    for name in values.keys() - known:
        if values.pop(name):
            raise AdapterError(f"it has {name}, which this version of PEFT does not know: update PEFT")
    config = PeftConfig.from_peft_type(**values)
    if not config.is_prompt_learning:
        check_config("default", config)
    for name in getattr(config, "modules_to_save", None) or ():
        if not _PLAIN.fullmatch(name):
            raise AdapterError(f"{name!r} in modules_to_save is not a name: {_OTHER}")
    return config


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is not a number")


def _check_saved_prompt(config: Any, shapes: Shapes) -> None:
    """Raises AdapterError: the config does not fit the prompt in the file."""
    rows, width = shapes["prompt_embeddings"]
    tokens = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
    numbers = config.token_dim * (2 * config.num_layers if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE") else 1)
    if (rows, width) != (tokens, numbers) or rows > MAX_PREFIX:
        raise AdapterError(f"its config says {tokens} x {numbers} numbers, but the file has {rows} x {width}: {_OTHER}")


def _check_tokens(config: Any, shapes: Shapes) -> None:
    """Raises AdapterError: the config names more trained tokens than the file has."""
    named = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    told = sum(len(each) for each in named.values()) if isinstance(named, dict) else len(named)
    there = sum(shape[0] for name, shape in shapes.items() if name.endswith("trainable_tokens_delta"))
    if told > there:
        raise AdapterError(f"its config says {told} tokens, but the file has {there}: {_OTHER}")


def _name_layers(config: Any, shapes: Shapes, model: nn.Module) -> None:
    """Replaces patterns in a LoRA config by the names of the layers with tensors, and by their ranks.

    Raises AdapterError: the tensors do not fit the config or the model.
    """
    sizes = linear_layers(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            sizes[path] = module.num_embeddings, module.embedding_dim
    patterns = Patterns("the config", _OTHER)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, (rank, inputs) in {name: shapes[name] for name in shapes if _end_of(name)}.items():
        end = _end_of(name)
        path = name.removeprefix(_MODEL).removesuffix(end)
        outputs, same = shapes[name.removesuffix(end) + _PAIRS[end]]
        if sizes.get(path) != (inputs, outputs) or same != rank:
            raise AdapterError(f"its tensors do not fit {path} of this model: {_OTHER}")
        ranks[path] = _value_for(path, config.rank_pattern, config.r, patterns)
        alphas[path] = _value_for(path, config.alpha_pattern, config.lora_alpha, patterns)
        if ranks[path] != rank or rank > MAX_RANK:
            raise AdapterError(f"its config says rank {ranks[path]} for {path}, but the file has rank {rank}: {_OTHER}")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise AdapterError(
            f"it begins as {config.init_lora_weights!r}, which changes weights: convert it when it is saved "
            "(path_initial_model_for_weight_conversion)"
        )
    config.init_lora_weights = False  # the file has all weights
    config.target_modules, config.exclude_modules = set(ranks), None
    config.layers_to_transform = config.layers_pattern = None
    if not all(_PLAIN.fullmatch(key) for key in (*config.rank_pattern, *config.alpha_pattern)):
        config.rank_pattern = {re.escape(path): rank for path, rank in ranks.items()}
        config.alpha_pattern = {re.escape(path): alpha for path, alpha in alphas.items()}


def _end_of(name: str) -> str:
    return next((end for end in _PAIRS if name.endswith(end)), "")


def _value_for(path: str, by_pattern: Mapping[str, Any], default: Any, patterns: Patterns) -> Any:
    """The value that PEFT chooses: of the first pattern that matches the end of the path."""
    for key, value in by_pattern.items():
        pattern = rf"(.*\.)?({key})$"
        if re.match(pattern, path) if _PLAIN.fullmatch(key) else patterns.match(pattern, path):
            return value
    return default
