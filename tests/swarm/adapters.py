"""Adapters of every kind that PEFT makes, and data to train them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2")
CAUSAL, CLASSES = TaskType.CAUSAL_LM, TaskType.SEQ_CLS


LAYERS = {"llama": ["k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
"""Target modules by family for methods other than LoRA. If a method may scale inputs, it scales those of the second
module."""


def lora(family: str = "llama", task: TaskType = CAUSAL) -> LoraConfig:
    targets = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(task_type=task, r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False)


METHODS: dict[str, Callable[[str, TaskType], Any]] = {
    "prompt": lambda family, task: PromptTuningConfig(task_type=task, num_virtual_tokens=5),
    "p-tuning-mlp": lambda family, task: PromptEncoderConfig(
        task_type=task, num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "p-tuning-lstm": lambda family, task: PromptEncoderConfig(
        task_type=task, num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda family, task: PrefixTuningConfig(task_type=task, num_virtual_tokens=5),
    "prefix-mlp": lambda family, task: PrefixTuningConfig(
        task_type=task, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
    "lora": lora,
    "ia3": lambda family, task: IA3Config(
        task_type=task,
        target_modules=LAYERS.get(family, LAYERS["llama"]),
        feedforward_modules=LAYERS.get(family, LAYERS["llama"])[1:],
        init_ia3_weights=False,
    ),
    "adalora": lambda family, task: AdaLoraConfig(
        task_type=task,
        init_r=4,
        total_step=9,
        target_modules=LAYERS.get(family, LAYERS["llama"]),
        init_lora_weights=False,
    ),
    "vera": lambda family, task: VeraConfig(
        task_type=task, r=4, target_modules=LAYERS.get(family, LAYERS["llama"]), init_weights=False
    ),
    "loha": lambda family, task: LoHaConfig(
        task_type=task, r=3, target_modules=LAYERS.get(family, LAYERS["llama"]), init_weights=False
    ),
    "lokr": lambda family, task: LoKrConfig(
        task_type=task, r=3, target_modules=LAYERS.get(family, LAYERS["llama"]), init_weights=False
    ),
}
"""Functions that make the config for a family and a task, by name."""


def wrapped(model: Any, config: Any, seed: int = 3) -> PeftModel:
    """The model with a new adapter, whose weights the seed determines."""
    torch.manual_seed(seed)
    made = get_peft_model(model, config)
    assert isinstance(made, PeftModel)
    for name, parameter in made.named_parameters():
        if ".lora_E." in name:  # PEFT initialises these so large that float errors grow.
            parameter.data.mul_(0.05)
    return made.eval()  # Peers do not apply dropout.


def padded(seed: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on one side."""
    ids = torch.randint(3, 300, (5, 14), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, length in enumerate((14, 9, 11, 4, 14)):
        mask[row, slice(length, None) if side == "right" else slice(0, 14 - length)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts, padded on the right; the loss is on the second half of each."""
    inputs = padded(seed)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        labels[row, : length // 2] = -100
    return {**inputs, "labels": labels}


def gradients(model: PeftModel, *batches: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of batches, and its gradient for every trained parameter that has one."""
    model.zero_grad()
    loss = torch.stack([model(**inputs).loss for inputs in batches]).mean()
    loss.backward()
    found = {name: tensor.grad for name, tensor in sorted(model.named_parameters()) if tensor.requires_grad}
    assert any(gradient is not None for gradient in found.values())
    return float(loss.detach()), {name: gradient for name, gradient in found.items() if gradient is not None}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All tensors as one row."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])
