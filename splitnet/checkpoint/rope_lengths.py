"""Finds, from a model's config, which lengths of a sequence give the same rotary frequencies."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

MAX_LENGTH = 1 << 48  # longer than all sequences


class RopeLengths:
    """The lengths of a sequence for which a model has the same rotary frequencies. In transformers, all positions of a
    call get the frequencies of the sequence's length after the call, and cached keys keep the frequencies with which
    they were rotated."""

    def __init__(self, config: PreTrainedConfig) -> None:
        kinds = _kinds(config)
        originals = [kind.get("original_max_position_embeddings") for kind in kinds if kind["rope_type"] == "longrope"]
        self._long = [end for end in originals if isinstance(end, int)]
        dynamic = any(kind["rope_type"] == "dynamic" for kind in kinds)
        most = getattr(config, "max_position_embeddings", None) if dynamic else None
        self._dynamic = most if isinstance(most, int) else None

    @property
    def frequencies_vary(self) -> bool:
        """Whether frequencies depend on the length."""
        return self.frequencies_grow or bool(self._long)

    @property
    def frequencies_grow(self) -> bool:
        """Whether frequencies continue to change beyond the length in the config."""
        return self._dynamic is not None

    def last(self, length: int) -> int:
        """The largest length with the frequencies of `length`."""
        ends = [end for end in (*self._long, self._dynamic) if end is not None and end >= length]
        return min(ends) if ends else length if self.frequencies_grow else MAX_LENGTH

    def shortest(self, length: int) -> int:
        """The smallest length with the frequencies of `length`; 0 if every shorter length has them."""
        if self.frequencies_grow and length > (self._dynamic or 0):
            return length
        return max((end + 1 for end in (*self._long, self._dynamic) if end is not None and end < length), default=0)


def _kinds(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary embeddings of a model: each kind of blocks may have one."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [kind for kind in kinds if "rope_type" in kind]
