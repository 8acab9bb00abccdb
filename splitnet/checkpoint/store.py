"""What a checkpoint is read from: safetensors or GGUF files, behind one interface."""

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

from splitnet.checkpoint.transfer.held import TensorFiles, WeightFolder
from splitnet.quant.stored import Layout

MOST_OF_NAME = 512  # characters in the name of a tensor: names are matched with patterns
Progress = Callable[[int, int], None]  # called with (bytes done, bytes in all); from several threads, one at a time


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # that it is stored in; of codes, the type of the tensor that reading gives
    layout: Layout | None  # of codes; None for plain numbers
    nbytes: int  # in the files, with its scales and zeros
    transposed: bool = False  # codes lie along the last dimension but one

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Bytes that it takes once loaded as numbers of type `dtype` (None: as stored)."""
        if dtype is None or not self.dtype.is_floating_point:
            return self.nbytes
        return math.prod(self.shape) * dtype.itemsize


class TensorStore(TensorFiles, Protocol):
    """The files of one checkpoint.

    Names are logical: those that a checkpoint of the family with plain weights has. A quantized weight, which may be
    several tensors in the files, is one tensor with one name.
    """

    name: str  # hub id, or name of the folder or file
    source: str  # hub id or path
    folder: WeightFolder | None  # that gets bytes before they are read; None: all are in the files, or on the hub

    @cached_property
    def config(self) -> PreTrainedConfig:
        """That of the whole checkpoint, without a description of how the weights are quantized. Raises ModelNotFound:
        it cannot be read; UnsupportedModel: transformers does not know the architecture."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether weights may be in few bits: then only headers tell how many bytes they take, else config and type."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors. Raises ModelNotFound: there are none; UnsupportedModel: they are quantized in a way that is
        not known."""
        ...

    def facts(self, names: Iterable[str]) -> dict[str, TensorFacts]:
        """Reads headers only."""
        ...

    def file_bytes(self, names: Iterable[str]) -> int:
        """What tensors take in the files together. Reads headers only, and nothing that describes codes."""
        ...

    def are_here(self, names: Iterable[str]) -> bool:
        """Whether all bytes of these tensors are on this machine, so that reading them downloads nothing."""
        ...

    def load_tensors(
        self, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None = None
    ) -> AbstractContextManager[dict[str, Any]]:
        """Opens tensors for reading; from the hub, downloads the files that hold them. names: name to give a tensor ->
        its name in the checkpoint. dtype: the type that they will be converted to by the reader.

        Returns a context: given name -> what reads the tensor when it is indexed with `[...]`, and gives a tensor that
        needs the files no more, or a `PackedTensor` whose matrices keep them mapped.
        """
        ...

    def told_config(self) -> str:
        """What of the config tells models apart, as JSON: it does not depend on the version of transformers."""
        ...

    @property
    def commit(self) -> str:
        """Hub id and commit, which stand for the same files at any time; empty: not known, or not from the hub."""
        ...

    def find(self, file: str) -> Path | None:
        """The local path of a file beside the weights, downloaded if it is on the hub; None: there is no such file.
        Raises ModelNotFound: the hub does not give it."""
        ...

    def open_file(self, file: str) -> BinaryIO:
        """Opens a file for reading parts of it, from the hub without downloading the whole. Raises ModelNotFound: there
        is none, or the hub does not answer."""
        ...

    def tokenizer(self) -> Any:
        """The tokenizer that comes with the checkpoint. Raises ModelNotFound: there is none."""
        ...

    def generation_config(self) -> GenerationConfig | None:
        """The defaults for generation that come with the checkpoint."""
        ...


class ReadBytes:
    """Counts what is read of tensors, from several threads, and reports it. `total`: bytes to read."""

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
    """One tensor in the files, as transformers' loading expects it: `tensor[...]` reads it. `read`: called with an
    index, for each use; what it gives needs the files no more, or is a `PackedTensor`."""

    def __init__(self, shape: Iterable[int], dtype: torch.dtype, read: Callable[[Any], torch.Tensor]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._read = read

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read(index)
