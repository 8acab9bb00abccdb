"""A checkpoint in safetensors files: in a folder, or on the hub, from which files are downloaded or read by range."""

from __future__ import annotations

import json
import logging
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from huggingface_hub import HfFileSystem, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedConfig

from splitnet.checkpoint.families import FAMILIES, check_values, reads_images
from splitnet.checkpoint.quant.compressed_tensors import CompressedTensors
from splitnet.checkpoint.quant.format import (
    DESCRIPTION_BYTES,
    MALFORMED,
    CheckpointWeights,
    Numbers,
    Part,
    QuantizedFormat,
)
from splitnet.checkpoint.quant.integers import Awq, Gptq, Int8, Mlx, Nf4, auto_round
from splitnet.checkpoint.quant.scaled_floats import FbgemmFP8, FineGrainedFP8, ModelOpt, Mxfp4
from splitnet.checkpoint.store import MOST_OF_NAME, LazyTensor, Progress, ReadBytes, TensorFacts
from splitnet.checkpoint.transfer.weight_pieces import TensorLocation, WeightFolder
from splitnet.errors import ModelNotFound, UnsupportedModel, replace_library_errors
from splitnet.quant.packed_tensor import PackedTensor, is_number_type

log = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_GENERATION = "generation_config.json"
_NOTES = ("_name_or_path", "transformers_version", "use_cache")  # config keys that do not describe the model
_MAX_HEADER_BYTES = 100_000_000
_MOST_DIMENSIONS = 8
_MOST_BYTES = 1 << 60
_KEPT_IN_FILE = re.compile(r"embed\w*_per_layer\.weight$")
"""Tables of gigabytes of which a token reads one row: Gemma 4 E2B has 262,144 rows of 35 x 256 values."""

_FILE_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
"""Allowed file names in an index: files in the folder of the index, not elsewhere on the machine."""
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # MLX uses "quantization"
_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], QuantizedFormat]] = {
    "auto-round": auto_round,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "compressed_tensors": CompressedTensors,
    "fbgemm_fp8": lambda settings: FbgemmFP8(),
    "fp8": FineGrainedFP8,
    "gptq": Gptq,
    "modelopt": ModelOpt,
    "mxfp4": lambda settings: Mxfp4(),
    "mxfp8": FineGrainedFP8,
}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "U32": torch.uint32,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _dtype_of(place: TensorLocation) -> torch.dtype:
    return _DTYPES.get(place.stored, torch.uint8)


