"""splitnet: run a model that is too big for any one device across many, and tune prompts for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitnet.version import __version__

__all__ = ["AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer", "__version__"]

if TYPE_CHECKING:
    from splitnet.hf.causal_lm import AutoModelForCausalLM, AutoTokenizer
    from splitnet.hf.classifier import AutoModelForSequenceClassification


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only who uses the library pays.
    if name == "AutoModelForCausalLM":
        from splitnet.hf.causal_lm import AutoModelForCausalLM

        return AutoModelForCausalLM
    if name == "AutoModelForSequenceClassification":
        from splitnet.hf.classifier import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification
    if name == "AutoTokenizer":
        from splitnet.hf.causal_lm import AutoTokenizer

        return AutoTokenizer
    raise AttributeError(f"module 'splitnet' has no attribute {name!r}")
