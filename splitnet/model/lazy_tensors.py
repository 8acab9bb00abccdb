"""Tensors of a checkpoint that are read from disk only when they are used."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open

from splitnet.model.shards import Shards, TensorInfo, read_tensor_infos
from splitnet.model.tensor_store import Progress, ReadBytes


class LazyTensors:
    """A state dict that reads each tensor when it is indexed; use it in a `with`."""

    def __init__(self, shards: Shards, names: Mapping[str, str], dtype: torch.dtype, progress: Progress | None) -> None:
        self._shards = shards
        self._names = names
        self._dtype = dtype
        self._files = ExitStack()
        self._read = ReadBytes(progress)

    def __enter__(self) -> dict[str, Any]:
        by_shard: dict[str, list[tuple[str, str]]] = {}
        for given, name in self._names.items():
            by_shard.setdefault(self._shards.weight_map[name], []).append((given, name))
        tensors: dict[str, Any] = {}
        for shard, names in by_shard.items():
            path = self._shards.download(shard)
            with path.open("rb") as raw:
                infos = read_tensor_infos(raw, shard)
            file = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
            for given, name in names:
                tensors[given] = _LazyTensor(self, file.get_slice(name), infos[name])
                self._read.total += infos[name].nbytes
        return tensors

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor as read; one that keeps its type is copied, or it would stay on the mapped file."""
        if tensor.dtype == self._dtype:
            tensor = tensor.clone()
        self._read.add(tensor.nbytes)
        return tensor


class _LazyTensor:
    """One tensor on disk, as transformers' loading expects it: `tensor[...]` reads it."""

    def __init__(self, loading: LazyTensors, stored: Any, info: TensorInfo) -> None:
        self._loading = loading
        self._stored = stored
        self._info = info

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._info.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._info.dtype

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def get_dtype(self) -> str:
        return self._info.stored

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._loading.take(self._stored[index])
