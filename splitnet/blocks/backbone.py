"""Loads parts of a transformers model: some of its blocks alone, all but its blocks, or the whole model.

The whole model is built on the meta device, which takes no memory, and cut before any weight is read. So everything
that a family derives from the number of a block (experts in some blocks only, blocks without rotary embedding, scales)
is as in the whole model.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from splitnet.checkpoint.checkpoint import Checkpoint, check_no_unexpected, ignored
from splitnet.checkpoint.families import ADDED_POSITIONS, NEUTRAL_ATTRIBUTES, causal_class
from splitnet.checkpoint.store import LazyTensor
from splitnet.errors import UnsupportedModel, WeightsError
from splitnet.quant.choose import INTEGERS, WeightChoice
from splitnet.quant.experts import can_hold_experts, hold_weight_of_experts, weights_of_experts
from splitnet.quant.forms import integer_codes
from splitnet.quant.grouped import BlockQuantWeight, JoinedWeight, hold_stored
from splitnet.quant.linear import QuantizedLinear, is_router, matrices_of, sizes_of
from splitnet.quant.packed_tensor import CodeLayout, Codes, PackedTensor, StoredMatrix


class QuantizedEmbedding(nn.Embedding):
    """A frozen embedding that holds its weight in the codes of the checkpoint. `weight` serves code that inspects the
    weight or needs all of its numbers; the numbers are read from the files on use."""

    held: BlockQuantWeight | JoinedWeight
    parameter_like: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """`[...]` -> `[..., hidden]`."""
        rows = self.held.rows(input.reshape(-1), self.parameter_like.dtype)
        return rows.view(*input.shape, self.embedding_dim)


def hold_codes(model: nn.Module, codes_on: torch.device | None) -> None:
    """Leaves no parameter of a model in the codes of a checkpoint: either its layer holds the codes, or it becomes
    numbers.

    Layers that share a weight share the object that holds it. `codes_on`: the device of the model; None: all parameters
    become numbers.
    """
    forms: dict[int, BlockQuantWeight | JoinedWeight] = {}
    numbers: dict[int, nn.Parameter] = {}
    found = [
        (path, layer, name, parameter)
        for path, layer in model.named_modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if isinstance(parameter, PackedTensor)
    ]
    for path, layer, name, parameter in found:
        stored: Any = parameter
        if codes_on is not None and can_hold_experts(layer, name, stored):
            hold_weight_of_experts(layer, name, codes_on)
            continue
        holds = codes_on is not None and name == "weight" and can_hold_codes(path, layer)
        matrices = matrices_of(stored, transposed=isinstance(layer, Conv1D)) if holds else None
        if codes_on is None or matrices is None:
            if id(stored) not in numbers:
                numbers[id(stored)] = nn.Parameter(stored.to_floats(), requires_grad=stored.requires_grad)
            layer.register_parameter(name, numbers[id(stored)])
            continue
        if id(stored) not in forms:
            forms[id(stored)] = hold_stored(matrices, codes_on)
        if isinstance(layer, nn.Embedding):
            _hold_embedding(layer, forms[id(stored)])
        else:
            model.set_submodule(path, QuantizedLinear.holding(layer, forms[id(stored)], codes_on))


def can_hold_codes(path: str, layer: nn.Module) -> bool:
    """Whether a layer can hold its weight in codes; other layers need numbers."""
    return isinstance(layer, nn.Embedding) or (sizes_of(layer) is not None and not is_router(path))


def _hold_embedding(layer: Any, held: BlockQuantWeight | JoinedWeight) -> None:
    """Changes the layer in place, because the embeddings of some families do more, such as scaling their output."""
    stored = layer.weight.detach()
    del layer.weight
    own = type(layer)
    layer.__class__ = QuantizedEmbedding if own is nn.Embedding else type(own.__name__, (own, QuantizedEmbedding), {})
    layer.held = held
    layer.parameter_like = nn.Parameter(torch.empty(0, dtype=stored.dtype), requires_grad=False)
    layer.__dict__["weight"] = stored


class Zero(nn.Module):
    """Replaces learned position embeddings in a span, because the client has already added them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        # Not a buffer, because loading would leave a buffer uninitialised. A scalar on the CPU adds to tensors on any
        # device.
        self._zero = torch.zeros((), dtype=dtype, device="cpu")

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self._zero


