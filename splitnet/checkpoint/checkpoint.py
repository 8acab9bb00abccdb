"""A model's checkpoint: its config, its tensor index and the requested tensors, from a folder or from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from splitnet.checkpoint.families import causal_class, check_can_be_cut, image_text_class, max_positions, text_config_of
from splitnet.checkpoint.safetensors import SafetensorsStore
from splitnet.checkpoint.store import Progress, TensorStore, projector_files
from splitnet.checkpoint.transfer.hashing import keep_manifest, kept_manifest, make_manifest
from splitnet.checkpoint.transfer.manifest import Manifest
from splitnet.checkpoint.transfer.weight_pieces import HeldPieces, WeightFolder, read_manifest
from splitnet.errors import ModelNotFound, UnsupportedModel
from splitnet.quant.packed_tensor import is_number_type

_BLOCK_NAME = re.compile(r"^(?P<container>(?:.*?\.)?(?:layers|layer|h|blocks|block))\.(?P<index>\d+)\.(?P<rest>.+)$")
OTHER_TOWERS = re.compile(
    r"vision|visual|image|audio|speech|video|multi_?modal|(^|\.)mm_|projector|connector|merger|resampler|perceiver|talker|"
    r"code2wav|token2wav|(^|\.)mtp\."
)
"""Parts of names of tensors that do not belong to the text model."""

_SHOWN = 3  # maximum number of tensors that an error message names
_NOT_WEIGHTS = r"rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$|(^|\.)position_ids$"
"""Tables in older checkpoints that models compute themselves. If a table is a weight of a model, the model takes it."""
_NEXT_TOKENS = r"(^|\.)mtp(\.|_|\d|$)"
"""Layers that predict more than one token; transformers' classes lack them."""


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of a block by its name in the checkpoint; `rest` is the part after the number of the block."""

    name: str
    rest: str


class Checkpoint:
    """A model whose tensors are read one by one, only from the shards with the requested tensors. Open one with
    `Checkpoint.open`. config, num_blocks, model_type: of the text model. multimodal: the checkpoint holds more than the
    text model, which is ignored."""

    def __init__(
        self, store: TensorStore, config: PreTrainedConfig, multimodal: bool = False, tokenizer: str | None = None
    ) -> None:
        self.store = store
        self.name = store.name
        self.source = store.source
        self.tokenizer_source = tokenizer or store.source
        self.config = config
        self.multimodal = multimodal
        self.model_type: str = config.model_type
        self.num_blocks: int = config.num_hidden_layers
        self._manifest: Manifest | None = None

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None, tokenizer: str | None = None) -> Checkpoint:
        """Opens a GGUF file, a local folder or, if no such file or folder exists, a hub id. Only the config and the
        index of the shards are read (from the hub: downloaded). tokenizer: hub id or folder of a tokenizer that
        replaces the model's own.

        Raises ModelNotFound if nothing is found, or the checkpoint has no safetensors files; UnsupportedModel if the
        family of the model is unknown or cannot be cut into spans, or its weights are stored in an unknown way.
        """
        return cls.of(open_store(model, revision), tokenizer)

    @classmethod
    def of(cls, store: TensorStore, tokenizer: str | None = None) -> Checkpoint:
        """As `open`, for files that are open."""
        whole, config = read_config(store)
        checkpoint = cls(store, config, multimodal=config is not whole, tokenizer=tokenizer)
        if config.num_hidden_layers > len(store.tensor_names):  # raises if there are no tensors
            raise UnsupportedModel(
                f"{store.name} has {len(store.tensor_names)} tensors, and its config says {config.num_hidden_layers} "
                "blocks: download it again"
            )
        return checkpoint

    @property
    def hidden_size(self) -> int:
        """Values per position of a boundary activation."""
        return self.config.hidden_size

    @property
    def max_positions(self) -> int | None:
        """The number of positions that the model was made for; None: no bound is known."""
        return max_positions(self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type in which the weights are stored; for quantized weights, the type that the config names."""
        if is_number_type(self.config.dtype):
            return self.config.dtype
        types = (self.store.tensor_facts([name])[name].dtype for name in self.store.tensor_names)
        return next((dtype for dtype in types if is_number_type(dtype)), torch.float32)

    @cached_property
    def block_tensors(self) -> tuple[tuple[BlockTensor, ...], ...]:
        """The tensors of each block. Raises UnsupportedModel: the names do not number `num_blocks` blocks, or number
        more blocks that do not predict further tokens."""
        containers: dict[str, dict[int, list[BlockTensor]]] = {}
        for name in self.store.tensor_names:
            if match := _BLOCK_NAME.match(name):
                blocks = containers.setdefault(match["container"], {})
                blocks.setdefault(int(match["index"]), []).append(BlockTensor(name, match["rest"]))
        complete = [name for name, blocks in containers.items() if all(i in blocks for i in range(self.num_blocks))]
        container = min(complete, key=lambda name: (bool(OTHER_TOWERS.search(name)), name), default=None)
        if container is None:
            raise UnsupportedModel(
                f"the tensors of {self.name} are not named as {self.num_blocks} numbered blocks, so it cannot be cut "
                "into spans: take a checkpoint in transformers' format"
            )
        self._container = container
        beyond = {
            tensor.name
            for index, tensors in containers[container].items()
            for tensor in tensors
            if index >= self.num_blocks + (getattr(self.config, "num_nextn_predict_layers", None) or 0)
        }
        check_no_unexpected(beyond - ignored(beyond, causal_class(self.config)), self.model_type)
        return tuple(tuple(containers[container][i]) for i in range(self.num_blocks))

    @cached_property
    def client_part_names_of(self) -> tuple[str, ...]:
        """The names of all tensors outside the blocks."""
        assert self.block_tensors
        prefix = self._container + "."
        return tuple(
            name for name in self.store.tensor_names if not (name.startswith(prefix) and _BLOCK_NAME.match(name))
        )

    @cached_property
    def next_token_names(self) -> frozenset[str]:
        """The names of all tensors of layers that predict further tokens: blocks after the last block, and layers with
        such names."""
        behind = re.compile(rf"{re.escape(self.container)}\.(\d+)\.")
        found = ((name, behind.match(name)) for name in self.store.tensor_names)
        return frozenset(
            name
            for name, match in found
            if (int(match[1]) >= self.num_blocks if match else re.search(_NEXT_TOKENS, name))
        )

    def with_more_blocks(self, config: PreTrainedConfig, blocks: Sequence[Sequence[BlockTensor]]) -> Checkpoint:
        """The same files as a model with additional blocks with these tensors; `config`: the config of the longer
        model."""
        other = Checkpoint(self.store, config, self.multimodal, self.tokenizer_source)
        other.block_tensors = (*self.block_tensors, *map(tuple, blocks))
        return other

    @property
    def container(self) -> str:
        """The part of tensors' names before the number of the block, such as `model.layers`."""
        assert self.block_tensors
        return self._container

    def bytes_of(self, names: Iterable[str], dtype: torch.dtype | None) -> int:
        """Bytes of these tensors once they are loaded as numbers of type `dtype` (None: as stored)."""
        return sum(facts.bytes_as(dtype) for facts in self.store.tensor_facts(names).values())

    @property
    def fingerprint(self) -> str:
        """Hex of a SHA-256 of the config and of all bytes of all tensors, which identifies a swarm. See `manifest`. It
        does not depend on the order of tensors in files."""
        return self.manifest().fingerprint

    def manifest(self, progress: Progress | None = None) -> Manifest:
        """The digests of all tensors. Digests of files that have not changed are taken from the cache. Files on the hub
        that are not on this machine are read once, and not kept. progress: called with the bytes read, if they are
        many. Raises ModelNotFound if a file is missing or incomplete."""
        if self._manifest is None:
            folder, commit = self.store.folder, self.store.commit
            if folder is not None:
                self._manifest = folder.manifest
            elif self.is_whole:  # a manifest from others is checked against the files
                self._manifest = make_manifest(self.store, progress)
            else:
                self._manifest = kept_manifest(commit) or make_manifest(self.store, progress)
                keep_manifest(commit, self._manifest)
        return self._manifest

    @property
    def knows_manifest(self) -> bool:
        """Whether `manifest` needs only files on this machine."""
        return self._manifest is not None or self.is_whole or kept_manifest(self.store.commit) is not None

    @cached_property
    def is_whole(self) -> bool:
        """Whether all files are on this machine, so that no other peer need be asked for the manifest. Raises
        ModelNotFound: this cannot be found out without the hub."""
        store = self.store
        if store.folder is not None or not store.commit:
            return True
        try:
            return all(
                store.local_file(file) is not None
                for file in {place.file for place in store.tensor_locations().values()}
            )
        except ModelNotFound:  # a header is missing, and the hub cannot be reached
            if kept_manifest(store.commit) is None:
                raise
            return False

    def held_pieces(self) -> HeldPieces:
        """The pieces of the weights on this machine. See `manifest`."""
        return self.store.folder or HeldPieces(self.manifest(), self.store)

    def adopt(self, manifest: Manifest) -> None:
        """Takes a manifest as this model's manifest. Call `transfer.manifest_search.differs` first, which compares the
        manifest with the files here."""
        self._manifest = manifest
        keep_manifest(self.store.commit, manifest)

    def get_blocks(self, start: int, end: int) -> None:
        """Fetches the missing tensors of blocks `[start, end)`; raises SplitnetError if one is unavailable."""
        names = [tensor.name for block in self.block_tensors[start:end] for tensor in block]
        with self.store.load_tensors({name: name for name in names}, self.dtype):
            pass

    def tokenizer(self) -> Any:
        """The tokenizer of the model, or the one that `open` was given; raises ModelNotFound if there is none."""
        if self.tokenizer_source == self.store.source:
            return self.store.tokenizer()
        return open_store(self.tokenizer_source).tokenizer()

    @cached_property
    def with_towers(self) -> Checkpoint:
        """The checkpoint with the towers of a model that reads images; those of a GGUF file are in a file beside it.
        Raises UnsupportedModel: the model reads no images, or that file is of another model; ModelNotFound: there is no
        such file."""
        store = self.store.with_towers()
        image_text_class(store.config)
        if store is self.store:
            return self
        found = Checkpoint.of(store, self.tokenizer_source)
        found._manifest = self._manifest
        return found

    def generation_config(self) -> GenerationConfig:
        """The model's defaults for generation; without these, the defaults of its config."""
        return self.store.generation_config() or GenerationConfig.from_model_config(self.config)


