"""A transformers model for sequence classification whose blocks are remote."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from splitnet.blocks.client_part import load_classifier_part
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.hf.remote_model import RemoteModel, joined, made_remote, remote_blocks
from splitnet.session.options import JOINING, RUNNING, ConnectionOptions, takes
from splitnet.swarm.swarm import Swarm

_Labels = tuple[int | None, Mapping[int, str] | None, Mapping[str, int] | None]
_LABELS = ("num_labels", "id2label", "label2id")


class AutoModelForSequenceClassification:
    """Loads a model with local embeddings, final norm and head, and remote blocks; use `from_pretrained`."""

    def __init__(self) -> None:
        raise OSError("use splitnet.AutoModelForSequenceClassification.from_pretrained(MODEL, initial_peers=[ADDR])")

    @classmethod
    @takes(*JOINING, *RUNNING)
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        initial_peers: Sequence[str],
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        **options: Any,
    ) -> RemoteSequenceClassification:
        """The family's model for sequence classification, whose blocks run on the peers of a swarm.

        If the checkpoint has no head (`score`), the head is new, as in transformers, and must be trained.

        Args:
            model: hub id or checkpoint folder, of a causal LM or of a model for sequence classification.
            num_labels, id2label, label2id: the labels, as in transformers; None: from the checkpoint's config.
            initial_peers, identity, revision, swarm_key, trusted_peers, options: see
                `splitnet.AutoModelForCausalLM.from_pretrained`.

        Raises:
            ModelNotFound: there is no such model.
            UnsupportedModel: transformers has no classifier of this family, or the checkpoint does not fit.
            DirectoryError: no initial peer answers.
            ValueError: the labels contradict each other.
            TypeError: there is no such option.
        """
        chosen = ConnectionOptions.of({"initial_peers": initial_peers, **options}, (*JOINING, *RUNNING), *_LABELS)
        with joined(model, chosen) as (checkpoint, swarm):
            return attached_classifier(checkpoint, swarm, (num_labels, id2label, label2id), chosen)


def attached_classifier(
    checkpoint: Checkpoint, swarm: Swarm, labels: _Labels, options: ConnectionOptions
) -> RemoteSequenceClassification:
    """The classifier on `checkpoint` with its blocks on `swarm`; options: see `ConnectionOptions.of`."""
    config = copy.deepcopy(checkpoint.config)
    _set_labels(config, labels)
    blocks = remote_blocks(checkpoint, swarm, options)
    client_part = load_classifier_part(checkpoint, config, blocks, dtype=options.dtype, device=options.device)
    model = made_remote(client_part, RemoteSequenceClassification, checkpoint.source)
    model.connect_blocks(blocks, swarm)
    return model


class RemoteSequenceClassification(RemoteModel):
    """Methods of a classifier with remote blocks beyond its transformers class.

    Every call is a pass over whole sequences. With a trained prompt, a row's result does not depend on the batch.
    """

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the transformers class, which classifies a sequence by its last token that is not padding.

        PEFT needs the parameter name `past_key_values` to pass a prefix, which is taken out of the call before this
        method. Raises ValueError: the last token is masked out.
        """
        if past_key_values is not None:
            kwargs["cache"] = past_key_values
        if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.all():
            if input_ids is not None:
                self._check_last_tokens(input_ids, attention_mask)
            elif inputs_embeds is not None:
                inputs_embeds, attention_mask, position_ids = _padding_first(
                    inputs_embeds, attention_mask, position_ids
                )
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        return super().forward(**inputs, attention_mask=attention_mask, labels=labels, **kwargs)

    def _check_last_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Refuses a last token in the padding, which has no hidden state: the head would silently read zeros."""
        padding = self.config.pad_token_id
        if padding is None and len(input_ids) > 1:
            return  # transformers refuses batches without a pad token
        tokens = torch.ones_like(input_ids) if padding is None else input_ids != padding
        last = (torch.arange(input_ids.shape[1], device=input_ids.device) * tokens).argmax(dim=1, keepdim=True)
        if not attention_mask.gather(1, last).all():
            raise ValueError(
                f"the last token of a row that is not model.config.pad_token_id ({padding}) is masked out: set "
                "model.config.pad_token_id to tokenizer.pad_token_id"
            )


def _padding_first(
    embeddings: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings `[batch, seq, hidden]`, mask `[batch, seq]` and positions with all padding before the first token.

    Embeddings do not show padding, so transformers reads the last column; and PEFT puts a trained prompt into the first
    columns, before padding on the left. positions: `[batch or 1, seq]`; None: counted without the padding.
    """
    order = mask.bool().to(torch.uint8).argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    if positions is None:
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    else:
        positions = positions.expand_as(order).gather(1, order)
    return embeddings.gather(1, order[..., None].expand_as(embeddings)), mask, positions


def _set_labels(config: PreTrainedConfig, labels: _Labels) -> None:
    """Sets the labels of a config; derives one direction from the other. Raises ValueError: the
    labels contradict each other."""
    num_labels, id2label, label2id = labels
    if id2label is None and label2id is None:
        if num_labels is not None:
            config.num_labels = num_labels
        return
    names = dict(id2label) if id2label is not None else {index: name for name, index in (label2id or {}).items()}
    indices = dict(label2id) if label2id is not None else {name: index for index, name in names.items()}
    if num_labels not in (None, len(names)) or indices != {name: index for index, name in names.items()}:
        raise ValueError("num_labels, id2label and label2id name different labels: leave out all but one")
    config.id2label, config.label2id = names, indices