def read_places(file: BinaryIO, shard: str) -> dict[str, TensorLocation]:
    """The tensors of a safetensors file, from its header. Format: https://github.com/huggingface/safetensors#format.
    Raises UnsupportedModel: it is not a safetensors file."""
    try:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        header = json.loads(file.read(size))
        if any(len(name) > MOST_OF_NAME for name in header):
            raise ValueError("the name of a tensor is too long")
        return {name: _place(shard, 8 + size, **entry) for name, entry in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModel(f"{shard} is not a safetensors file: download or convert it again") from error


def _place(shard: str, begin: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> TensorLocation:
    """The location of a tensor. `begin`: offset of the data in the file. Raises ValueError for impossible values."""
    start, end = data_offsets
    if len(shape) > _MOST_DIMENSIONS or max((*shape, end), default=0) > _MOST_BYTES:
        raise ValueError("a tensor has too many dimensions, or is too large")
    if any(type(number) is not int or number < 0 for number in (*shape, start, end - start)) or type(dtype) is not str:
        raise ValueError("a shape, an offset or a type is invalid")
    if dtype in _DTYPES and end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError("the bytes of a tensor do not fit its shape and type")
    return TensorLocation(shard, begin + start, end - start, dtype, tuple(shape))


class SafetensorsStore:
    """A `TensorStore` that reads tensors one by one, only from the shards with the requested tensors. Open one with
    `SafetensorsStore.open`."""

    def __init__(self, name: str, path: Path | None, revision: str | None) -> None:
        self.name = name
        self.source = name if path is None else str(path)
        self.folder: WeightFolder | None = None
        self._path = path
        self._revision = revision
        self._hub_answers = False
        self._headers: dict[str, dict[str, TensorLocation]] = {}

    @classmethod
    def open(cls, model: str | Path, revision: str | None) -> SafetensorsStore:
        """Opens a local folder or, if no such folder exists, a hub id. Reads nothing yet. Raises ModelNotFound: there
        is no such folder."""
        path = Path(model).expanduser()
        if path.is_dir():
            return cls(path.resolve().name, path, None)
        if path.is_file():
            raise ModelNotFound(
                f"{model} is a file that is not a checkpoint: give a GGUF file, whose name ends with .gguf, a "
                "checkpoint folder or a Hugging Face id"
            )
        if isinstance(model, Path) or _is_path(model):
            raise ModelNotFound(f"there is no folder {model}: give a checkpoint folder or a Hugging Face id")
        return cls(model, None, revision)

    @cached_property
    def config(self) -> PreTrainedConfig:
        def refusal(why: str) -> UnsupportedModel:
            return UnsupportedModel(
                f"transformers cannot make a model of {self._config_file}: update transformers if it does not know the "
                f"architecture, or download the file again if it is damaged ({why})"
            )

        with replace_library_errors(refusal):
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
                    f"the config of {self.source} has values that its family cannot have: download it again, or "
                    f"correct it ({' '.join(str(error).split())})"
                ) from error
        # transformers sees every weight as plain numbers, because this store decodes quantized weights.
        for part in (config, *vars(config).values()):
            if isinstance(part, PreTrainedConfig):
                vars(part).pop("quantization_config", None)
        return config

    @cached_property
    def _config_file(self) -> Path:
        path = self.find_file("config.json")
        if path is None:
            raise ModelNotFound(f"{self.name} has no config.json: give a folder or id of a transformers checkpoint")
        return path

    @cached_property
    def _quantization(self) -> Mapping[str, Any] | None:
        return _quantization_settings(json.loads(self._config_file.read_text(encoding="utf-8")))

    @cached_property
    def _weights(self) -> CheckpointWeights:
        settings = self._quantization
        text = self.config.get_text_config()
        format = None if settings is None else _quantized_format(settings, text.model_type)
        told = text.dtype or self.config.dtype
        dtype = told if is_number_type(told) else torch.bfloat16
        return CheckpointWeights(tuple(self._weight_map), format, dtype)

    @property
    def quantized(self) -> bool:
        return self._quantization is not None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._weights.groups)

    def tensor_facts(self, names: Iterable[str]) -> dict[str, TensorFacts]:
        """Reads only headers of the shards with these tensors; for NF4 also the description of each weight, and for
        GPTQ with permuted inputs the permutation."""
        names = list(names)
        groups = self._weights.groups
        stored = [part for name in names for part in groups[name].values()]
        infos = self._infos(stored)
        if self.folder is not None and self._quantization is not None:  # fetches all descriptions at once
            self.folder.supply([part for part in stored if infos[part].nbytes <= DESCRIPTION_BYTES])

        def part(name: str) -> Part:
            info = infos[name]
            return Part(name, info.shape, _dtype_of(info), lambda index: self._read_small_tensor(info)[index])

        facts: dict[str, TensorFacts] = {}
        for name in names:
            nbytes = sum(infos[part].nbytes for part in groups[name].values())
            tensor = self._weights.tensor(name, part)
            if tensor is None:
                facts[name] = TensorFacts(infos[name].shape, _dtype_of(infos[name]), None, nbytes)
            else:
                coded = tensor if isinstance(tensor, PackedTensor) else None
                layout = coded.experts[0][0].layout if coded is not None else None
                across = coded is not None and coded.transposed
                facts[name] = TensorFacts(tuple(tensor.shape), tensor.dtype, layout, nbytes, across)
        return facts

    def file_bytes(self, names: Iterable[str]) -> int:
        stored = [part for name in names for part in self._weights.groups[name].values()]
        infos = self._infos(stored)
        return sum(infos[part].nbytes for part in stored)

    def are_here(self, names: Iterable[str]) -> bool:
        stored = [part for name in names for part in self._weights.groups[name].values()]
        if self.folder is not None:
            return self.folder.holds(stored)
        return all(self.local_file(file) is not None for file in {self._weight_map[name] for name in stored})

    @contextmanager
    def load_tensors(
        self, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None = None
    ) -> Iterator[dict[str, Any]]:
        groups = self._weights.groups
        stored = [part for name in names.values() for part in groups[name].values()]
        if self.folder is not None:
            self.folder.supply(stored)
        shards = {shard: self._download(shard) for shard in sorted({self._weight_map[name] for name in stored})}
        infos = self._infos(stored)
        read = ReadBytes(progress)
        tensors: dict[str, LazyTensor] = {}
        converted: list[Numbers] = []
        with ExitStack() as files:
            slices = self._slices(files, shards, stored)  # slices can be read after the files are closed

            def part(name: str) -> Part:
                return Part(name, infos[name].shape, _dtype_of(infos[name]), slices[name].__getitem__)

            for given, name in names.items():
                nbytes = sum(infos[part].nbytes for part in groups[name].values())
                read.total += nbytes
                tensor = self._weights.tensor(name, part)
                if tensor is None:
                    tensors[given] = _plain(name, slices[name], infos[name], dtype, read)
                    continue
                if isinstance(tensor, Numbers):
                    converted.append(tensor)
                tensors[given] = _quantized(tensor, nbytes, read)
            if converted:
                size = sum(math.prod(numbers.shape) for numbers in converted) * dtype.itemsize
                log.warning(
                    "%d weights of %s cannot be held as they are stored (%s): as numbers they take %.0f MiB",
                    len(converted),
                    self.name,
                    converted[0].why,
                    size / 2**20,
                )
            yield tensors

    def told_config(self) -> str:
        try:
            values = json.loads(self._config_file.read_text(encoding="utf-8"))
            return json.dumps(_without_notes(values), sort_keys=True)
        except (OSError, ValueError, RecursionError) as error:
            raise ModelNotFound(f"the config of {self.source} cannot be read: download it again") from error

    def tensor_locations(self) -> Mapping[str, TensorLocation]:
        return self._infos(self._weight_map)

    def file_heads(self) -> Mapping[str, int]:
        return {}  # headers of safetensors files describe only tensors

    @property
    def commit(self) -> str:
        if self._path is None:
            snapshot = self._config_file.parent
            if snapshot.parent.name == "snapshots":
                return f"{self.name}@{snapshot.name}"
        return ""

    def local_file(self, file: str) -> Path | None:
        if self._path is not None:
            return self._path / file
        cached = try_to_load_from_cache(self.name, file, revision=self._revision)
        return Path(cached) if isinstance(cached, str) else None

    def open_file(self, file: str, block_size: int = 2**16) -> BinaryIO:
        """See `TensorStore.open_file`. `block_size`: bytes that are fetched from the hub in addition to those that are
        read."""
        try:
            path = self.local_file(file)
            if path is not None:
                return path.open("rb")
            remote = HfFileSystem().open(f"{self.name}/{file}", "rb", revision=self._revision, block_size=block_size)
            return cast(BinaryIO, remote)
        except OSError as error:
            raise ModelNotFound(f"{self.name} lacks {file}: download it again, or check the network") from error

    def tokenizer(self) -> Any:
        with replace_library_errors(
            lambda why: ModelNotFound(f"{self.name} has no usable tokenizer: add its tokenizer files ({why})")
        ):
            return AutoTokenizer.from_pretrained(self.source, trust_remote_code=False, **self._options)

    def processor(self) -> Any:
        with replace_library_errors(
            lambda why: ModelNotFound(
                f"{self.name} has no usable processor of images: add its processor files, and install torchvision "
                f"where transformers asks for it ({why})"
            )
        ):
            return AutoProcessor.from_pretrained(self.source, trust_remote_code=False, **self._options)

    @property
    def reads_images(self) -> bool:
        return reads_images(self.config)

    def with_towers(self) -> SafetensorsStore:
        return self

    def generation_config(self) -> GenerationConfig | None:
        with replace_library_errors(
            lambda why: UnsupportedModel(
                f"{_GENERATION} of {self.name} cannot be read by transformers: download it again, or remove it ({why})"
            )
        ):
            try:
                return GenerationConfig.from_pretrained(self.source, **self._options)
            except OSError:
                file = self.local_file(_GENERATION)
                if file is not None and file.is_file():
                    raise
                return None

    @property
    def _options(self) -> dict[str, Any]:
        """Further arguments, besides `source`, of `from_pretrained` methods."""
        return {} if self._revision is None else {"revision": self._revision}

    @cached_property
    def _weight_map(self) -> Mapping[str, str]:
        """Name of each tensor -> file name of the shard that holds it."""
        index = self.find_file(INDEX_FILE)
        if index is not None:
            try:
                weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                known = all(isinstance(shard, str) and _FILE_NAME.fullmatch(shard) for shard in weight_map.values())
                if known and all(len(name) <= MOST_OF_NAME for name in weight_map):
                    return weight_map
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                pass
            raise ModelNotFound(
                f"{INDEX_FILE} of {self.name} does not name, for each tensor, a file in the same folder: "
                "download it again"
            )
        try:
            with self.open_file(SINGLE_FILE) as file:
                return dict.fromkeys(read_places(file, SINGLE_FILE), SINGLE_FILE)
        except ModelNotFound as error:
            raise ModelNotFound(
                f"{self.name} holds no safetensors: convert it with transformers' save_pretrained"
            ) from error

    def _infos(self, names: Iterable[str]) -> dict[str, TensorLocation]:
        """The locations of these tensors and of all other tensors in their shards, from the headers of the shards.
        Raises ModelNotFound: a shard lacks a tensor, because the index belongs to other shards."""
        names = list(names)
        infos: dict[str, TensorLocation] = {}
        for shard in sorted({self._weight_map[name] for name in names}):
            if shard not in self._headers:
                with self.open_file(shard) as file:
                    self._headers[shard] = read_places(file, shard)
            infos.update(self._headers[shard])
        for name in names:
            shard = self._weight_map[name]
            if name not in infos or infos[name].file != shard:
                raise ModelNotFound(
                    f"{shard} of {self.name} lacks {name}, which {INDEX_FILE} assigns to it: download both again"
                )
        return infos

    def _read_small_tensor(self, info: TensorLocation) -> torch.Tensor:
        """Reads a small tensor."""
        if self.folder is not None:
            self.folder.supply([name for name, one in self._headers[info.file].items() if one == info])
        try:
            with self.open_file(info.file, block_size=1) as file:
                file.seek(info.offset)
                data = bytearray(file.read(info.nbytes))
        except OSError as error:
            raise ModelNotFound(f"{info.file} of {self.name} cannot be read: check the network") from error
        if len(data) != info.nbytes:
            raise ModelNotFound(f"{info.file} of {self.name} is not complete: download it again")
        return torch.frombuffer(data, dtype=_dtype_of(info)).view(info.shape)

    def _download(self, shard: str) -> Path:
        """The local path of a shard, whose header is read again."""
        path = self.find_file(shard)
        if path is None:
            raise ModelNotFound(f"{self.name} lacks {shard}, which holds tensors that are needed: download it again")
        with path.open("rb") as raw:
            self._headers[shard] = read_places(raw, shard)
        return path

    def _slices(self, files: ExitStack, shards: Mapping[str, Path], names: Iterable[str]) -> dict[str, Any]:
        """Objects that read the tensors of these shards."""
        opened: dict[str, Any] = {}
        slices: dict[str, Any] = {}
        for name in names:
            shard = self._weight_map[name]
            try:
                if shard not in opened:
                    opened[shard] = files.enter_context(safe_open(shards[shard], framework="pt", device="cpu"))
                slices[name] = opened[shard].get_slice(name)
            except SafetensorError as error:
                raise ModelNotFound(
                    f"{shard} of {self.name} is not complete, or is damaged ({error}): download it again"
                ) from error
        return slices

    def find_file(self, file: str) -> Path | None:
        """The local path of a file, downloaded if it is on the hub; None: there is no such file. Raises ModelNotFound:
        the hub refuses the file."""
        if self._path is not None:
            path = self._path / file
            return path if path.is_file() else None
        cached: Any = None
        try:
            cached = try_to_load_from_cache(self.name, file, revision=self._revision)
            if not isinstance(cached, str):
                self._check_that_hub_answers(file)
            return Path(hf_hub_download(self.name, file, revision=self._revision))
        except GatedRepoError as error:
            raise ModelNotFound(
                f"the licence of {self.name} must be accepted: accept it on the model's page, then run 'hf auth login'"
            ) from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if cached is not None:  # the cache knows that the hub has no such file
                return None
            raise ModelNotFound(
                f"{self.name} is neither a folder here nor in the cache, and the hub cannot be reached: check the "
                "name and the network"
            ) from error
        except EntryNotFoundError:
            return None
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise ModelNotFound(
                f"there is neither a folder nor a Hugging Face model {self.name!r}: check the name, or log in with "
                "'hf auth login' if it is private"
            ) from error
        except HfHubHTTPError as error:
            raise ModelNotFound(f"the hub refuses {self.name}: {error}") from error

    def _check_that_hub_answers(self, file: str) -> None:
        """Asks the hub once, because a download would try to connect for half a minute. The download handles the hub's
        answer. Raises LocalEntryNotFoundError: the hub cannot be reached."""
        if self._hub_answers:
            return
        try:
            get_hf_file_metadata(hf_hub_url(self.name, file, revision=self._revision))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
            pass
        except Exception as error:  # an exception of the HTTP library, which depends on the version of huggingface_hub
            raise LocalEntryNotFoundError(f"the hub cannot be reached ({error})") from error
        self._hub_answers = True


