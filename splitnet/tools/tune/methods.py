"""The methods of tuning with PEFT's configurations, and the settings of training."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from splitnet.errors import AdapterError
from splitnet.paths import public_name

if TYPE_CHECKING:
    from splitnet.hf.peft_adapters import Prefixes


class Method(StrEnum):
    """A method of fine-tuning a model without changing its own weights."""

    PROMPT = "prompt"
    PREFIX = "prefix"
    P_TUNING = "p-tuning"
    LORA = "lora"
    SIDE = "side"

    @property
    def learning_rate(self) -> float:
        """The default learning rate of AdamW for the method."""
        if self is Method.SIDE:
            return 3e-4
        return 1e-2 if self in (Method.PROMPT, Method.PREFIX) else 1e-3


class PromptNetwork(StrEnum):
    """The network that generates the prompt in p-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """The size and the initial value of an adapter; each method uses some of the fields."""

    tokens: int = 16  # virtual tokens of prompt, prefix and p-tuning
    # The embeddings of this text, cut or repeated, are the initial prompt; None: random tokens.
    init_text: str | None = None
    # Width of the network that generates a prefix in training (None: no network), or of the network of p-tuning.
    projection: int | None = None
    network: PromptNetwork = PromptNetwork.MLP  # the network of p-tuning
    rank: int = 8  # rank of LoRA; the next two fields are for LoRA, too
    alpha: int = 16
    targets: Sequence[str] = ()  # empty: PEFT's default for the family; ALL_LINEAR: all linear layers
    width: int | None = None  # width of a side network; None: a quarter of the model's hidden size

    def virtual_tokens(self, method: Method) -> int:
        """Positions of the model's context that an adapter of this method occupies."""
        return 0 if method in (Method.LORA, Method.SIDE) else self.tokens


ALL_LINEAR = "all-linear"


def with_new_adapter(
    model: Any, method: Method, options: AdapterOptions, tokenizer: Any, *, tokenizer_source: str, head: bool = False
) -> Any:
    """The PEFT model of a model, remote or not, with a new adapter to train.

    The adapter's configuration names the source of the tokenizer, for `init_text`. With `head`, the model is a sequence
    classifier whose head is trained, too.

    Raises AdapterError if the options do not fit the model.
    """
    from peft import TaskType, get_peft_model

    # PEFT ignores names that match no layer if other names match layers.
    sizes = {f".{path}": getattr(getattr(one, "weight", None), "ndim", 0) for path, one in model.named_modules()}
    for name in options.targets if method is Method.LORA else ():
        if name != ALL_LINEAR and not any(path.endswith(f".{name}") for path in sizes):
            known = ", ".join(sorted({path.rpartition(".")[2] for path, size in sizes.items() if size == 2}))
            raise AdapterError(f"this model has no layer {name!r} for --targets: take some of {known}, or {ALL_LINEAR}")
    task = TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM
    try:
        with tempfile.TemporaryDirectory() as folder:
            if method is Method.PROMPT and options.init_text:
                # PEFT loads the tokenizer through transformers, which does not read tokenizers from GGUF files.
                tokenizer.save_pretrained(folder)
            config = _config(task, method, options, folder)
            if method is Method.LORA and getattr(model, "sees_images", False):
                path = next(name for name, module in model.named_modules() if module is model.get_decoder())
                config.exclude_modules = rf"(?!{re.escape(path)}\.).*"  # towers stay as they are
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        if method is Method.LORA:
            raise AdapterError(f"LoRA does not fit this model ({error}): name its layers with --targets") from None
        raise AdapterError(f"{method} does not fit this model: {error}") from None
    if method is Method.PROMPT and options.init_text:
        wrapped.active_peft_config.tokenizer_name_or_path = public_name(tokenizer_source)
    return wrapped


def begin_prefix(wrapped: Any, pairs: Prefixes) -> None:
    """Initializes a prefix without projection with the keys and values of a text.

    With random keys and values, training would begin with a much higher loss, and with gradients whose direction
    changes with the smallest error of an activation. Li and Liang, arXiv:2101.00190, section 7.4, also initialize with
    real words.

    pairs: keys and values of each block, `[kv heads, positions, head size]`, which are cut or repeated to the length of
    the prefix.

    Raises AdapterError if keys and values have other sizes than PEFT's prefix for this model.
    """
    import torch

    (encoder,) = wrapped.prompt_encoder.values()
    weight = encoder.embedding.weight
    columns = [tensor.transpose(0, 1).flatten(1) for pair in pairs for tensor in pair]
    rows = torch.cat(columns, dim=1)
    repeated = rows.repeat(-(-len(weight) // len(rows)), 1)[: len(weight)]
    if repeated.shape != weight.shape:
        raise AdapterError(
            f"PEFT's prefix for this model has {weight.shape[1]} numbers per position, its keys and values "
            f"{rows.shape[1]}: train a prefix with --projection, or another method"
        )
    with torch.no_grad():
        weight.copy_(repeated)


def _config(task: Any, method: Method, options: AdapterOptions, tokenizer_folder: str) -> Any:
    from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    soft: dict[str, Any] = {"task_type": task, "num_virtual_tokens": options.tokens}
    match method:
        case Method.LORA:
            targets = ALL_LINEAR if ALL_LINEAR in options.targets else list(options.targets) or None
            return LoraConfig(task_type=task, r=options.rank, lora_alpha=options.alpha, target_modules=targets)
        case Method.PROMPT if options.init_text:
            soft |= {"prompt_tuning_init_text": options.init_text, "tokenizer_name_or_path": tokenizer_folder}
            return PromptTuningConfig(**soft, prompt_tuning_init="TEXT")
        case Method.PROMPT:
            return PromptTuningConfig(**soft, prompt_tuning_init="SAMPLE_VOCAB")
        case Method.P_TUNING:
            kind, width = options.network.value, options.projection or 128
            return PromptEncoderConfig(**soft, encoder_reparameterization_type=kind, encoder_hidden_size=width)
        case Method.PREFIX:
            config = PrefixTuningConfig(**soft)
            if options.projection is not None:
                config.prefix_projection, config.encoder_hidden_size = True, options.projection
            return config


class Schedule(StrEnum):
    """The learning rate after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train."""

    steps: int
    learning_rate: float
    batch_size: int = 8  # rows per step
    accumulate: int = 1  # parts into which a step's rows are cut, to save memory; the gradient stays the same
    warmup_steps: int = 0  # steps in which the learning rate rises from 0
    schedule: Schedule = Schedule.LINEAR  # after the warm-up; linear and cosine decrease to 0 at the last step
    clip: float = 1.0  # maximum norm of a gradient; 0: no maximum
    weight_decay: float = 0.0
    # Whether gradients are estimated from forward passes only, along `directions`, see `estimate_gradients`.
    zeroth_order: bool = False
    directions: int = 1
    seed: int = 0  # determines the order of the data, and the directions

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        match self.schedule:
            case Schedule.LINEAR:
                return self.learning_rate * (1 - done)
            case Schedule.COSINE:
                return self.learning_rate * (1 + math.cos(math.pi * done)) / 2
            case Schedule.CONSTANT:
                return self.learning_rate
