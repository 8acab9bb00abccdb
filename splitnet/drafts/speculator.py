"""Chooses and loads the source of drafts for the texts of a model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.drafts.draft_model import DraftModel
from splitnet.drafts.draft_stats import Counts, DraftStats
from splitnet.drafts.drafter import Drafter
from splitnet.drafts.heads import CombinedDrafter, DraftHead
from splitnet.drafts.mtp import mtp_bytes, mtp_head
from splitnet.drafts.prompt_lookup import PromptLookup
from splitnet.errors import SplitnetError
from splitnet.quant.device import free_memory

log = logging.getLogger(__name__)

AUTO, OFF, PROMPT_LOOKUP, MTP = NAMES = ("auto", "off", "prompt-lookup", "mtp")
EAGLE = "eagle="  # prefix of the folder of an EAGLE head
MTP_SHARE = 0.25  # largest share of the free memory that "auto" uses for an MTP layer


@dataclass(frozen=True, slots=True)
class Drafts:
    """A source of drafts, and the statistics that decide how many drafts are sent."""

    drafter: Drafter
    stats: DraftStats
    required: bool = True  # refuse texts for which drafts are impossible


class Speculator:
    """Makes drafts for the texts of a model, with statistics of earlier texts.

    model: a causal LM with remote blocks. checkpoint: the checkpoint of this model.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._heads: dict[str, DraftHead | None] = {}
        self._stats: dict[Any, DraftStats] = {}
        self._lock = threading.Lock()

    @property
    def counts(self) -> Counts:
        """The sums of the counts of all drafters."""
        each = [(one.drafted, one.accepted, one.tokens, one.round_trips) for one in [*self._stats.values()]]
        return Counts(*map(sum, zip(*each, strict=True))) if each else Counts(0, 0, 0, 0)

    def drafts_by(self, speculate: Any) -> Drafts:
        """Drafts for one text, see `RemoteCausalLM.generate`. Raises SplitnetError: there is no such source."""
        if not isinstance(speculate, str):
            vocabulary = self._model.config.get_text_config().vocab_size
            return Drafts(DraftModel(speculate, vocabulary), self._stats_of(id(speculate), DraftModel.priors))
        head, required = self._head(speculate), speculate != AUTO
        if head is None:
            return Drafts(PromptLookup(), self._stats_of(speculate, PromptLookup.priors), required)
        stats = self._stats_of(speculate, CombinedDrafter.priors)
        return Drafts(CombinedDrafter(head, stats.acceptance), stats, required)

    def _stats_of(self, source: Any, priors: Sequence[float]) -> DraftStats:
        """Statistics of all texts with drafts from this source."""
        return self._stats.setdefault(source, DraftStats(priors))

    def _head(self, speculate: str) -> DraftHead | None:
        """The head that drafts; None: drafts are copies of the text. Raises SplitnetError: there is no such head."""
        with self._lock:
            if speculate not in self._heads:
                self._heads[speculate] = self._load_head(speculate)
            return self._heads[speculate]

    def _load_head(self, speculate: str) -> DraftHead | None:
        if speculate == PROMPT_LOOKUP:
            return None
        if speculate == AUTO:
            return self._mtp_if_cheap()
        if speculate == MTP:
            head = mtp_head(self._checkpoint, self._model.ends)
            if head is None:
                raise SplitnetError(
                    f"{self._checkpoint.name} has no layer for multi-token prediction: speculate by {AUTO!r}, "
                    f"{PROMPT_LOOKUP!r} or a draft model"
                )
            return head
        if speculate.startswith(EAGLE):
            from splitnet.drafts.eagle import EagleHead

            return EagleHead.from_source(speculate.removeprefix(EAGLE), self._model.ends)
        raise SplitnetError(
            f"cannot speculate by {speculate!r}: give one of {', '.join(NAMES)}, {EAGLE}DIR, or a draft model"
        )

    def _mtp_if_cheap(self) -> DraftHead | None:
        """The checkpoint's MTP layer if it is on this machine, can be used, and needs little of the free memory."""
        if (head := self._heads.get(MTP)) is not None:
            return head
        names, free = self._checkpoint.next_token_names, free_memory(self._model.device)
        try:
            here = bool(names) and self._checkpoint.store.are_here(names)
            if here and mtp_bytes(self._checkpoint, self._model.dtype) <= MTP_SHARE * free:
                head = self._heads[MTP] = mtp_head(self._checkpoint, self._model.ends)
                return head
        except SplitnetError as error:
            log.info("drafts are copies of the text: %s", error)
        return None