def _is_path(model: str) -> bool:
    """Whether `model`, which is not an existing folder, was meant as a path of this system or of Windows: hub ids do
    not look like paths."""
    return model.startswith((".", "/", "~")) or "\\" in model or model[1:2] == ":"


def _plain(name: str, stored: Any, place: TensorLocation, dtype: torch.dtype, read: ReadBytes) -> LazyTensor:
    def of(index: Any) -> torch.Tensor:
        tensor: torch.Tensor = stored[index]
        if tensor.dtype != dtype or not _KEPT_IN_FILE.search(name):
            return _taken(tensor, dtype, read)
        read.add(tensor.nbytes)
        return tensor

    return LazyTensor(place.shape, _dtype_of(place), of)


def _taken(tensor: torch.Tensor, dtype: torch.dtype, read: ReadBytes) -> torch.Tensor:
    """Counts a tensor as read. A tensor that keeps its type is copied, because it would keep the file mapped."""
    if tensor.dtype == dtype:
        tensor = tensor.clone()
    read.add(tensor.nbytes)
    return tensor


def _quantized(tensor: Numbers | PackedTensor, nbytes: int, read: ReadBytes) -> LazyTensor:
    def of(index: Any) -> torch.Tensor:
        whole = tensor.read() if isinstance(tensor, Numbers) else tensor
        found = whole if index is ... else whole[index]
        read.add(nbytes)
        return found

    return LazyTensor(tensor.shape, tensor.dtype, of)


