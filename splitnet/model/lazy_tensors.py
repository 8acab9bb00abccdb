"""Tensors of a checkpoint that are read from disk only when they are used."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from splitnet.errors import ModelNotFound
from splitnet.model.quantized_format import Numbers, Part, Weights
from splitnet.model.shards import Shards, TensorInfo, read_tensor_infos
from splitnet.model.stored import StoredTensor
from splitnet.model.tensor_store import Progress, ReadBytes

log = logging.getLogger(__name__)


class LazyTensors:
    """A state dict that reads each tensor when it is indexed; use it in a `with`."""

    def __init__(
        self, shards: Shards, weights: Weights, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None
    ) -> None:
        self._shards = shards
        self._weights = weights
        self._names = names
        self._dtype = dtype
        self._files = ExitStack()
        self._read = ReadBytes(progress)

    def __enter__(self) -> dict[str, Any]:
        stored = {part for name in self._names.values() for part in self._weights.groups[name].values()}
        infos, slices = self._open(stored)

        def part(name: str) -> Part:
            return Part(name, infos[name].shape, infos[name].dtype, slices[name].__getitem__)

        tensors: dict[str, Any] = {}
        converted: list[Numbers] = []
        for given, name in self._names.items():
            nbytes = sum(infos[stored].nbytes for stored in self._weights.groups[name].values())
            self._read.total += nbytes
            tensor = self._weights.tensor(name, part)
            if tensor is None:
                tensors[given] = _LazyTensor(slices[name], infos[name].shape, infos[name].dtype, self.take)
            elif isinstance(tensor, Numbers):
                converted.append(tensor)
                tensors[given] = _LazyTensor(
                    _Whole(tensor.read), tensor.shape, tensor.dtype, lambda read, n=nbytes: self._counted(read, n)
                )
            else:
                tensors[given] = _LazyTensor(
                    tensor, tuple(tensor.shape), tensor.dtype, lambda read, n=nbytes: self._counted(read, n)
                )
        if converted:
            size = sum(math.prod(numbers.shape) for numbers in converted) * self._dtype.itemsize
            log.warning(
                "%d weights of %s cannot be held as they are stored (%s): as numbers they take %.0f MiB",
                len(converted),
                self._shards.name,
                converted[0].why,
                size / 2**20,
            )
        return tensors

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor as read; one that keeps its type is copied, or it would stay on the mapped file."""
        if tensor.dtype == self._dtype:
            tensor = tensor.clone()
        return self._counted(tensor, tensor.nbytes)

    def _counted(self, tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
        self._read.add(nbytes)
        return tensor

    def _open(self, names: set[str]) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        """What the headers say of tensors in the files, and what reads them; that outlives this state dict."""
        by_shard: dict[str, list[str]] = {}
        for name in sorted(names):
            by_shard.setdefault(self._shards.weight_map[name], []).append(name)
        infos: dict[str, TensorInfo] = {}
        slices: dict[str, Any] = {}
        for shard, held in by_shard.items():
            path = self._shards.download(shard)
            with path.open("rb") as raw:
                infos.update(read_tensor_infos(raw, shard))
            self._shards.check_hold(held, infos)
            try:
                file = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
                slices.update({name: file.get_slice(name) for name in held})
            except SafetensorError as error:
                raise ModelNotFound(
                    f"{shard} of {self._shards.name} is not complete, or is damaged ({error}): download it again"
                ) from error
        return infos, slices


class _LazyTensor:
    """One tensor on disk, as transformers' loading expects it: `tensor[...]` reads it."""

    def __init__(
        self,
        stored: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        take: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._stored = stored
        self._take = take
        self.shape = torch.Size(shape)
        self.dtype = dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index is ... and isinstance(self._stored, StoredTensor):
            return self._take(self._stored)
        return self._take(self._stored[index])


class _Whole:
    """What is read as a whole, whatever part is asked for."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read()[index]
