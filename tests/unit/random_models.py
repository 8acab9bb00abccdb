"""Small checkpoints with random weights, one per family, for tests that need a model but no sense in its words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

MAX_SHARD_SIZE = "200KB"
"""Small, so that the blocks of even these models lie in several shards."""


def random_checkpoint(
    family: str, folder: Path, *, blocks: int = 6, hidden: int = 64, vocab: int = 300, seed: int = 0, **overrides: Any
) -> Path:
    """Saves a random float32 causal language model as sharded safetensors, with a generation config.

    Args:
        family: transformers' `model_type`.
        folder: is created.
        overrides: values of the config, such as `num_attention_heads`.

    Returns:
        `folder`.
    """
    config = random_config(family, blocks=blocks, hidden=hidden, vocab=vocab, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomize(model)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    return folder


def random_config(family: str, *, blocks: int, hidden: int, vocab: int, **overrides: Any) -> Any:
    """A config of the family with small sizes; names that the family does not have are left out."""
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    heads = 4
    sizes: dict[str, Any] = {
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": hidden // heads,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 256,
        "sliding_window": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # opt, whose embeddings may have another width than its blocks
        "ffn_dim": 2 * hidden,
        "word_embed_proj_dim": hidden,
        # mixtures of experts
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden,
    }
    known = {name: value for name, value in sizes.items() if hasattr(default, name)}
    if isinstance(getattr(type(default), "head_dim", None), property):
        known.pop("head_dim", None)
    return config_class(**(known | overrides))


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Gives every weight a scale at which each block visibly changes the hidden state, and norms and biases one too."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if id(parameter) in embeddings:
            parameter.normal_(0, 0.5)
        elif parameter.ndim >= 2:
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
