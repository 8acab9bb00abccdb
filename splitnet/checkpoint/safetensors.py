"""A checkpoint in safetensors files, in a folder or on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from splitnet.checkpoint.families import FAMILIES, check_values
from splitnet.checkpoint.quant.format import DESCRIPTION_BYTES, Part, Weights
from splitnet.checkpoint.quant.known import quantization_settings, quantized_format
from splitnet.checkpoint.shards import Shards, TensorInfo, read_tensor_infos
from splitnet.checkpoint.store import LazyTensors, Progress, TensorFacts
from splitnet.checkpoint.transfer.held import Place, WeightFolder
from splitnet.errors import ModelNotFound, UnsupportedModel, stumbling
from splitnet.quant.stored import PackedTensor, is_number_type

_GENERATION = "generation_config.json"
_NOTES = ("_name_or_path", "transformers_version", "use_cache")
"""Keys of a config that say nothing about the model."""


class SafetensorsStore:
    """A `TensorStore` whose tensors are read one by one, only from the shards that hold what is asked for.

    Open one with `SafetensorsStore.open`.
    """

    def __init__(self, shards: Shards) -> None:
        self.name = shards.name
        self.source = str(shards.source)
        self.folder: WeightFolder | None = None
        self._shards = shards

    @classmethod
    def open(cls, model: str | Path, revision: str | None) -> SafetensorsStore:
        """Opens a local folder or, if there is none of that name, a hub id. Nothing is read yet.

        Raises:
            ModelNotFound: there is no such folder.
        """
        return cls(Shards.open(model, revision))

    def config(self) -> PreTrainedConfig:
        """See `TensorStore.config`."""
        return self._config

    @cached_property
    def _config(self) -> PreTrainedConfig:
        def refusal(why: str) -> UnsupportedModel:
            return UnsupportedModel(
                f"transformers cannot make a model of {self._config_file}: update transformers if it does not know the "
                f"architecture, or download the file again if it is damaged ({why})"
            )

        with stumbling(refusal):
            try:
                values, _ = PreTrainedConfig.get_config_dict(self._config_file)
                check_values(values, self._config_file)
                known = FAMILIES.get(str(values.get("model_type")))
                if known is not None and known.same_as:
                    config = AutoConfig.for_model(**(values | {"model_type": known.same_as}))
                else:
                    config = AutoConfig.from_pretrained(self._config_file, trust_remote_code=False)
            except OSError as error:
                raise ModelNotFound(f"the config of {self.source} cannot be read: download it again") from error
            except StrictDataclassError as error:
                raise UnsupportedModel(
                    f"the config of {self.source} has values that its family cannot have: download it again, or mend "
                    f"it ({' '.join(str(error).split())})"
                ) from error
        # What is read here are weights of plain numbers to transformers, whatever they are made of.
        for part in (config, *vars(config).values()):
            if isinstance(part, PreTrainedConfig):
                vars(part).pop("quantization_config", None)
        return config

    @cached_property
    def _config_file(self) -> Path:
        return self._shards.config()

    @cached_property
    def _quantization(self) -> Mapping[str, Any] | None:
        return quantization_settings(json.loads(self._config_file.read_text(encoding="utf-8")))

    @cached_property
    def _weights(self) -> Weights:
        settings = self._quantization
        text = self._config.get_text_config()
        format = None if settings is None else quantized_format(settings, text.model_type)
        told = text.dtype or self._config.dtype
        dtype = told if is_number_type(told) else torch.bfloat16
        return Weights(tuple(self._shards.weight_map), format, dtype)

    @property
    def quantized(self) -> bool:
        """See `TensorStore.quantized`."""
        return self._quantization is not None

    @property
    def names(self) -> tuple[str, ...]:
        """See `TensorStore.names`."""
        return tuple(self._weights.groups)

    def facts(self, names: Iterable[str]) -> dict[str, TensorFacts]:
        """See `TensorStore.facts`; only of the shards that hold these tensors.

        Of NF4 the description of each weight is read too, and of GPTQ that permutes inputs, the permutation.
        """
        names = list(names)
        groups = self._weights.groups
        stored = [part for name in names for part in groups[name].values()]
        infos = self._infos(self._shards.weight_map[part] for part in stored)
        self._shards.check_hold(stored, infos)
        if self.folder is not None and self._quantization is not None:  # descriptions, all at once
            self.folder.supply([part for part in stored if infos[part].nbytes <= DESCRIPTION_BYTES])

        def part(name: str) -> Part:
            info = infos[name]
            return Part(name, info.shape, info.dtype, lambda index: self._read(info)[index])

        facts: dict[str, TensorFacts] = {}
        for name in names:
            nbytes = sum(infos[part].nbytes for part in groups[name].values())
            tensor = self._weights.tensor(name, part)
            if tensor is None:
                facts[name] = TensorFacts(infos[name].shape, infos[name].dtype, None, nbytes)
            else:
                coded = tensor if isinstance(tensor, PackedTensor) else None
                layout = coded.experts[0][0].layout if coded is not None else None
                across = coded is not None and coded.transposed
                facts[name] = TensorFacts(tuple(tensor.shape), tensor.dtype, layout, nbytes, across)
        return facts

    def file_bytes(self, names: Iterable[str]) -> int:
        """See `TensorStore.file_bytes`."""
        stored = [part for name in names for part in self._weights.groups[name].values()]
        infos = self._infos(self._shards.weight_map[part] for part in stored)
        self._shards.check_hold(stored, infos)
        return sum(infos[part].nbytes for part in stored)

    def load_tensors(
        self, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None = None
    ) -> LazyTensors:
        """See `TensorStore.load_tensors`; only the shards that hold these tensors are downloaded."""
        if self.folder is not None:
            self.folder.supply([part for name in names.values() for part in self._weights.groups[name].values()])
        return LazyTensors(self._shards, self._weights, names, dtype, progress)

    def told_config(self) -> str:
        """See `TensorStore.told_config`: the config file without notes."""
        try:
            values = json.loads(self._config_file.read_text(encoding="utf-8"))
            return json.dumps(_without_notes(values), sort_keys=True)
        except (OSError, ValueError, RecursionError) as error:
            raise ModelNotFound(f"the config of {self.source} cannot be read: download it again") from error

    def places(self) -> Mapping[str, Place]:
        """See `TensorStore.places`; from the hub, headers are read by range."""
        infos = self._infos(self._shards.weight_map.values())
        self._shards.check_hold(self._shards.weight_map, infos)
        return {
            name: Place(info.shard, info.offset, info.nbytes, info.stored, info.shape) for name, info in infos.items()
        }

    def heads(self) -> Mapping[str, int]:
        """See `TensorStore.heads`: none, as headers of safetensors tell of nothing but tensors."""
        return {}

    @property
    def commit(self) -> str:
        """See `TensorStore.commit`."""
        return self._shards.commit

    def local_file(self, file: str) -> Path | None:
        """See `TensorStore.local_file`."""
        return self._shards.local_file(file)

    def open_file(self, file: str) -> BinaryIO:
        """See `TensorStore.open_file`."""
        return self._shards.open_range(file)

    def tokenizer(self) -> Any:
        """See `TensorStore.tokenizer`."""
        with stumbling(
            lambda why: ModelNotFound(f"{self.name} has no usable tokenizer: add its tokenizer files ({why})")
        ):
            return AutoTokenizer.from_pretrained(self._shards.source, trust_remote_code=False, **self._shards.options)

    def generation_config(self) -> GenerationConfig | None:
        """See `TensorStore.generation_config`."""
        with stumbling(
            lambda why: UnsupportedModel(
                f"{_GENERATION} of {self.name} is not what transformers reads: download it again, or remove it ({why})"
            )
        ):
            try:
                return GenerationConfig.from_pretrained(self._shards.source, **self._shards.options)
            except OSError:
                file = self._shards.local_file(_GENERATION)
                if file is not None and file.is_file():
                    raise
                return None

    def _read(self, info: TensorInfo) -> torch.Tensor:
        """A small tensor."""
        if self.folder is not None:
            self.folder.supply([name for name, one in self._headers[info.shard].items() if one == info])
        (data,) = self._shards.read_ranges(info.shard, [(info.offset, info.offset + info.nbytes)])
        return torch.frombuffer(bytearray(data), dtype=info.dtype).view(info.shape)

    def _infos(self, shards: Iterable[str]) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for shard in sorted(set(shards)):
            if shard not in self._headers:
                with self._shards.open_range(shard) as file:
                    self._headers[shard] = read_tensor_infos(file, shard)
            infos.update(self._headers[shard])
        return infos

    @cached_property
    def _headers(self) -> dict[str, dict[str, TensorInfo]]:
        return {}


def _without_notes(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_notes(one) for one in cast("list[Any]", values)]
    if not isinstance(values, dict):
        return values
    told = {key: _without_notes(one) for key, one in cast("dict[str, Any]", values).items() if key not in _NOTES}
    if "torch_dtype" in told:  # what `dtype` was called before
        told.setdefault("dtype", told.pop("torch_dtype"))
    return told
