"""A model's checkpoint: config, tensor index and the tensors that are asked for, from a folder or from the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from splitnet.errors import ModelNotFound, UnsupportedModel
from splitnet.model.families import check_can_be_cut, text_config_of
from splitnet.model.lazy_tensors import LazyTensors, Progress
from splitnet.model.shards import Shards, TensorInfo, read_tensor_infos

_BLOCK_NAME = re.compile(r"^(?P<container>(?:.*?\.)?(?:layers|layer|h|blocks|block))\.(?P<index>\d+)\.(?P<rest>.+)$")
_OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech")
_ESSENTIALS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "layer_types", "sliding_window"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_parameters", "num_experts_per_tok"),
    *("tie_word_embeddings",),
)
_SAMPLE_BYTES = 256
"""Of the beginning and of the end of each tensor that the fingerprint covers."""


@dataclass(frozen=True)
class BlockTensor:
    """Where one tensor of a block stands.

    Attributes:
        name: in the checkpoint.
        rest: the part of the name after the number of the block.
    """

    name: str
    rest: str


class Checkpoint:
    """A model whose tensors are read one by one, only from the shards that hold what is asked for.

    Open one with `Checkpoint.open`.

    Attributes:
        name: hub id, or the name of the folder.
        config: of the text model.
        multimodal: the checkpoint holds more than the text model; the rest is left alone.
    """

    def __init__(self, name: str, shards: Shards, config: PreTrainedConfig, multimodal: bool = False) -> None:
        self.name = name
        self.config = config
        self.multimodal = multimodal
        self._shards = shards

    @property
    def source(self) -> str:
        """Hub id or folder, as transformers takes it."""
        return str(self._shards.source)

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Opens a local folder or, if there is none of that name, a hub id.

        Nothing but the config and the index of the shards is read (from the hub: downloaded).

        Raises:
            ModelNotFound: neither exists, or it holds no safetensors.
            UnsupportedModel: the family of the model is not known or cannot be cut into spans.
        """
        shards = Shards.open(model, revision)
        path = shards.config()
        try:
            config = AutoConfig.from_pretrained(path)
        except OSError as error:
            raise ModelNotFound(f"the config of {model} cannot be read: download it again") from error
        except (ValueError, KeyError, AttributeError) as error:
            raise UnsupportedModel(
                f"transformers does not know the architecture of {model}: update transformers ({_first_line(error)})"
            ) from error
        text_config = text_config_of(config)
        check_can_be_cut(text_config)
        checkpoint = cls(shards.name, shards, text_config, multimodal=text_config is not config)
        assert checkpoint.names  # raises if there are no safetensors
        return checkpoint

    @property
    def num_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Values per position of a boundary activation."""
        return self.config.hidden_size

    @property
    def model_type(self) -> str:
        """The family as transformers names it."""
        return self.config.model_type

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for; None if its config does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type that the weights are stored in."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        first = next(iter(self._shards.weight_map.values()))
        types = (info.dtype for info in self._infos([first]).values())
        return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._shards.weight_map)

    @cached_property
    def block_tensors(self) -> tuple[tuple[BlockTensor, ...], ...]:
        """The tensors of each block.

        Raises:
            UnsupportedModel: the names do not number `num_blocks` blocks.
        """
        containers: dict[str, dict[int, list[BlockTensor]]] = {}
        for name in self.names:
            if match := _BLOCK_NAME.match(name):
                blocks = containers.setdefault(match["container"], {})
                blocks.setdefault(int(match["index"]), []).append(BlockTensor(name, match["rest"]))
        complete = [name for name, blocks in containers.items() if all(i in blocks for i in range(self.num_blocks))]
        container = min(complete, key=lambda name: (bool(_OTHER_TOWERS.search(name)), name), default=None)
        if container is None:
            raise UnsupportedModel(
                f"the tensors of {self.name} are not named as {self.num_blocks} numbered blocks, so it cannot be cut "
                "into spans: take a checkpoint in transformers' format"
            )
        self._container = container
        return tuple(tuple(containers[container][i]) for i in range(self.num_blocks))

    @cached_property
    def shell_names(self) -> tuple[str, ...]:
        """The names of all tensors outside the blocks."""
        assert self.block_tensors
        prefix = self._container + "."
        return tuple(name for name in self.names if not (name.startswith(prefix) and _BLOCK_NAME.match(name)))

    @property
    def container(self) -> str:
        """What stands before the number of a block in the names of its tensors, such as `model.layers`."""
        assert self.block_tensors
        return self._container

    def bytes_of(self, names: Iterable[str], dtype: torch.dtype | None) -> int:
        """Bytes of these tensors once they are loaded as `dtype` (None: as stored). Reads only headers of shards."""
        names = list(names)
        infos = self._infos(self._shards.weight_map[name] for name in names)
        return sum(infos[name].bytes_as(dtype) for name in names)

    def load_tensors(
        self, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None = None
    ) -> LazyTensors:
        """Opens tensors for reading; from the hub, downloads the shards that hold them.

        Args:
            names: name to give a tensor -> its name in the checkpoint.
            dtype: the type that they will be converted to by the reader.
        """
        return LazyTensors(self._shards, names, dtype, progress)

    @cached_property
    def fingerprint(self) -> str:
        """Hex of a SHA-256 that is equal for equal weights: swarms are told apart by it.

        It covers what defines the computation in the config, the name, type and shape of every tensor, and the first
        and last 256 bytes of every tensor. It does not depend on how the tensors are sharded nor on which shards are
        here: from the hub, headers and samples are read by range. The end of a tensor and the beginning of the next
        stand side by side in a shard, so that is about one request for each large tensor. It is a check against
        mistakes (another size, fine-tune or precision), not proof: two checkpoints that differ only in places that
        are not sampled have the same fingerprint, and a peer could lie about it.

        Raises:
            ModelNotFound: a shard is missing or not complete.
        """
        digest = hashlib.sha256()
        essentials = {key: _of_all_blocks(self.config, key) for key in _ESSENTIALS}
        digest.update(json.dumps(essentials, sort_keys=True, default=str).encode())
        infos = self._infos()
        samples = self._samples(infos)
        for name, info in sorted(infos.items()):
            digest.update(f"\n{name} {info.stored} {info.shape} ".encode() + samples[name])
        return digest.hexdigest()

    def tokenizer(self) -> Any:
        """The tokenizer that comes with the model.

        Raises:
            ModelNotFound: the checkpoint has none.
        """
        try:
            return AutoTokenizer.from_pretrained(self._shards.source, **self._shards.options)
        except (OSError, ValueError) as error:
            raise ModelNotFound(
                f"{self.name} has no usable tokenizer: add its tokenizer files ({_first_line(error)})"
            ) from error

    def generation_config(self) -> GenerationConfig:
        """The model's defaults for generation; those of its config if it has none of its own."""
        try:
            return GenerationConfig.from_pretrained(self._shards.source, **self._shards.options)
        except OSError:
            return GenerationConfig.from_model_config(self.config)

    def _infos(self, shards: Iterable[str] | None = None) -> dict[str, TensorInfo]:
        wanted = sorted(set(self._shards.weight_map.values() if shards is None else shards))
        infos: dict[str, TensorInfo] = {}
        for shard in wanted:
            if shard not in self._headers:
                with self._shards.open_range(shard) as file:
                    self._headers[shard] = read_tensor_infos(file, shard)
            infos.update(self._headers[shard])
        return infos

    def _samples(self, infos: Mapping[str, TensorInfo]) -> dict[str, bytes]:
        """The first and the last bytes of each tensor."""
        by_shard: dict[str, list[tuple[str, int, int]]] = {}
        for name, info in infos.items():
            start, end = info.offset, info.offset + info.nbytes
            pieces = by_shard.setdefault(info.shard, [])
            pieces.append((name, start, min(end, start + _SAMPLE_BYTES)))
            pieces.append((name, max(start, end - _SAMPLE_BYTES), end))
        samples = dict.fromkeys(infos, b"")
        for shard, pieces in by_shard.items():
            found = self._shards.read_ranges(shard, [(start, end) for _, start, end in pieces])
            for (name, *_), data in zip(pieces, found, strict=True):
                samples[name] += data
        return samples

    @cached_property
    def _headers(self) -> dict[str, dict[str, TensorInfo]]:
        return {}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _of_all_blocks(config: PreTrainedConfig, key: str) -> Any:
    """A value of a config; where blocks differ in it, of each."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers' word for that
        return [getattr(own, key, None) for own in config.per_layer_config]
