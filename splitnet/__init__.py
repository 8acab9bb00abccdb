"""splitnet: run a model that is too big for one device across many devices, and tune its prompts."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitnet.version import __version__

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoProcessor",
    "AutoTokenizer",
    "__version__",
]

if TYPE_CHECKING:
    from splitnet.hf.causal_lm import AutoModelForCausalLM, AutoTokenizer
    from splitnet.hf.classifier import AutoModelForSequenceClassification
    from splitnet.hf.image_text import AutoModelForImageTextToText, AutoProcessor


def foreign_modules() -> list[str]:
    """A warning for each module of another project that hides splitnet's `scheduler` or `peers`."""
    sentences: list[str] = []
    for name in ("scheduler", "peers"):
        try:
            spec = find_spec(name)
        except ValueError:  # a module without a spec, made by a program
            spec = None
        if spec is None and name not in sys.modules:
            continue
        file = "a module without a file"
        if spec is not None:
            file = spec.origin or next(iter(spec.submodule_search_locations or ()), file)
        try:
            is_ours = "splitnet" in Path(file).read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, ValueError):
            is_ours = False
        if not is_ours:
            sentences.append(
                f"`import {name}` finds {file}, which is not part of splitnet: install splitnet in an environment of "
                "its own, and start it in a folder without a module of this name (docs/install.md)"
            )
    return sentences


for _sentence in foreign_modules():
    warnings.warn(_sentence, RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, so they are imported only when the library is used.
    if name in ("AutoModelForCausalLM", "AutoTokenizer"):
        from splitnet.hf import causal_lm

        return getattr(causal_lm, name)
    if name in ("AutoModelForImageTextToText", "AutoProcessor"):
        from splitnet.hf import image_text

        return getattr(image_text, name)
    if name == "AutoModelForSequenceClassification":
        from splitnet.hf.classifier import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification
    raise AttributeError(f"module 'splitnet' has no attribute {name!r}")
