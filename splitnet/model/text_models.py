"""Causal language models of families whose text model transformers has only inside of a larger one."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast

from splitnet.model.families import TEXT_MODELS


def text_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of the text model without a head; None if the family is not one of these."""
    name = TEXT_MODELS.get(config.model_type)
    if name is None:
        return None
    if config.model_type == "step3p5":
        _know_names_of_step3p5()
    return cast(type[PreTrainedModel], getattr(transformers, name))


@cache
def with_head(text_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same with a head, as transformers' causal language models have it."""
    family = next(one for one in text_model.__mro__[1:] if issubclass(one, PreTrainedModel))
    return cast(
        type[PreTrainedModel],
        type(f"{text_model.__name__}WithHead", (_WithHead, family), {"text_model": text_model, "__module__": __name__}),
    )


class _WithHead(PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)
    base_model_prefix = "model"
    text_model: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.text_model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: its blocks and their names in checkpoints are those of the family."""
        return False

    def forward(
        self, input_ids: torch.Tensor | None = None, *, logits_to_keep: int | torch.Tensor = 0, **options: Any
    ) -> CausalLMOutputWithPast:
        """As the causal language models of transformers."""
        outputs: Any = self.model(input_ids=input_ids, **options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits: Any = self.lm_head(outputs.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, cache=outputs.cache)


@cache
def _know_names_of_step3p5() -> None:
    """Step 3.5's text model has names in its own checkpoints that transformers knows of Step 3.7 only."""
    conversions = get_checkpoint_conversion_mapping("step3p7") or []
    own = [one for one in conversions if not any("language_model" in target for target in one.target_patterns)]
    register_checkpoint_conversion_mapping("step3p5", own, overwrite=True)
