"""Faster imports of torch and transformers, without modules that they import and splitnet does not use.

These are workarounds; `tests/unit/test_light_imports.py` says when each can be removed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, Final

from splitnet.process import ENDING

ABSENT: Final = {
    "is_torch_distributed_available": "torch.distributed.tensor, and sympy",
    "is_torch_flex_attn_available": "torch._dynamo, and torch._inductor",
    "is_scipy_available": "scipy.optimize, for losses of object detection",
}
"""Checks of transformers that are made to return False, and the imports that this saves."""

_INDICES: Final = "torch._dynamo._trace_wrapped_higher_order_op"


_claimed = False


def claim_process() -> None:
    """Marks this process as a command of splitnet; programs that use the library get transformers unchanged."""
    global _claimed
    _claimed = True


def import_models(*, signals_raise: bool = True) -> None:
    """Imports the modules that all models of transformers need, once, and only in commands of splitnet.
    signals_raise: signal handlers raise, so signals are held back until the imports have ended."""
    if not _claimed or "transformers.modeling_utils" in sys.modules:
        return
    with _signals_held() if signals_raise else nullcontext(), _collector_off():
        torch: Any = importlib.import_module("torch")
        for module in ("transformers.utils.import_utils", "transformers.utils"):
            utils: Any = importlib.import_module(module)
            for name in ABSENT:
                setattr(utils, name, lambda: False)
        late_package("transformers.models")  # its import reads the files of all families
        _import_when_asked(torch.distributed, "tensor")
        _forget_dtensors(torch)
        with _without_compiler(torch):
            for module in ("transformers.modeling_utils", "transformers.masking_utils"):
                importlib.import_module(module)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Delays a first signal: a library may catch the handler's error during an import and continue half imported."""
    arrived: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            for each in arrived:
                before[each](each, frame)

    for number in ENDING:
        if callable(handler := signal.getsignal(number)):
            before[number] = handler
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if len(arrived) == 1:
        signal.raise_signal(arrived[0])


@contextmanager
def _collector_off() -> Iterator[None]:
    """Turns garbage collection off: during imports it would walk over all imported objects again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _without_compiler(torch: Any) -> Iterator[None]:
    """Replaces the modules of torch's compiler, which transformers imports only to mark functions."""
    stand_ins: dict[str, Any] = {name: ModuleType(name) for name in ("torch._dynamo", _INDICES)}
    marks, indices = stand_ins.values()
    marks.allow_in_graph = marks.assume_constant_result = lambda function: function
    marks.disable = lambda function, *_, **__: function or (lambda function: function)
    indices.TransformGetItemToIndex = lambda: importlib.import_module(_INDICES).TransformGetItemToIndex()
    sys.modules.update(stand_ins)
    vars(torch)["_dynamo"] = marks
    try:
        yield
    finally:
        del vars(torch)["_dynamo"]  # torch imports the real module at its first use
        for name in stand_ins:
            del sys.modules[name]


def _forget_dtensors(torch: Any) -> None:
    """Makes torch look up the class `DTensor` with a stand-in: torch looks it up once, for the first
    `__torch_dispatch__`."""
    if "torch.distributed.tensor" in sys.modules:
        return

    class Asked(torch.Tensor):  # type: ignore[misc]
        @classmethod
        def __torch_dispatch__(cls, *_: Any) -> Any:
            return torch.empty(())

    stand_in: Any = ModuleType("torch.distributed.tensor")
    stand_in.DTensor = type("DTensor", (), {})
    sys.modules[stand_in.__name__] = stand_in
    try:
        torch.Tensor._make_wrapper_subclass(Asked, ()).detach()
    finally:
        del sys.modules[stand_in.__name__]


def _import_when_asked(package: Any, child: str) -> None:
    """Imports a module at its first use: other libraries rely on transformers' import of it."""

    def find(name: str) -> Any:
        if name != child:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{package.__name__}.{child}")

    package.__getattr__ = find


def late_package(name: str) -> None:
    """Lets modules of a package be imported by their full names without its `__init__`, which runs at its first use."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _LatePackage
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


class _LatePackage(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__all__", "__version__"):  # Python looks these up in every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if module := sys.modules.get(f"{self.__name__}.{name}"):  # the module is being imported
            return module
        object.__setattr__(self, "__class__", ModuleType)
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(sys.modules[self.__name__], name)
