"""What a model keeps for speculation between its texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from splitnet.client.cache import RemoteCache
from splitnet.client.speculation.decoding import SpeculativeDecoding
from splitnet.client.speculation.drafts import Drafter, DraftModel
from splitnet.client.speculation.experience import Experience
from splitnet.client.speculation.prompt_lookup import PromptLookup
from splitnet.errors import SplitnetError

PROMPT_LOOKUP = "prompt-lookup"


class Speculator:
    """Makes the loops that generate with drafts; what one has seen of the peers and the drafts, the next one knows.

    Args:
        vocabulary: how many tokens the model knows.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._experiences: dict[Any, Experience] = {}

    @property
    def drafts(self) -> tuple[int, int]:
        """Tokens that were drafted so far, and how many of them were accepted."""
        experiences = list(self._experiences.values())
        return sum(one.drafted for one in experiences), sum(one.accepted for one in experiences)

    def loop(self, speculate: Any, options: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
        """What generates one text in the place of transformers' own loop.

        Args:
            speculate: "prompt-lookup", or a causal LM of transformers with the same tokens.
            options: of `generate()`; the cache on the peers is among them.

        Raises:
            SplitnetError: speculation cannot be done so.
        """
        if isinstance(speculate, str) and speculate != PROMPT_LOOKUP:
            raise SplitnetError(f"cannot speculate by {speculate!r}: give {PROMPT_LOOKUP!r}, or a draft model")
        cache = options.get("cache")
        if not isinstance(cache, RemoteCache):
            raise SplitnetError("speculation needs the cache on the peers: leave out `speculate`, or `use_cache`")
        mask = options.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise SplitnetError(
                "speculation is for one sequence without padding: leave out `speculate`, or the padding"
            )
        drafter: Drafter = PromptLookup() if speculate == PROMPT_LOOKUP else DraftModel(speculate, self._vocabulary)
        source = PROMPT_LOOKUP if speculate == PROMPT_LOOKUP else id(speculate)
        experience = self._experiences.setdefault(source, Experience(drafter.priors))
        decoding = SpeculativeDecoding(drafter, experience)
        streamer = options.get("streamer")

        def generate(model: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
            return decoding.generate(
                model,
                input_ids,
                given["logits_processor"],
                given["stopping_criteria"],
                given["generation_config"],
                cache,
                streamer,
            )

        return generate