# Maximum numbers, in all tensors together, that a family may compute while its model is built, such as tables.
_MOST_COMPUTED = 1 << 26
_MOST_MISSING = 2  # times as many numbers as tensors have: tied weights are stored once, and new heads not at all
_LONGEST_RANGE = 1 << 20  # maximum entries of one `torch.arange` at that time; only an absurd config needs more


class _LightMeta(TorchFunctionMode):
    """Builds a model on the meta device without torch's compiler, which takes 1 s to import. torch would import it for
    initialisation and ranges.

    Raises UnsupportedModel if the numbers of the config make the family compute more than `_MOST_COMPUTED` numbers, or
    a range of more than `_LONGEST_RANGE`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left = _MOST_COMPUTED

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.arange and str(options.get("device")) == "meta":
            # Rotary embeddings are computed from ranges, and again after the weights are loaded.
            start, end, step = (*((0,) if len(args) == 1 else ()), *args, 1)[:3] if args else (0, 0, 1)
            count = (options.get("end", end) - options.get("start", start)) / options.get("step", step)
            self._check_numbers(count if count <= _LONGEST_RANGE else math.inf)
            options = {**options, "device": "cpu"}
        elif func is Tensor.normal_ or getattr(func, "__module__", None) == nn.init.__name__:
            tensor = args[0] if args else options["tensor"]
            if tensor.is_meta:
                return tensor
        given = [one for one in args if isinstance(one, Tensor) and not one.is_meta]
        if math.prod(one.numel() for one in given) > _MOST_COMPUTED:  # the result may have as many numbers
            made = func(*(one.to("meta") if isinstance(one, Tensor) else one for one in args), **options)
            self._check_numbers(made.numel() if isinstance(made, Tensor) else 0)
        made = func(*args, **options)
        if isinstance(made, Tensor) and not made.is_meta:
            views = made.untyped_storage().data_ptr() in [one.untyped_storage().data_ptr() for one in given]
            self._left -= 0 if views else made.numel()
            self._check_numbers(0)
        return made

    def _check_numbers(self, count: float) -> None:
        if not count <= self._left:
            raise UnsupportedModel(
                "the numbers of the config make its family compute tables that are too large: download the config "
                "again, or correct it"
            )


def _made_on_meta(make: Callable[[], Any]) -> Any:
    """Builds an object with the meta device as torch's default. Tensors computed from ranges may be on the CPU."""
    try:
        with _LightMeta(), torch.device("meta"):  # in this order, so that the device is among the arguments
            return make()
    except RuntimeError:  # for example, a CPU tensor met a meta tensor
        with torch.device("meta"):
            return make()


def on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a model without weights. Raises UnsupportedModel if transformers cannot build it from this config."""
    try:
        model = _made_on_meta(lambda: model_class(copy.deepcopy(config)))
        nn.Module.to(model, "meta")
        return model
    except UnsupportedModel:
        raise
    except Exception as error:  # transformers raises exceptions of many types for bad configs
        where = config.name_or_path or f"a model of the family {config.model_type!r}"
        raise UnsupportedModel(
            f"transformers cannot build a model of the config of {where}: download it again, or correct it "
            f"({type(error).__name__}: {error})"
        ) from error


def find_container(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The name of the list of blocks within a model, such as `layers` or `model.decoder.layers`.

    Raises UnsupportedModel if the model has no such list, or cannot be built.
    """
    return list_of_blocks(on_meta(model_class, config), config.num_hidden_layers, config.model_type)