def _without_notes(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_notes(one) for one in cast("list[Any]", values)]
    if not isinstance(values, dict):
        return values
    told = {key: _without_notes(one) for key, one in cast("dict[str, Any]", values).items() if key not in _NOTES}
    if "torch_dtype" in told:  # the former name of `dtype`
        told.setdefault("dtype", told.pop("torch_dtype"))
    return told


def _quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization of a checkpoint's weights, from its config; None: the weights are plain numbers. `config`: the
    config file of the whole checkpoint. In some multimodal configs, the config of the text model has the
    quantization."""
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    for place in (config, *nested):
        for key in _QUANTIZATION_KEYS:
            if isinstance(place.get(key), Mapping) and place[key]:
                return place[key]
    return None


def _quantized_format(settings: Mapping[str, Any], family: str) -> QuantizedFormat:
    """The format that settings describe. `family`: the family of the text model. Raises UnsupportedModel: the format,
    or one of its options, is unknown."""
    method = str(settings.get("quant_method") or "").lower()
    if method == "bitsandbytes" or (not method and settings.get("load_in_4bit")):
        return Nf4() if settings.get("load_in_4bit") else Int8()
    if not method and {"bits", "group_size"} <= settings.keys():
        return Mlx(settings, family)
    if method in _FORMATS:
        try:
            return _FORMATS[method](settings)
        except MALFORMED as error:
            raise UnsupportedModel(
                f"the config does not say clearly how weights are quantized ({error!r}): download it again"
            ) from error
    by = repr(method) if method else "a method that the config does not name"
    raise UnsupportedModel(
        f"weights quantized by {by} are not known: take a checkpoint with plain weights, in GGUF, or quantized by one "
        f"of {', '.join(sorted(_FORMATS))}, bitsandbytes, MLX"
    )
