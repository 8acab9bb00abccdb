"""A stand-in for a GPU on every machine: a device that refuses operations that mix its tensors with CPU tensors.

The device computes on the CPU, so that results are equal. With it, tests find tensors that were made, or left, on the
wrong device. torch allows one device written in Python, `privateuseone`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.utils.backend_registration as backends
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing

OTHER = torch.device("privateuseone", 0)

_aten: Any = torch.ops.aten
_BETWEEN = {_aten.copy_, _aten._to_copy, _aten._copy_from, _aten._copy_from_and_resize}
"""Operations that accept tensors of both devices."""

_INDEXED = {_aten.index, _aten.index_put_, _aten.index_put, _aten._index_put_impl_, _aten._unsafe_index}
"""Operations that accept indices on the CPU, also on a GPU."""


class _Other(torch.Tensor):
    """A tensor of the other device, whose values are in a CPU tensor."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> _Other:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=OTHER,
        )
        made.on_cpu = on_cpu
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return args[0].on_cpu.tolist()
        if func is torch.Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, "device": OTHER, **(kwargs or {})})
        # The operations inside this function check the device.
        if func is torch.nn.functional.scaled_dot_product_attention and not torch.is_grad_enabled():
            return _run(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"on the other device: {self.on_cpu!r}"


@torch.inference_mode(False)  # Otherwise, views of these tensors would have no versions.
@torch.no_grad()
def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet = getattr(func, "overloadpacket", func)
    if packet not in _BETWEEN:
        for place, value in enumerate((*args, *kwargs.values())):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                index = packet in _INDEXED and place == 1
                if isinstance(one, torch.Tensor) and not isinstance(one, _Other) and one.ndim and not index:
                    raise RuntimeError(f"{func}: expected all tensors to be on the same device, found a {one.device}")
    there = torch.device(kwargs.get("device") or OTHER).type == OTHER.type
    given = {name: torch.device("cpu") if name == "device" and there else value for name, value in kwargs.items()}
    if packet is _aten.histc and not args[0].is_floating_point():  # GPUs accept integers here, too.
        return _run(func, (args[0].double(), *args[1:]), kwargs).to(args[0].dtype)
    found = func(*_each(_inside, args), **{name: _each(_inside, value) for name, value in given.items()})
    if packet is _aten.copy_ and not isinstance(args[0], _Other):
        return args[0]
    if not there:
        return found
    found = _each(_outside, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if isinstance(func, torch._ops.OpOverload) else found


def _inside(value: Any) -> Any:
    return value.on_cpu if isinstance(value, _Other) else value


def _outside(value: Any) -> Any:
    return _Other(value) if type(value) is torch.Tensor else value


def _each(change: Callable[[Any], Any], values: Any) -> Any:
    """Applies `change` to arguments or results, in place of torch's `tree_map`, which took a third of the time of all
    these tests."""
    return type(values)(_each(change, value) for value in values) if type(values) in (list, tuple) else change(values)


@cache
def add_other_device() -> torch.device:
    """Adds the device to torch, for the rest of the process."""
    # Without a name, torch computes no gradients for the device.
    backends._setup_privateuseone_for_python_backend("standin")
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    _kept.append(library)
    plain: Any = torch.tensor
    _device_constructors()  # The call caches torch's own constructors.

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        made = plain(data, device=None if device == OTHER else device, **options)
        return made.to(OTHER) if device == OTHER else made

    torch.tensor = tensor  # `torch.tensor` bypasses registered operations.
    storage: Any = torch.Tensor.untyped_storage
    torch.Tensor.untyped_storage = lambda self: storage(_inside(self))
    return OTHER


_kept: list[object] = []
