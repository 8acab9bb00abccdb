"""Whether what a family does between two calls of its model is known to the loop that takes transformers' place.

transformers asks a family's class before each call, in `prepare_inputs_for_generation`, and after it. Most classes do
what transformers does. Of the others it is found by trying at which lengths of a text they do something else than hand
over the last token, the cache and the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationMixin

from splitnet.checkpoint.families import max_positions

_PREPARES = "prepare_inputs_for_generation"
_OTHERS = ("_sample", "_update_model_kwargs_for_generation", "_prefill")
_HANDED_OVER = frozenset({"input_ids", "cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep"})

LONGEST = 1 << 20
"""Longer texts are not tried."""


class FamilyLoop:
    """transformers' loop with what a family adds to it.

    Args:
        model: with remote blocks.
        family: its transformers class.
    """

    def __init__(self, model: Any, family: Any) -> None:
        self._model = model
        self._family = family

    def differs(self, prompt: int, most: int | None) -> list[str]:
        """What the family does of its own while a text grows from `prompt` to `most` tokens; empty: nothing."""
        own = getattr(self._model, _PREPARES)
        if getattr(own, "__func__", None) is not getattr(type(self._model), _PREPARES):
            return [f"{_PREPARES} of the caller's"]
        for name in _OTHERS:
            if name in vars(self._model) or getattr(self._family, name) is not getattr(GenerationMixin, name):
                return [f"{name} of the family"]
        last = LONGEST if most is None else most
        lengths = [length for length in self._lengths if prompt < length <= last]
        return [f"a text of {lengths[0]} tokens, which the family treats in a way of its own,"] if lengths else []

    @cached_property
    def _lengths(self) -> list[int]:
        """Lengths of a text before whose last token the family does something of its own."""
        if getattr(self._family, _PREPARES) is getattr(GenerationMixin, _PREPARES):
            return []
        return [length for length in sorted(set(self._likely())) if not self._hands_over(length)]

    def _likely(self) -> Iterator[int]:
        """Two short ones, and those around every number of the config."""
        config = self._model.config.get_text_config()
        most = min(max_positions(config) or LONGEST, LONGEST)
        values = list(vars(config).values())
        values += [inner for value in values if isinstance(value, dict) for inner in value.values()]
        numbers = [1, *(value for value in values if isinstance(value, int))]
        yield from (length for number in numbers for length in range(number, number + 3) if 1 < length <= most)

    @torch.no_grad()
    def _hands_over(self, length: int) -> bool:
        """Whether it leaves it at the last token, behind what the cache holds."""
        cache = self._model.new_cache()
        cache.remote.columns = length - 1
        ids = torch.zeros(1, length, dtype=torch.long, device=self._model.device)
        mask, positions = torch.ones_like(ids), torch.arange(length, device=ids.device)[None]
        given = {"cache": cache, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        try:
            found = getattr(self._family, _PREPARES)(self._model, ids, next_sequence_length=1, **given)
        except Exception:  # the code of any family
            return False
        same = found.keys() <= _HANDED_OVER and found.get("cache") is cache and found["input_ids"].equal(ids[:, -1:])
        seen, place = found.get("attention_mask"), found.get("position_ids")
        return same and (seen is None or seen.equal(mask)) and (place is None or place.equal(positions[:, -1:]))
