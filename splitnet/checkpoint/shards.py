"""The files of a checkpoint, in a folder or on the hub: found, downloaded one by one, or read by range."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
)

from splitnet.errors import ModelNotFound, UnsupportedModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MERGED_BYTES = 2**16
"""Ranges of a shard that are no farther apart than this are read in one request."""
REQUESTS_AT_ONCE = 16
_MAX_HEADER_BYTES = 100_000_000
MOST_OF_NAME = 512
"""Characters in the name of a tensor: names are matched with patterns."""
_MOST_DIMENSIONS = 8
_MOST_BYTES = 1 << 60
_FILE_NAME = re.compile(r"[^/\\\x00]+\.safetensors")
"""An index names files beside it, and nothing elsewhere on the machine."""
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


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard, as the shard's header describes it.

    Attributes:
        shard: file name.
        stored: name of its type in the safetensors format.
        offset: of its first byte in the file.
    """

    shard: str
    stored: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES.get(self.stored, torch.uint8)


def read_tensor_infos(file: BinaryIO, shard: str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header alone.

    Format: https://github.com/huggingface/safetensors#format

    Raises:
        UnsupportedModel: it is not a safetensors file.
    """
    try:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _MAX_HEADER_BYTES:
            raise ValueError("header too long")
        header = json.loads(file.read(size))
        if any(len(name) > MOST_OF_NAME for name in header):
            raise ValueError("names without end")
        return {
            name: _tensor_info(shard, 8 + size, **entry) for name, entry in header.items() if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModel(f"{shard} is not a safetensors file: download or convert it again") from error


def _tensor_info(shard: str, begin: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> TensorInfo:
    """Raises ValueError for what no tensor can be; `begin`: of the data in the file."""
    start, end = data_offsets
    if len(shape) > _MOST_DIMENSIONS or max((*shape, end), default=0) > _MOST_BYTES:
        raise ValueError("sizes of nothing that there is")
    if any(type(number) is not int or number < 0 for number in (*shape, start, end - start)) or type(dtype) is not str:
        raise ValueError("numbers that are none")
    if dtype in _DTYPES and end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError("a tensor of another size")
    return TensorInfo(shard, dtype, tuple(shape), begin + start, end - start)


class Shards:
    """The safetensors files of one checkpoint.

    Attributes:
        name: hub id, or the name of the folder.
        source: what transformers' `from_pretrained` methods accept.
        revision: of the hub repository; None for a folder.
    """

    def __init__(self, name: str, folder: Path | None, revision: str | None) -> None:
        self.name = name
        self.revision = revision
        self._folder = folder
        self._hub_answers = False
        self.source = name if folder is None else str(folder)

    @property
    def options(self) -> dict[str, Any]:
        """What `from_pretrained` methods must be told besides `source`."""
        return {} if self.revision is None else {"revision": self.revision}

    @classmethod
    def open(cls, model: str | Path, revision: str | None) -> Shards:
        """Finds a local folder or a hub repository.

        Raises:
            ModelNotFound: there is no such folder.
        """
        folder = Path(model).expanduser()
        if folder.is_dir():
            shards = cls(folder.resolve().name, folder, None)
        elif isinstance(model, Path) or _is_path(model):
            raise ModelNotFound(f"there is no folder {model}: give a checkpoint folder or a Hugging Face id")
        else:
            shards = cls(model, None, revision)
        return shards

    @cached_property
    def weight_map(self) -> Mapping[str, str]:
        """Name of each tensor -> file name of the shard that holds it."""
        index = self._find(INDEX_FILE)
        if index is not None:
            try:
                weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                known = all(isinstance(shard, str) and _FILE_NAME.fullmatch(shard) for shard in weight_map.values())
                if known and all(len(name) <= MOST_OF_NAME for name in weight_map):
                    return weight_map
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                pass
            raise ModelNotFound(
                f"{INDEX_FILE} of {self.name} does not say which file holds which tensor, or names one elsewhere: "
                "download it again"
            )
        try:
            with self.open_range(SINGLE_FILE) as file:
                return dict.fromkeys(read_tensor_infos(file, SINGLE_FILE), SINGLE_FILE)
        except ModelNotFound as error:
            raise ModelNotFound(
                f"{self.name} holds no safetensors: convert it with transformers' save_pretrained"
            ) from error

    def check_hold(self, names: Iterable[str], infos: Mapping[str, TensorInfo]) -> None:
        """Refuses an index that is not about these shards.

        Args:
            names: of tensors that are needed.
            infos: all tensors of the shards that hold these.

        Raises:
            ModelNotFound: a shard lacks one.
        """
        for name in names:
            shard = self.weight_map[name]
            if name not in infos or infos[name].shard != shard:
                raise ModelNotFound(
                    f"{shard} of {self.name} lacks {name}, which {INDEX_FILE} says it holds: download both again"
                )

    @property
    def commit(self) -> str:
        """Hub id and commit, if that is known; empty: of a folder."""
        if self._folder is None:
            snapshot = self.config().parent
            if snapshot.parent.name == "snapshots":
                return f"{self.name}@{snapshot.name}"
        return ""

    def config(self) -> Path:
        """The local path of the config.

        Raises:
            ModelNotFound: there is none.
        """
        path = self._find("config.json")
        if path is None:
            raise ModelNotFound(f"{self.name} has no config.json: give a folder or id of a transformers checkpoint")
        return path

    def download(self, shard: str) -> Path:
        """The local path of a shard; from the hub it is downloaded first, if it is not in the cache.

        Raises:
            ModelNotFound: the shard is missing.
        """
        path = self._find(shard)
        if path is None:
            raise ModelNotFound(f"{self.name} lacks {shard}, which holds tensors that are needed: download it again")
        return path

    def open_range(self, shard: str, block_size: int = 2**16) -> BinaryIO:
        """Opens a shard for reading parts of it, without downloading the whole.

        Args:
            block_size: bytes that are fetched from the hub beyond those that are read.

        Raises:
            ModelNotFound: there is no such shard, or the hub does not answer.
        """
        try:
            path = self.local_file(shard)
            if path is not None:
                return path.open("rb")
            remote = self._hub.open(f"{self.name}/{shard}", "rb", revision=self.revision, block_size=block_size)
            return cast(BinaryIO, remote)
        except OSError as error:
            raise ModelNotFound(f"{self.name} lacks {shard}: download it again, or check the network") from error

    def read_ranges(self, shard: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Reads many small ranges `[start, end)` of a shard; those that a shard on the hub lacks here, in few requests.

        Ranges at most `MERGED_BYTES` apart are one request, and `REQUESTS_AT_ONCE` requests are under way at a time.

        Raises:
            ModelNotFound: there is no such shard, it ends before a range does, or the hub does not answer.
        """
        groups: list[list[tuple[int, int]]] = []
        for start, end in sorted(set(ranges)):
            if groups and start - groups[-1][-1][1] <= MERGED_BYTES:
                groups[-1].append((start, end))
            else:
                groups.append([(start, end)])

        def read(file: BinaryIO, group: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
            first = group[0][0]
            file.seek(first)
            data = file.read(max(end for _, end in group) - first)
            return {(start, end): data[start - first : end - first] for start, end in group}

        def request(group: list[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
            with self.open_range(shard, block_size=1) as file:
                return read(file, group)

        found: dict[tuple[int, int], bytes] = {}
        try:
            if self.local_file(shard) is not None:
                with self.open_range(shard) as file:
                    for group in groups:
                        found.update(read(file, group))
            else:
                with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                    for some in pool.map(request, groups):
                        found.update(some)
        except OSError as error:
            raise ModelNotFound(f"{shard} of {self.name} cannot be read: check the network") from error
        if any(len(found[start, end]) != end - start for start, end in ranges):
            raise ModelNotFound(f"{shard} of {self.name} is not complete: download it again")
        return [found[given] for given in ranges]

    def local_file(self, shard: str) -> Path | None:
        """Where a shard is on this machine; None: on the hub only."""
        if self._folder is not None:
            return self._folder / shard
        cached = try_to_load_from_cache(self.name, shard, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None

    @cached_property
    def _hub(self) -> HfFileSystem:
        return HfFileSystem()

    def _find(self, file: str) -> Path | None:
        if self._folder is not None:
            path = self._folder / file
            return path if path.is_file() else None
        cached: Any = None
        try:
            cached = try_to_load_from_cache(self.name, file, revision=self.revision)
            if not isinstance(cached, str):
                self._check_that_hub_answers(file)
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        except GatedRepoError as error:
            raise ModelNotFound(
                f"{self.name} needs its licence accepted: do so on its page, then log in with 'hf auth login'"
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
            raise ModelNotFound(f"the hub does not give {self.name}: {error}") from error

    def _check_that_hub_answers(self, file: str) -> None:
        """Asks once, where a download would try to connect for half a minute; what the hub answers is for the download.

        Raises:
            LocalEntryNotFoundError: it cannot be reached.
        """
        if self._hub_answers:
            return
        try:
            get_hf_file_metadata(hf_hub_url(self.name, file, revision=self.revision))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
            pass
        except Exception as error:  # of the HTTP library, which depends on the version of huggingface_hub
            raise LocalEntryNotFoundError(f"the hub cannot be reached ({error})") from error
        self._hub_answers = True


def _is_path(model: str) -> bool:
    """Whether a model that is no folder was meant as one, of this system or of Windows: no id of the hub looks so."""
    return model.startswith((".", "/", "~")) or "\\" in model or model[1:2] == ":"
