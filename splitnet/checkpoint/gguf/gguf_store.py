"""A checkpoint in a GGUF file, single or split."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig

from splitnet.checkpoint.families import check_values
from splitnet.checkpoint.gguf.architectures import FURTHER_TOKENS, Change, GgufArchitecture, config_values, family_of
from splitnet.checkpoint.gguf.config import ROPE_TENSORS, make_config, read_tokenizer
from splitnet.checkpoint.gguf.file import GgufFile, GgufTensor
from splitnet.checkpoint.gguf.towers import WITH_TOWERS, Tower
from splitnet.checkpoint.quant.format import MALFORMED
from splitnet.checkpoint.store import LazyTensor, Progress, ReadBytes, TensorFacts, projector_files
from splitnet.checkpoint.transfer.weight_pieces import TensorLocation, WeightFolder
from splitnet.errors import ModelNotFound, UnsupportedModel, replace_library_errors
from splitnet.quant.packed_tensor import PackedTensor

_TOKEN = "tokenizer.ggml.{}_token_id"
_ARCHITECTURE = "general.architecture"
_MAX_ROPE_BYTES = 1 << 20  # bytes of factors of rotary embeddings, which are read with the config
_BLOCK = re.compile(r"(?:v\.)?blk\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class _Recipe:
    """How a tensor of transformers is made from tensors of the file."""

    parts: tuple[GgufTensor, ...]
    make: Callable[..., torch.Tensor]
    keeps_codes: bool


class GgufStore:
    """A `TensorStore` that maps a GGUF file and reads only the requested tensors. For a split file, `path` is any part;
    all parts are in one folder. Raises ModelNotFound if there is no such file, or a part is missing; UnsupportedModel
    if it is not a GGUF file, or the architecture of the model is unknown."""

    commit = ""

    def __init__(self, path: str | Path) -> None:
        self._file = file = GgufFile(Path(path).expanduser())
        self._family = family_of(file)
        self.name = file.name
        self.source = str(file.path)
        self.folder: WeightFolder | None = None
        self._tower: Tower | None = None

    @property
    def reads_images(self) -> bool:
        return self._file.architecture in WITH_TOWERS and bool(projector_files(self._file.path.parent))

    def with_towers(self) -> GgufStore:
        known = self._file.architecture in WITH_TOWERS or projector_files(self._file.path.parent)
        if self._tower is not None or not known:
            return self
        found = GgufStore(self._file.path)
        found.folder, found._tower = self.folder, Tower.beside(self._file, self.config)
        found.config = found._tower.whole_config  # in place of the config of the text model
        return found

    @cached_property
    def config(self) -> PreTrainedConfig:
        check_values({"layers": self._file.of_architecture.get("block_count")}, self.source)
        ropes = ROPE_TENSORS & self._file.tensors.keys()
        if sum(self._file.tensors[name].data.nbytes for name in ropes) > _MAX_ROPE_BYTES:
            raise UnsupportedModel(
                f"{self.source} has more than {_MAX_ROPE_BYTES} bytes of rotary factors: download it again"
            )
        if self.folder is not None:
            self.folder.supply(ropes)
        try:
            values = config_values(self._family, self._file)
            check_values(values, self.source)
            return make_config(self._family.model_type, values, self._file)
        except (StrictDataclassError, *MALFORMED) as error:
            raise UnsupportedModel(
                f"the metadata of {self.source} do not describe a model of the family {self._family.model_type!r}: "
                f"download it again, or take another file of this model ({' '.join(str(error).split())})"
            ) from error

    @property
    def quantized(self) -> bool:
        return any(tensor.layout is not None for tensor in self._file.tensors.values())

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._recipes)

    def tensor_facts(self, names: Iterable[str]) -> dict[str, TensorFacts]:
        return {name: self._facts(self._recipes[name]) for name in names}

    def file_bytes(self, names: Iterable[str]) -> int:
        return sum(part.data.nbytes for name in names for part in self._recipes[name].parts)

    def are_here(self, names: Iterable[str]) -> bool:
        return self.folder is None or self.folder.holds(self._from_peers(self._recipes[name] for name in names))

    def _from_peers(self, recipes: Iterable[_Recipe]) -> list[str]:
        """The tensors of the model's own file; those of its tower come from no peer."""
        return [part.name for recipe in recipes for part in recipe.parts if part.name in self._file.tensors]

    @contextmanager
    def load_tensors(
        self, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None = None
    ) -> Iterator[dict[str, Any]]:
        read = ReadBytes(progress)
        recipes = {given: self._recipes[name] for given, name in names.items()}
        if self.folder is not None:
            self.folder.supply(self._from_peers(recipes.values()))
        read.total = sum(part.data.nbytes for recipe in recipes.values() for part in recipe.parts)
        try:
            yield {given: self._lazy(recipe, read) for given, recipe in recipes.items()}
        finally:
            for file in (self._file, *([self._tower.file] if self._tower else [])):
                file.free_pages()

    def _lazy(self, recipe: _Recipe, read: ReadBytes) -> LazyTensor:
        known = self._facts(recipe)

        def of(index: Any) -> torch.Tensor:
            tensor = self._made(recipe, [part.tensor() for part in recipe.parts])
            read.add(known.nbytes)
            return tensor if index is ... or index == slice(None) else tensor[index]

        return LazyTensor(known.shape, known.dtype, of)

    def _made(self, recipe: _Recipe, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        try:
            return recipe.make(self.config.get_text_config(), *parts)
        except (RuntimeError, *MALFORMED) as error:
            first = recipe.parts[0]
            raise UnsupportedModel(
                f"{first.name} of {self.source} ({list(first.shape)}) does not fit the file's metadata ({error}): "
                "download it again, or take another file of this model"
            ) from error

    def told_config(self) -> str:
        told = {_ARCHITECTURE: self._file.architecture, **self._file.of_architecture}
        return json.dumps(told, sort_keys=True, default=str)

    def tensor_locations(self) -> Mapping[str, TensorLocation]:
        return {
            name: TensorLocation(one.path.name, one.offset, one.data.nbytes, one.stored.name, one.shape)
            for name, one in self._file.tensors.items()
        }

    def file_heads(self) -> Mapping[str, int]:
        heads = {part.name: part.stat().st_size for part in self._file.parts}
        for one in self._file.tensors.values():
            heads[one.path.name] = min(heads[one.path.name], one.offset)
        return heads

    def find_file(self, file: str) -> None:
        """Returns None, because all files of the model are in its GGUF file."""

    def local_file(self, file: str) -> Path | None:
        return self._file.path.with_name(file)

    def open_file(self, file: str) -> BinaryIO:
        try:
            return self._file.path.with_name(file).open("rb")
        except OSError as error:
            raise ModelNotFound(f"{file} of {self.name} cannot be read: download it again") from error

    def processor(self) -> Any:
        if self._tower is None:
            raise ModelNotFound(
                f"{self.name} is a GGUF file, which has no processor of images: give the original model"
            )
        return self._tower.processor(self.tokenizer())

    def tokenizer(self, **options: Any) -> Any:
        says = self._file.metadata.get
        with replace_library_errors(
            lambda why: ModelNotFound(
                f"no tokenizer can be made from the metadata of {self.name}: give --tokenizer with the folder or the "
                f"Hugging Face id of the original model ({why})"
            )
        ):
            made = read_tokenizer(self._file.path, says("tokenizer.ggml.model"), says("tokenizer.ggml.pre"), **options)
            names = [(f"fim_{name[:3]}", name) for name in ("prefix", "suffix", "middle")]
            ids = [says(_TOKEN.format(new), says(_TOKEN.format(old))) for new, old in names]
            # For requests to fill in text between two others.
            made.infill_marks = [made.convert_ids_to_tokens(id) or "" if id is not None else "" for id in ids]
            return made

    def generation_config(self) -> GenerationConfig | None:
        return None  # files have no defaults except the tokens that end generation

    def _facts(self, recipe: _Recipe) -> TensorFacts:
        nbytes = sum(part.data.nbytes for part in recipe.parts)
        layouts = [part.layout for part in recipe.parts]
        if recipe.keeps_codes and None not in layouts:
            tensor = self._made(recipe, [part.tensor() for part in recipe.parts])  # this reads no codes
            if isinstance(tensor, PackedTensor):
                held = {matrix.layout for matrix in tensor.experts[0]}
                widest = max(held, key=lambda layout: layout.nbytes(*tensor.experts[0][0].shape))
                return TensorFacts(tuple(tensor.shape), tensor.dtype, widest, nbytes, tensor.transposed)
        meta = [torch.empty(part.shape, device="meta") for part in recipe.parts]
        dtype = recipe.parts[0].dtype if layouts.count(None) == len(layouts) else torch.float32
        return TensorFacts(tuple(self._made(recipe, meta).shape), dtype, None, nbytes)

    @cached_property
    def _recipes(self) -> dict[str, _Recipe]:
        """Recipes, by the names in transformers' checkpoints."""
        count = self._file.of_architecture["block_count"]
        found = _recipes_of(self._file, self._family, self.config.get_text_config().num_hidden_layers, count)
        if self._tower is None:
            return found
        found = {re.sub(r"^model(?=\.)", self._tower.row.text, name): recipe for name, recipe in found.items()}
        return found | _recipes_of(self._tower.file, self._tower.layout, self._tower.blocks, self._tower.blocks)


def _recipes_of(file: GgufFile, family: GgufArchitecture, blocks: int, count: int) -> dict[str, _Recipe]:
    """The recipes of a file with `count` blocks, of which those from number `blocks` on predict further tokens."""
    inside: dict[int, dict[str, GgufTensor]] = {}
    outside: dict[str, GgufTensor] = {}
    for name, tensor in file.tensors.items():
        if match := _BLOCK.match(name):
            inside.setdefault(int(match[1]), {})[match[2]] = tensor
            if int(match[1]) >= count:
                raise UnsupportedModel(
                    f"{file.name} has the tensor {name}, and says that it has {count} blocks: download it again, "
                    "or take another file of this model"
                )
        elif name not in ROPE_TENSORS:
            outside[name] = tensor
    recipes = _changed(family.outside_changes, "", outside)
    for name, tensor in outside.items():
        recipes[_renamed(file, name, name, family.outside)] = _copied(family, name, tensor)
    further: dict[str, _Recipe] = {}
    for block in range(count):
        left = inside.get(block, {})
        path = f"{family.container}.{block}."
        found, modules = (recipes, family.tensors) if block < blocks else (further, family.tensors | FURTHER_TOKENS)
        found |= _changed(family.changes, path, left)
        for name, tensor in left.items():
            if name in ROPE_TENSORS:
                continue
            with nullcontext() if block < blocks else suppress(UnsupportedModel):
                found[path + _renamed(file, tensor.name, name, modules)] = _copied(family, name, tensor)
    for recipe in recipes.values():
        _check_types(recipe)
    # Errors in layers that predict further tokens are ignored, because few users load these layers.
    for name, recipe in further.items():
        with suppress(UnsupportedModel):
            _check_types(recipe)
            recipes[name] = recipe
    return recipes


def _changed(changes: Iterable[Change], path: str, left: dict[str, GgufTensor]) -> dict[str, _Recipe]:
    """The recipes of tensors that are not only renamed; takes their parts out of `left`."""
    found: dict[str, _Recipe] = {}
    for change in changes:
        names = change.parts.split()
        if left.keys() >= set(names):
            found[path + change.name] = _Recipe(tuple(map(left.pop, names)), change.make, change.keeps_codes)
    return found


def _check_types(recipe: _Recipe) -> None:
    for part in recipe.parts:
        assert part.layout is None or part.layout  # raises if the type is unknown


def is_of_gguf(told_config: str) -> bool:
    """Whether a config of `TensorStore.told_config` is from a GGUF file."""
    return f'"{_ARCHITECTURE}": ' in told_config


def _renamed(file: GgufFile, full: str, name: str, modules: Mapping[str, str]) -> str:
    if name in modules:
        return modules[name]
    module, _, kind = name.rpartition(".")
    if module not in modules or kind not in ("weight", "bias"):
        raise UnsupportedModel(
            f"{file.name} has the tensor {full}, which splitnet does not know in the architecture "
            f"{file.architecture!r}: take another file of this model, or its safetensors"
        )
    return f"{modules[module]}.{kind}"


def _copied(family: GgufArchitecture, name: str, tensor: GgufTensor) -> _Recipe:
    if family.raised_norms and name.endswith("norm.weight") and name != "ssm_norm.weight":
        return _Recipe((tensor,), lambda config, weight: weight - 1, False)
    return _Recipe((tensor,), lambda config, same: same, True)