def open_store(model: str | Path, revision: str | None = None) -> TensorStore:
    """The files of a checkpoint: a GGUF file, a local folder or, if no such file or folder exists, a hub id. A folder
    without a config and a tokenizer stands for its only GGUF file, besides files of projectors. Raises ModelNotFound:
    there is no such file or folder, or the folder has several GGUF files."""
    folder, own = Path(model).expanduser(), ("config.json", "tokenizer.json", "tokenizer_config.json")
    alone = folder.is_dir() and not any((folder / name).exists() for name in own)
    if alone and (files := sorted({*folder.glob("*.gguf")} - {*projector_files(folder)})):
        if len(files) > 1:
            raise ModelNotFound(f"{model} holds {len(files)} GGUF files: give one of them, such as {files[0]}")
        model = files[0]
    if str(model).endswith(".gguf"):
        from splitnet.checkpoint.gguf.gguf_store import GgufStore

        store: TensorStore = GgufStore(model)
        folder = Path(model).expanduser().parent
    else:
        store = SafetensorsStore.open(model, revision)
    manifest = read_manifest(folder)
    if manifest is not None:
        store.folder = WeightFolder(folder, manifest, store)
    return store


def read_config(store: TensorStore) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The config of a whole checkpoint and the config of its text model; they are the same object if the checkpoint has
    no other part. Raises ModelNotFound if the config cannot be read; UnsupportedModel if transformers does not know the
    architecture, or it cannot be cut into spans."""
    whole = store.config
    config = text_config_of(whole)
    check_can_be_cut(config)
    tied = any(getattr(one, "tie_word_embeddings", False) for one in (whole, config))
    if config is not whole and tied:
        # Wrapper configs have this value outside the text config, some as a default even in checkpoints with a separate
        # head.
        config.tie_word_embeddings = not _has_head(store)
    return whole, config


def _has_head(store: TensorStore) -> bool:
    try:
        return any(name.endswith("lm_head.weight") for name in store.tensor_names)
    except ModelNotFound:  # the checkpoint has only a config
        return False


def ignored(names: Iterable[str], model_class: Any) -> set[str]:
    """The names that models ignore on purpose: names in the family's class, old tables, further predictions."""
    own = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = re.compile("|".join(f"({pattern})" for pattern in (*own, _NOT_WEIGHTS, _NEXT_TOKENS)))
    return {name for name in names if known.search(name)}


def check_no_unexpected(names: Iterable[str], model_type: str) -> None:
    """Raises UnsupportedModel, with some of the names, if there are tensors that no part of the model takes."""
    left = sorted(names)
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        raise UnsupportedModel(
            f"the checkpoint holds tensors that models of the family {model_type!r} do not take "
            f"({', '.join(left[:_SHOWN])}{more}): without them the model would compute something else; take a "
            "checkpoint in transformers' format, or remove them if they are not meant to be used"
        )
