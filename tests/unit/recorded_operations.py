"""Recorded graphs without a GPU: torch's operations are logged, and run again in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from splitnet.blocks.fast.graph_step import Recording

Result = TypeVar("Result")


class OperationRecorder:
    """Like a recorder of CUDA graphs: numbers and addresses stay as recorded, and a replay overwrites all results.

    Attributes:
        recordings: number of recordings.
        replays: number of replays of all recordings.
        fails: number of replays that succeed before all later ones fail; None: no replay fails.
        spoils: an error that is added to the last result of each replay.
    """

    def __init__(self, *, fails: int | None = None, spoils: float = 0.0) -> None:
        self.recordings = self.replays = 0
        self.fails = fails
        self.spoils = spoils

    def record(self, work: Callable[[], Result]) -> Recording[Result]:
        with _Log() as log:
            result = work()
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            if self.fails is not None and self.replays > self.fails:
                raise RuntimeError("the driver is gone")
            log.replay(self.spoils)

        return Recording(result, replay)


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        """The operation, its arguments, and its results that have their own memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(result) if _address(tensor) not in given]
        self._done.append((func, args, kwargs or {}, made))
        return result

    def replay(self, spoils: float) -> None:
        made = [tensor for _, _, _, results in self._done for tensor in results]
        for tensor in made:  # Results of the last run must not be used by a replay.
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        for func, args, kwargs, results in self._done:
            again = func(*args, **kwargs)
            for old, new in zip(results, _tensors(again), strict=False):
                old.copy_(new)
        if spoils:
            made[-1].add_(spoils)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