def list_of_blocks(model: nn.Module, count: int, family: str) -> str:
    """The name of the first list of `count` modules within a model. Raises UnsupportedModel: there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name
    raise UnsupportedModel(
        f"models of the family {family!r} cannot be cut into spans: they have no list of {count} blocks"
    )


def load_cut(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    cut: Callable[[PreTrainedModel], None],
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    attention: str | None,
    *,
    names: Mapping[str, str],
    new_head: bool = False,
    one_by_one: bool = False,
    codes_on: torch.device | None = None,
) -> PreTrainedModel:
    """Builds a model on the meta device, cuts it, and loads the weights of the rest.

    Loading itself (conversion of names and layouts, merging of experts, types, buffers) is transformers' own.

    Args:
        cut: removes parts of the model in place.
        tensors: the state dict, with the names of the cut model in the checkpoint. Its values may be read lazily.
        attention: name of the attention function; None: the family's default.
        names: name in `tensors` -> name in the checkpoint, for errors.
        new_head: transformers initialises head tensors that the checkpoint lacks with torch's random numbers.
        one_by_one: each tensor is placed, and made smaller by its layer where layers do so, before the next one is
            read.
        codes_on: the device on which layers hold the weights that `tensors` has in codes; None: these become numbers.

    Raises:
        UnsupportedModel: the cut model cannot be built, the checkpoint lacks tensors of it, or has tensors that it does
            not take.
    """

    def build(model: PreTrainedModel, config: PreTrainedConfig) -> None:
        _made_on_meta(lambda: model_class.__init__(model, config))
        cut(model)
        _check_sizes(model, tensors)

    members = {"__init__": build, "__module__": model_class.__module__}
    cut_class: type[PreTrainedModel] = type(model_class.__name__, (model_class,), members)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with _loading(one_by_one):
            loaded: Any = cut_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # mismatches are reported below
                **options,
            )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        family = config.model_type
        raise UnsupportedModel(f"models of the family {family!r} cannot be cut into spans: {error}") from error
    model, report = loaded
    missing, mismatched = set(report["missing_keys"]), {name for name, *_ in report["mismatched_keys"]}
    if new_head:
        head = {name for name in missing | mismatched if not name.startswith(f"{model.base_model_prefix}.")}
        if head & mismatched:
            raise UnsupportedModel(
                f"the checkpoint has a head for another number of labels ({min(head & mismatched)}): give the number "
                "of labels that the head was trained with, or a checkpoint without a head"
            )
        missing -= head
    if missing := missing | mismatched:
        raise UnsupportedModel(
            f"the checkpoint does not fit the family {config.model_type!r}: {min(missing)} is missing or has another "
            "shape; take a checkpoint in transformers' format"
        )
    unexpected = set(report["unexpected_keys"])
    if new_head:  # the head of the checkpoint may be for another task
        unexpected = {name for name in unexpected if name.startswith(f"{model.base_model_prefix}.")}
    unexpected -= ignored(unexpected, model)
    # AutoGPTQ stores a bias of zeros with every layer.
    biases = {name for name in unexpected & tensors.keys() if name.endswith(".bias")}
    unexpected -= {name for name in biases if not tensors[name][...].any()}
    check_no_unexpected((names.get(name, name) for name in unexpected), config.model_type)
    model.__class__ = model_class
    hold_codes(model, codes_on)
    return model


def _check_sizes(model: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel: by its config, a model has many more numbers than the tensors of the checkpoint.
    transformers would allocate them, to report later that they are missing or have another shape."""
    given = sum(math.prod(tensor.shape) for tensor in tensors.values())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if sum(sizes.values()) > _MOST_MISSING * given + _MOST_COMPUTED:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UnsupportedModel(
            f"the config says that {largest} and others have {sum(sizes.values()):,} numbers, and the checkpoint holds "
            f"{given:,}: download it again, or correct its config"
        )


