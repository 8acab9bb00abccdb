"""Causal language models that transformers has only inside of multimodal ones, made known to its auto classes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel


class Step3p5ForCausalLM(Step3p7PreTrainedModel, GenerationMixin):
    """Step-3.5, which was published as a text model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (as transformers has it)
    config_class = Step3p7TextConfig

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__(config)  # pyright: ignore[reportArgumentType]
        self.model = Step3p7TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward: Any = Qwen3ForCausalLM.forward  # does nothing but call the backbone and the head


class Qwen3VLMoeAloneConfig(Qwen3MoeConfig):
    """Of the text model of Qwen3-VL-MoE: a Qwen3-MoE whose experts lie otherwise in files."""


class Qwen3VLMoeAloneModel(Qwen3MoeModel):
    """Its backbone."""

    __module__ = Qwen3MoeModel.__module__  # where transformers looks for what the family can
    config_class = Qwen3VLMoeAloneConfig


class Qwen3VLMoeAloneForCausalLM(Qwen3MoeForCausalLM):
    """With its head."""

    __module__ = Qwen3MoeModel.__module__
    config_class = Qwen3VLMoeAloneConfig


def make_known() -> None:
    """Registers these classes, and how the names and layouts in their checkpoints are converted."""
    AutoModel.register(Step3p7TextConfig, Step3p7TextModel, exist_ok=True)
    AutoModelForCausalLM.register(Step3p7TextConfig, Step3p5ForCausalLM, exist_ok=True)
    within_towers = get_checkpoint_conversion_mapping("step3p7") or []
    own = [step for step in within_towers if not any(source.startswith("^") for source in step.source_patterns)]
    register_checkpoint_conversion_mapping("step3p5", own, overwrite=True)
    CONFIG_MAPPING.register("qwen3_vl_moe_alone", Qwen3VLMoeAloneConfig, exist_ok=True)
    AutoModel.register(Qwen3VLMoeAloneConfig, Qwen3VLMoeAloneModel, exist_ok=True)
    AutoModelForCausalLM.register(Qwen3VLMoeAloneConfig, Qwen3VLMoeAloneForCausalLM, exist_ok=True)
    for alone in (Qwen3VLMoeAloneModel, Qwen3VLMoeAloneForCausalLM):
        steps = [
            step for name in ("qwen3_moe", "qwen3_vl_moe") for step in get_checkpoint_conversion_mapping(name) or []
        ]
        register_checkpoint_conversion_mapping(alone.__name__, steps, overwrite=True)
