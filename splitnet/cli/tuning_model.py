"""The model that `tune` trains: remote blocks, and an adapter that begins as words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from splitnet.cli.connection import Connection
from splitnet.client.causal_lm import RemoteCausalLM, attach
from splitnet.client.sequence_classification import RemoteSequenceClassification, attach_classifier
from splitnet.client.swarm import Swarm
from splitnet.model.checkpoint import Checkpoint
from splitnet.tuning.methods import AdapterOptions, Method, begin_prefix, with_new_adapter


@dataclass(frozen=True)
class ModelToTune:
    """Where a model comes from.

    Attributes:
        pad: token id of padding.
        labels: of a head to train; None: the model's words tell.
    """

    checkpoint: Checkpoint
    swarm: Swarm
    connection: Connection
    tokenizer: Any
    pad: int
    labels: Sequence[str] | None

    def with_adapter(self, method: Method, options: AdapterOptions, beginning: str) -> Any:
        """The model with a new adapter; head and adapter begin by torch's random numbers.

        Args:
            beginning: the text that prompts and prefixes begin as.

        Raises:
            AdapterError: the options do not fit the model.
        """
        head = self.labels is not None
        model = self._classifier() if head else self._causal()
        adapted = with_new_adapter(
            model,
            method,
            replace(options, init_text=beginning),
            tokenizer_source=self.checkpoint.tokenizer_source,
            head=head,
        )
        if method is Method.PREFIX and options.projection is None:
            # A classifier uses no caches, but the keys and values of a causal model are those of the same blocks.
            causal = model if isinstance(model, RemoteCausalLM) else self._causal()
            ids = self.tokenizer(beginning, return_tensors="pt").input_ids[:, : options.tokens]
            begin_prefix(adapted, causal.keys_and_values(ids))
        return adapted

    def _causal(self) -> RemoteCausalLM:
        return attach(self.checkpoint, self.swarm, **self.connection.options())

    def _classifier(self) -> RemoteSequenceClassification:
        model = attach_classifier(
            self.checkpoint,
            self.swarm,
            id2label=dict(enumerate(self.labels or ())),
            **self.connection.options(),
        )
        model.config.pad_token_id = self.pad  # by which it finds the last token of a row
        return model