def loaded_as(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint -> name of the model's parameter that transformers loads the tensor into, wholly or as a
    part."""
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    known = renamings, converters, model.base_model_prefix, model.state_dict()
    return {name: rename_source_key(name, *known)[0] for name in names}


def cut_to_blocks(backbone: PreTrainedModel, container: str, start: int, end: int) -> None:
    """Keeps blocks `[start, end)` of a backbone and replaces the modules before and after these blocks with neutral
    modules."""
    parent, list_name = parent_of(backbone, container)
    kept = getattr(parent, list_name)[start:end]
    for module in kept.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = module.layer_idx - start
    for owner in {id(module): module for module in (backbone, parent)}.values():
        for name, child in list(owner.named_children()):
            if name in ADDED_POSITIONS:
                setattr(owner, name, Zero(backbone.dtype))
            elif child is not parent and (
                next(child.parameters(), None) is not None or "norm" in type(child).__name__.lower()
            ):
                setattr(owner, name, nn.Identity())  # some norms have no parameters
        for name in NEUTRAL_ATTRIBUTES.keys() & vars(owner).keys():
            setattr(owner, name, NEUTRAL_ATTRIBUTES[name])
    setattr(parent, list_name, kept)
    left_out: Iterable[str] = backbone._keys_to_ignore_on_load_unexpected or ()  # some families name numbers of blocks
    backbone._keys_to_ignore_on_load_unexpected = {
        re.sub(r"(?<=layers\.)\d+", lambda number: str(int(number[0]) - start), pattern) for pattern in left_out
    }
    keep_configs(parent)
    slice_config(backbone.config, start, end)


def keep_configs(parent: nn.Module) -> None:
    """Call before the config is sliced: modules beside the blocks, such as rotary embeddings, keep the whole model's
    config."""
    children: list[Any] = list(parent.children())
    for child in children:
        config = getattr(child, "config", None)
        if isinstance(config, PreTrainedConfig) and not isinstance(child, PreTrainedModel):
            child.config = copy.deepcopy(config)


def share_blocks(backbone: PreTrainedModel, container: str, start: int, end: int) -> PreTrainedModel:
    """A backbone with blocks `[start, end)` of `backbone`, which has `config.num_hidden_layers` blocks."""
    shared = _shallow(backbone)
    shared.config = copy.deepcopy(backbone.config)
    slice_config(shared.config, start, end)
    owner: nn.Module = shared
    *path, list_name = container.split(".")
    for name in path:
        setattr(owner, name, _shallow(getattr(owner, name)))
        owner = getattr(owner, name)
        if isinstance(owner, PreTrainedModel):
            owner.config = shared.config
    setattr(owner, list_name, getattr(owner, list_name)[start:end])
    return shared


def parent_of(model: nn.Module, container: str) -> tuple[nn.Module, str]:
    """The module that holds the list of blocks, and the list's name in it."""
    path, _, name = container.rpartition(".")
    return model.get_submodule(path), name


def _shallow(module: Any) -> Any:
    """A copy of a module with the same children. Replacing a child of the copy does not change the original module."""
    shallow = copy.copy(module)
    shallow.__dict__["_modules"] = dict(module._modules)
    return shallow


def slice_config(config: PreTrainedConfig, start: int, end: int) -> None:
    """Keeps the entries of the blocks `[start, end)` in every list of the config that has one entry per block."""
    count = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count and key in _PER_BLOCK:
            setattr(config, key, value[start:end])
    if getattr(config, "attn_layer_indices", None):
        config.attn_layer_indices = [index - start for index in config.attn_layer_indices if start <= index < end]
    if hasattr(config, "attn_layer_offset") and hasattr(config, "attn_layer_period"):
        config.attn_layer_offset = (config.attn_layer_offset - start) % config.attn_layer_period
    config.num_hidden_layers = end - start
    spec = getattr(config, "_heterogeneity_spec", None)
    if spec is not None:
        overrides = {index - start: own for index, own in spec.per_layer_overrides.items() if start <= index < end}
        config._heterogeneity_spec = dataclasses.replace(spec, per_layer_overrides=overrides)


# Config lists with one entry per block. Other lists of that length, such as `eos_token_id`, mean something else.
_PER_BLOCK = (
    *("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type", "attention_layers", "indexer_types"),
)
# While it builds a model, transformers changes settings of the whole process, such as torch's default dtype.
_one_at_a_time = threading.Lock()
_READ_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def _loading(one_by_one: bool) -> Iterator[None]:
    """Disables transformers' progress bar, as the caller reports progress, and lets one thread load at a time.

    With `one_by_one`, an environment variable stops transformers from reading tensors ahead in other threads.
    """
    with _one_at_a_time:
        shows, before = transformers_logging.is_progress_bar_enabled(), os.environ.get(_READ_AHEAD)
        transformers_logging.disable_progress_bar()
        if one_by_one:
            os.environ[_READ_AHEAD] = "1"
        try:
            yield
        finally:
            if before is not None:
                os.environ[_READ_AHEAD] = before
            elif one_by_one:
                del os.environ[_READ_AHEAD]
            if shows:
                transformers_logging.enable_progress_bar()


@torch.inference_mode(False)  # the model is also used outside inference mode
def load_whole(checkpoint: Checkpoint, dtype: torch.dtype | str) -> Any:
    """Loads all of a checkpoint into this process, in plain transformers; `dtype`: "auto": as the weights are stored.

    Weights in codes become numbers, without the packages that transformers needs for them. Raises OSError or ValueError
    if transformers cannot load the checkpoint, or UnsupportedModel, the last for GGUF files or quantized weights.
    """
    if not checkpoint.source.endswith(".gguf") and (checkpoint.multimodal or not checkpoint.store.quantized):
        try:
            return AutoModelForCausalLM.from_pretrained(checkpoint.source, dtype=dtype, trust_remote_code=False).eval()
        except ImportError as error:
            raise UnsupportedModel(f"{checkpoint.name} cannot be loaded by transformers alone: {error}") from error
    wanted = dtype if isinstance(dtype, torch.dtype) else checkpoint.dtype
    config = copy.deepcopy(checkpoint.config)
    names = {name: name for name in checkpoint.store.tensor_names if name not in checkpoint.next_token_names}
    with checkpoint.store.load_tensors(names, wanted) as tensors:
        model = load_cut(causal_class(config), config, lambda model: None, tensors, wanted, None, names=names)
    model.generation_config = checkpoint.generation_config()
    return model.eval()


def with_coded_experts(
    tensors: Mapping[str, Any],
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    container: str,
    blocks: range,
    weights: WeightChoice,
) -> dict[str, Any]:
    """Replaces the experts' tensors by lazy codes in the layout that `weights` holds experts in. Unchanged if `weights`
    holds no integers. Names are as in a model of these blocks alone."""
    if weights.kind not in INTEGERS:
        return dict(tensors)
    whole = on_meta(model_class, checkpoint.config)
    experts = {path: transposed for path, _, transposed in weights_of_experts(whole)}
    given = {
        f"{container}.{index}.{tensor.rest}": f"{container}.{index - blocks.start}.{tensor.rest}"
        for index in blocks
        for tensor in checkpoint.block_tensors[index]
    }
    loaded = loaded_as(whole, given) if experts else {}
    coded = {given[name]: experts[path] for name, path in loaded.items() if path in experts}
    found = dict(tensors)
    for name, transposed in coded.items():
        inputs = found[name].shape[-2 if transposed else -1]
        layout = weights.layout_of_experts(inputs)
        if layout is not None:
            found[name] = _coded(name, found[name], transposed, layout)
    return found


def _coded(name: str, lazy: LazyTensor, transposed: bool, layout: CodeLayout) -> LazyTensor:
    """The weight of one expert, or of all. `[...]` reads nothing before the codes are requested.

    `transposed`: the weight is `[..., inputs, outputs]`.
    """

    def read(expert: Any) -> Codes:
        weight = lazy[expert]
        numbers = weight.to_floats() if isinstance(weight, PackedTensor) else weight
        lies = (numbers.T if transposed else numbers).float().contiguous()
        codes = integer_codes(lies, layout)
        if codes is None:
            raise WeightsError(
                f"{name} has infinite or NaN values, which integers cannot hold: use --weights with a float type"
            )
        return codes

    def of(index: Any) -> Tensor:
        if index is not ...:
            return lazy[index]
        stacked = len(lazy.shape) == 3
        shape = (lazy.shape[-1], lazy.shape[-2]) if transposed else (lazy.shape[-2], lazy.shape[-1])
        experts = range(lazy.shape[0]) if stacked else [...]
        matrices = [[StoredMatrix(layout, shape, partial(read, expert))] for expert in experts]
        return PackedTensor.__new__(PackedTensor, matrices, stacked=stacked, transposed=transposed, dtype=torch.float32)

    return LazyTensor(lazy.shape, lazy.dtype, of)
