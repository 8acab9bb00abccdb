"""Small checkpoints with random weights, one per family, for tests that need a model but no meaningful text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from splitnet.checkpoint.families import make_known

MAX_SHARD_SIZE = "200KB"
"""So small that even the blocks of these models are spread over several shards."""


def random_checkpoint(
    family: str, folder: Path, *, blocks: int = 6, hidden: int = 64, vocab: int = 300, seed: int = 0, **overrides: Any
) -> Path:
    """Saves a random float32 causal language model as sharded safetensors, with a generation config.

    Args:
        family: transformers' `model_type`.
        folder: the folder to create.
        overrides: values of the config to change, such as `num_attention_heads`.

    Returns:
        `folder`.
    """
    config = random_config(family, blocks=blocks, hidden=hidden, vocab=vocab, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomize(model)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    return folder


_LINEAR_ATTENTION = {"num_value_heads": 4, "num_key_heads": 2, "key_head_dim": 16, "value_head_dim": 16}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 128,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "expand": 2,
    "time_step_rank": 4,
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}

HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 4]},
    "falcon_h1": {},
    "falcon_mamba": {"num_heads": 8, "head_dim": 16, "intermediate_size": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2, "embedding_multiplier": 2.0},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "kv_lora_rank": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": None,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
    "mamba": {"intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    # In transformers' code of this family, steps of one position ignore the minimal time step of longer ones.
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mamba", "mlp", "attention"],
        "time_step_min": 1e-12,
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "qwen3_5_text": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "qwen3_next": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
}
"""Families whose blocks keep states; for each, further values of a small config with six blocks."""


_LATENT_ATTENTION = {
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_INDEXER = {"index_topk": 6, "index_head_dim": 32, "index_n_heads": 32}  # With few heads, scores are often equal.

SPARSE: dict[str, dict[str, Any]] = {
    "deepseek_v32": {**_LATENT_ATTENTION, "first_k_dense_replace": 2, **_INDEXER},
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 2,
        "mlp_layer_types": ["dense", *["sparse"] * 5],
        "num_sliding_attention_heads": 6,
        "share_expert_dim": 48,
        "swiglu_limits": [0, 0, 0, 0, 0, 0.5],
    },
    "llama4_text": {"attention_chunk_size": 6, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96},
    "glm_moe_dsa": {**_LATENT_ATTENTION, **_INDEXER},
}
"""Families whose blocks attend to selected positions only."""


def random_config(family: str, *, blocks: int, hidden: int, vocab: int, **overrides: Any) -> Any:
    """A config of the family with small sizes; names that the family's config does not have are left out."""
    config_class = CONFIG_MAPPING[family]
    make_known(config_class())
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
        # opt: its embeddings may have another width than its blocks
        "ffn_dim": 2 * hidden,
        "word_embed_proj_dim": hidden,
        # mixtures of experts
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden,
        # states beside or instead of attention
        **{f"linear_{name}": size for name, size in _LINEAR_ATTENTION.items()},
        **_MAMBA,
    }
    default.allow_global_per_layer_attribute_access = True
    known = {name: value for name, value in sizes.items() if hasattr(default, name)}
    if isinstance(getattr(type(default), "head_dim", None), property):
        known.pop("head_dim", None)
    return config_class(**(known | overrides))


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Gives every weight random values of a scale at which each block clearly changes the hidden state; also norms and
    biases."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if id(parameter) in embeddings:
            parameter.normal_(0, 0.5)
        elif parameter.ndim >= 2:
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
