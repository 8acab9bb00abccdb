"""What a model keeps for speculation between its texts."""

from __future__ import annotations

from typing import Any

from splitnet.errors import SplitnetError
from splitnet.hf.speculate.decoding import Drafts, Experience
from splitnet.hf.speculate.drafts import Drafter, DraftModel, PromptLookup

PROMPT_LOOKUP = "prompt-lookup"


class Speculator:
    """Makes drafters; what one text has shown of the peers and the drafts, the next one knows.

    Args:
        vocabulary: how many tokens the model knows.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._experiences: dict[Any, Experience] = {}

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens that were drafted so far, and how many of them were accepted."""
        experiences = list(self._experiences.values())
        return sum(one.drafted for one in experiences), sum(one.accepted for one in experiences)

    def drafts_by(self, speculate: Any) -> Drafts:
        """Drafts for one text.

        Args:
            speculate: "prompt-lookup", or a causal LM of transformers with the same tokens.

        Raises:
            SplitnetError: there are none by that.
        """
        if isinstance(speculate, str) and speculate != PROMPT_LOOKUP:
            raise SplitnetError(f"cannot speculate by {speculate!r}: give {PROMPT_LOOKUP!r}, or a draft model")
        drafter: Drafter = PromptLookup() if speculate == PROMPT_LOOKUP else DraftModel(speculate, self._vocabulary)
        source = PROMPT_LOOKUP if speculate == PROMPT_LOOKUP else id(speculate)
        return Drafts(drafter, self._experiences.setdefault(source, Experience(drafter.priors)))
