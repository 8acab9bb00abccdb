"""Adapters that PEFT has saved, in a folder that may be a stranger's.

PEFT makes tensors as large as the config says, looks for layers with its patterns, and imports a module that it names.
So what the config says is compared with the tensors that are there before PEFT sees it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Never

from safetensors import safe_open
from torch import nn

from splitnet.client.local_adapters import PROMPTS, check_config
from splitnet.errors import AdapterError, SplitnetError
from splitnet.model.adapters import MAX_PREFIX, MAX_RANK, linear_layers
from splitnet.patterns import Patterns

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_MODEL = "base_model.model."
_PLAIN: Final = re.compile(r"[\w.-]+")
_PAIRS: Final = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
"""Ends of names in the file: of the matrix that the input meets first, and of the other."""

Shapes = Mapping[str, tuple[int, ...]]


def load_adapter(model: Any, folder: Path) -> Any:
    """A model with the adapter in a folder, as PEFT returns it.

    Raises:
        AdapterError: it is not for this model, or it does what peers do not.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(f"the adapter in {folder} has no {WEIGHTS_FILE}: save it with safe_serialization=True")
    try:
        return _load(model, folder)
    except SplitnetError as error:
        raise AdapterError(f"the adapter in {folder} cannot be used, as {error}") from error
    except Exception as error:  # PEFT and safetensors raise what they stumble over
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise AdapterError(f"the adapter in {folder} does not fit this model ({reason}): {_OTHER}") from error


def _load(model: Any, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    config = _config(folder / CONFIG_FILE)
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if config.is_prompt_learning:
        _check_prompt(config, shapes)
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


def _config(path: Path) -> Any:
    """Raises ValueError or AdapterError if PEFT is not to see it."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{path.name} is longer than configs are: {_OTHER}")
    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    if not isinstance(values, dict):
        raise AdapterError(f"{path.name} is no config: {_OTHER}")
    kind = values.get("peft_type")
    if kind not in {*PROMPTS, "LORA", "TRAINABLE_TOKENS"} or kind == "MULTITASK_PROMPT_TUNING":
        raise AdapterError(f"it is {kind!r}, which commands cannot use: train LoRA, a prompt or a prefix")
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
            raise AdapterError(f"{name!r} in modules_to_save is no name: {_OTHER}")
    return config


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is no number")


def _check_prompt(config: Any, shapes: Shapes) -> None:
    """Raises AdapterError if the config is not that of the prompt in the file."""
    rows, width = shapes["prompt_embeddings"]
    tokens = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
    numbers = config.token_dim * (2 * config.num_layers if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE") else 1)
    if (rows, width) != (tokens, numbers) or rows > MAX_PREFIX:
        raise AdapterError(
            f"its config tells of {tokens} x {numbers} numbers, and there are {rows} x {width}: {_OTHER}"
        )


def _check_tokens(config: Any, shapes: Shapes) -> None:
    """Raises AdapterError if the config tells of more tokens of its own than there are."""
    named = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    told = sum(len(each) for each in named.values()) if isinstance(named, dict) else len(named)
    there = sum(shape[0] for name, shape in shapes.items() if name.endswith("trainable_tokens_delta"))
    if told > there:
        raise AdapterError(f"its config tells of {told} tokens, and there are {there}: {_OTHER}")


def _name_layers(config: Any, shapes: Shapes, model: nn.Module) -> None:
    """Has a config of LoRA name the layers that have tensors, with their ranks, in the place of patterns.

    Raises:
        AdapterError: they are not as the config says, or not of this model.
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
            raise AdapterError(f"{path} of this model is not as its tensors are: {_OTHER}")
        ranks[path] = _value_for(path, config.rank_pattern, config.r, patterns)
        alphas[path] = _value_for(path, config.alpha_pattern, config.lora_alpha, patterns)
        if ranks[path] != rank or rank > MAX_RANK:
            raise AdapterError(f"its config says rank {ranks[path]} of {path}, and it has {rank}: {_OTHER}")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise AdapterError(
            f"it begins as {config.init_lora_weights!r}, which changes weights: convert it when it is saved "
            "(path_initial_model_for_weight_conversion)"
        )
    config.init_lora_weights = False  # all is in the file
    config.target_modules, config.exclude_modules = set(ranks), None
    config.layers_to_transform = config.layers_pattern = None
    if not all(_PLAIN.fullmatch(key) for key in (*config.rank_pattern, *config.alpha_pattern)):
        config.rank_pattern = {re.escape(path): rank for path, rank in ranks.items()}
        config.alpha_pattern = {re.escape(path): alpha for path, alpha in alphas.items()}


def _end_of(name: str) -> str:
    return next((end for end in _PAIRS if name.endswith(end)), "")


def _value_for(path: str, by_pattern: Mapping[str, Any], default: Any, patterns: Patterns) -> Any:
    """As PEFT chooses it: of the first pattern that the end of the path matches."""
    for key, value in by_pattern.items():
        pattern = rf"(.*\.)?({key})$"
        if re.match(pattern, path) if _PLAIN.fullmatch(key) else patterns.match(pattern, path):
            return value
    return default
