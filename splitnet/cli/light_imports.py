"""Imports transformers' models without what they bring along and a command of this package never uses.

This is a workaround: `tests/unit/test_light_imports.py` says when it can go. It is done only in processes that belong to
a command, so that programs that use the library have transformers as it is.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Final

ABSENT: Final = {
    "is_torch_distributed_available": "torch.distributed.tensor, and sympy",
    "is_torch_flex_attn_available": "torch._dynamo and torch._inductor",
    "is_scipy_available": "scipy.optimize, for losses of object detection",
}
"""What transformers is told not to be here, as it may well be, and what that saves."""


def import_models() -> None:
    """Imports what all models of transformers need; does nothing if that has been done."""
    if "transformers.modeling_utils" in sys.modules or "torch._dynamo" in sys.modules:
        return
    torch: Any = importlib.import_module("torch")
    for module in ("transformers.utils.import_utils", "transformers.utils"):
        utils: Any = importlib.import_module(module)
        for name in ABSENT:
            setattr(utils, name, _no)
    # Functions are marked for torch's compiler, which is imported to mark them.
    stand_ins: dict[str, Any] = {name: ModuleType(name) for name in ("torch._dynamo", _INDICES)}
    marks, indices = stand_ins.values()
    marks.allow_in_graph = marks.assume_constant_result = lambda function: function
    marks.disable = lambda function, *_, **__: function or (lambda function: function)
    indices.TransformGetItemToIndex = _indices
    sys.modules.update(stand_ins)
    vars(torch)["_dynamo"] = marks
    try:
        for module in ("modeling_utils", "masking_utils"):
            importlib.import_module(f"transformers.{module}")
    finally:
        del vars(torch)["_dynamo"]  # torch imports the true one when it is asked for
        for name in stand_ins:
            del sys.modules[name]


def _no() -> bool:
    return False


def _indices() -> Any:
    return importlib.import_module(_INDICES).TransformGetItemToIndex()


_INDICES: Final = "torch._dynamo._trace_wrapped_higher_order_op"
