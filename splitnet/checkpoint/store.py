"""The interface of the files of a checkpoint, which safetensors and GGUF files implement."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from transformers import GenerationConfig, PreTrainedConfig

from splitnet.checkpoint.transfer.weight_pieces import TensorFiles, WeightFolder
from splitnet.quant.packed_tensor import CodeLayout

# Maximum characters in the name of a tensor. Names are bounded because regular expressions match them.
MOST_OF_NAME = 512
Progress = Callable[[int, int], None]  # called with (bytes done, bytes in all); from several threads, one at a time


@dataclass(frozen=True)
class TensorFacts:
    """Facts about one tensor of a checkpoint, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # the stored type; for codes, the type of the tensor that is read
    layout: CodeLayout | None  # layout of the codes; None for plain numbers
    nbytes: int  # bytes in the files, with scales and zeros
    transposed: bool = False  # codes lie along the second to last dimension

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Bytes of the tensor after loading as numbers of type `dtype` (None: as stored)."""
        if dtype is None or not self.dtype.is_floating_point:
            return self.nbytes
        return math.prod(self.shape) * dtype.itemsize


class TensorStore(TensorFiles, Protocol):
    """The files of one checkpoint.

    Names are logical: the names in a checkpoint of the family with plain weights. A quantized weight, which may be
    several tensors in the files, is one tensor with one name.
    """

    name: str  # hub id, or name of the folder or file
    source: str  # hub id or path
    # A folder that fetches bytes before they are read; None: all bytes are in the files, or on the hub.
    folder: WeightFolder | None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config of the whole checkpoint, without its description of quantization. Raises ModelNotFound: the config
        cannot be read; UnsupportedModel: transformers does not know the architecture."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether weights may be in few bits. If so, only headers give the bytes of weights; otherwise config and type
        do."""
        ...

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of all tensors. Raises ModelNotFound: there are none; UnsupportedModel: their quantization is
        unknown."""
        ...

    def tensor_facts(self, names: Iterable[str]) -> dict[str, TensorFacts]:
        """The facts about tensors, from headers only."""
        ...

    def file_bytes(self, names: Iterable[str]) -> int:
        """The bytes of tensors in the files, from headers only, without reading descriptions of codes."""
        ...

    def are_here(self, names: Iterable[str]) -> bool:
        """Whether all bytes of these tensors are on this machine, so that reading them downloads nothing."""
        ...

    def load_tensors(
        self, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None = None
    ) -> AbstractContextManager[dict[str, Any]]:
        """Opens tensors for reading; from the hub, downloads the files that hold them. names: name to give a tensor ->
        its name in the checkpoint. dtype: the type to which the reader will convert the tensors.

        Returns a context: given name -> an object whose `[...]` reads the tensor. The result does not need the files,
        or is a `PackedTensor` whose matrices keep them mapped.
        """
        ...

    def told_config(self) -> str:
        """The part of the config that distinguishes models, as JSON; it does not depend on the version of
        transformers."""
        ...

    @property
    def commit(self) -> str:
        """Hub id and commit, which always identify the same files; empty: unknown, or not from the hub."""
        ...

    def find_file(self, file: str) -> Path | None:
        """The local path of a file beside the weights, downloaded if it is on the hub; None: there is no such file.
        Raises ModelNotFound: the hub refuses the file."""
        ...

    def open_file(self, file: str) -> BinaryIO:
        """Opens a file to read parts of it; from the hub, without downloading the whole file. Raises ModelNotFound:
        there is no such file, or the hub does not answer."""
        ...

    def tokenizer(self) -> Any:
        """The tokenizer of the checkpoint. Raises ModelNotFound: it has none."""
        ...

    def processor(self) -> Any:
        """transformers' processor of texts and images. Raises ModelNotFound: the checkpoint has none."""
        ...

    @property
    def reads_images(self) -> bool:
        """Whether the model has towers for images, here or in a file beside it."""
        ...

    def with_towers(self) -> TensorStore:
        """The files with the towers for images; `config` is then that of the model that reads images. See
        `Checkpoint.with_towers`."""
        ...

    def generation_config(self) -> GenerationConfig | None:
        """The checkpoint's defaults for generation; None: it has none."""
        ...


def projector_files(folder: Path) -> list[Path]:
    """llama.cpp's files of vision towers with their projectors in a folder, by the names that they are published
    with."""
    return sorted(file for file in folder.glob("*.gguf") if "mmproj" in file.name.lower())


class ReadBytes:
    """Counts the bytes that several threads read of tensors, and reports them. `total`: bytes to read."""

    def __init__(self, progress: Progress | None) -> None:
        self.total = 0
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0

    def add(self, nbytes: int) -> None:
        """Counts bytes as read."""
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self.total)


class LazyTensor:
    """One tensor in the files, with the interface that transformers' loading expects: `tensor[...]` reads it. `read`:
    called with an index, once per use; its result does not need the files, or is a `PackedTensor`."""

    def __init__(self, shape: Iterable[int], dtype: torch.dtype, read: Callable[[Any], torch.Tensor]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._read = read

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read(index)
