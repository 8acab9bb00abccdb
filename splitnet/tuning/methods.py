"""What is trained, by name: each method with PEFT's config for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from splitnet.errors import AdapterError


class Method(StrEnum):
    """A way to fine-tune a model whose own weights stay as they are."""

    PROMPT = "prompt"
    PREFIX = "prefix"
    P_TUNING = "p-tuning"
    LORA = "lora"

    def learning_rate(self, *, zeroth_order: bool) -> float:
        """A step size to begin with, of AdamW or of `ZerothOrder`."""
        first_order, without_gradients = _LEARNING_RATES[self]
        return without_gradients if zeroth_order else first_order


class PromptNetwork(StrEnum):
    """The network that makes the prompt in p-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """How large an adapter is, and how it begins; each method reads what concerns it.

    Attributes:
        tokens: virtual tokens of prompt, prefix and p-tuning.
        init_text: a prompt begins with the embeddings of this text, cut or repeated; None: of random tokens.
        projection: width of the network that makes a prefix while it is trained (None: there is none), or p-tuning's.
        network: of p-tuning.
        rank, alpha, targets: of LoRA; no targets: those that PEFT has for the family; ALL_LINEAR: all linear layers.
    """

    tokens: int = 16
    init_text: str | None = None
    projection: int | None = None
    network: PromptNetwork = PromptNetwork.MLP
    rank: int = 8
    alpha: int = 16
    targets: Sequence[str] = ()

    def virtual_tokens(self, method: Method) -> int:
        """Positions that an adapter of this method takes of the model's context."""
        return 0 if method is Method.LORA else self.tokens


ALL_LINEAR = "all-linear"

_LEARNING_RATES = {
    Method.PROMPT: (1e-2, 1e-2),
    Method.PREFIX: (1e-2, 1e-3),
    Method.P_TUNING: (1e-3, 1e-4),
    Method.LORA: (1e-3, 1e-4),
}

PREFIX_STD = 0.02
"""Of the first keys and values of a prefix without projection; PEFT takes 1, which no model expects."""


def with_new_adapter(
    model: Any, method: Method, options: AdapterOptions, *, tokenizer_source: str, head: bool = False
) -> Any:
    """What PEFT makes of a model, with an adapter that is to be trained.

    Args:
        model: a causal language model or a sequence classifier, remote or not.
        tokenizer_source: where the tokenizer for `init_text` comes from.
        head: whether the model is a sequence classifier, whose head is trained too.

    Raises:
        AdapterError: the options do not fit the model.
    """
    from peft import TaskType, get_peft_model

    task = TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM
    try:
        wrapped = get_peft_model(model, _config(task, method, options, tokenizer_source))
    except ValueError as error:
        if method is Method.LORA:
            raise AdapterError(f"LoRA does not fit this model ({error}): name its layers with --targets") from None
        raise AdapterError(f"{method} does not fit this model: {error}") from None
    if method is Method.PREFIX and options.projection is None:
        import torch

        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "prompt_encoder" in name:
                    parameter.mul_(PREFIX_STD)
    return wrapped


def _config(task: Any, method: Method, options: AdapterOptions, tokenizer_source: str) -> Any:
    from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    match method:
        case Method.LORA:
            targets = ALL_LINEAR if ALL_LINEAR in options.targets else list(options.targets) or None
            return LoraConfig(task_type=task, r=options.rank, lora_alpha=options.alpha, target_modules=targets)
        case Method.PROMPT if options.init_text:
            return PromptTuningConfig(
                task_type=task,
                num_virtual_tokens=options.tokens,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text=options.init_text,
                tokenizer_name_or_path=tokenizer_source,
            )
        case Method.PROMPT:
            return PromptTuningConfig(
                task_type=task, num_virtual_tokens=options.tokens, prompt_tuning_init="SAMPLE_VOCAB"
            )
        case Method.P_TUNING:
            return PromptEncoderConfig(
                task_type=task,
                num_virtual_tokens=options.tokens,
                encoder_reparameterization_type=options.network.value,
                encoder_hidden_size=options.projection or 128,
            )
        case Method.PREFIX:
            config = PrefixTuningConfig(task_type=task, num_virtual_tokens=options.tokens)
            if options.projection is not None:
                config.prefix_projection, config.encoder_hidden_size = True, options.projection
            return config
