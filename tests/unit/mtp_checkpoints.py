"""Small random checkpoints with a layer for multi-token prediction, with the names of published ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.unit.quantized_checkpoints import tensors_of, write_checkpoint
from tests.unit.random_models import random_checkpoint

LATENT = {
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
_INDEXER = {"index_topk": 6, "index_head_dim": 32, "index_n_heads": 32}
_DELTA = {"layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"]}
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | _INDEXER,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "glm4_moe": {"use_qk_norm": True, "first_k_dense_replace": 1},
    "glm4_moe_lite": LATENT | _SPARSE,
    "glm_moe_dsa": LATENT | _INDEXER,
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "mimo_v2_flash": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
        "n_routed_experts": 4,
        "v_head_dim": 12,
    },
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "attention", "moe"], "time_step_min": 1e-12},
    "qwen2": {},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
}
"""Further values of each family's config, for the blocks and the MTP layer."""

_BEHIND = ("model.layers.{n}.{}", "model.layers.{n}.{}", ("enorm", "hnorm", "eh_proj", "shared_head.norm"))
_BESIDE = ("mtp.{}", "mtp.layers.0.{}", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"))
PUBLISHED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "deepseek_v3": _BEHIND,
    "deepseek_v32": _BEHIND,
    "ernie4_5_moe": ("model.{}.0", "model.mtp_block.0.{}", ("mtp_emb_norm", "mtp_hidden_norm", "mtp_linear_proj")),
    "glm4_moe": _BEHIND,
    "glm4_moe_lite": _BEHIND,
    "glm_moe_dsa": _BEHIND,
    "mellum": _BESIDE,
    "mimo_v2_flash": (
        "model.mtp.layers.0.{}",
        "model.mtp.layers.0.{}",
        ("enorm", "hnorm", "eh_proj", "final_layernorm"),
    ),
    "nemotron_h": ("mtp.layers.{}", "mtp.layers.{}", ("0.enorm", "0.hnorm", "0.eh_proj", "1.final_layernorm")),
    "qwen2": (
        *("model.mtp_layers.0.{}", "model.mtp_layers.0.{}"),
        ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    ),
    "qwen3_5_moe_text": _BESIDE,
    "qwen3_5_text": _BESIDE,
    "qwen3_next": _BESIDE,
}
"""Name patterns of tensors outside and inside the block; names of the norms of embeddings and states, the projection
and the last norm."""


def mtp_checkpoint(family: str, folder: Path, *, seed: int = 0, behind: bool = False, **more: Any) -> tuple[Path, Path]:
    """Two folders: a checkpoint whose last block, or last two blocks, form an MTP layer, and the same checkpoint with
    ordinary blocks in its place. behind: the MTP layer is numbered after the other blocks, in any family; more: values
    of the config."""
    overrides = OVERRIDES[family] | more
    longer = random_checkpoint(
        family, folder / "longer", blocks=4 if family != "nemotron_h" else 5, seed=seed, **overrides
    )
    config = json.loads((longer / "config.json").read_text())
    around, within, names = _BEHIND if behind else PUBLISHED[family]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(longer).items():
        match = re.match(r"(?:model|backbone)\.layers\.(\d+)\.(.+)$", name)
        if match is None or int(match[1]) < 3:
            tensors[name] = tensor
        else:
            index, rest = int(match[1]) - 3, match[2]
            if family == "nemotron_h":
                rest = f"{index}.{rest}"
            if family == "mimo_v2_flash":
                rest = rest.replace("post_attention_layernorm", "pre_mlp_layernorm").replace(
                    "self_attn.sinks", "self_attn.attention_sink_bias"
                )
            tensors[within.format(rest, n=3)] = tensor
    size = config["hidden_size"]
    torch.manual_seed(seed + 1)
    for name in names:
        shape = (size, 2 * size) if name.endswith(("proj", "fc")) else (size,)
        scale = (2 * size) ** -0.5 if len(shape) == 2 else 0.3
        tensors[around.format(name, n=3) + ".weight"] = (len(shape) == 1) + scale * torch.randn(shape)
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types"):
        if key in config:
            config[key] = config[key][:3]
    config["num_hidden_layers"] = 3
    if within == _BEHIND[1] or family == "mellum":
        config["num_nextn_predict_layers"] = 1
    if family == "nemotron_h":
        config |= {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"]}
    if family == "qwen2":
        config |= {"num_nextn_predict_layers": 1, "model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
    return write_checkpoint(folder / "mtp", longer, tensors, config), longer


@torch.no_grad()
def states_of(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the last block of a whole model, `[seq, hidden]`, before and after the final norm."""
    seen: list[Tensor] = []
    backbone = model.get_decoder()
    norm = getattr(backbone, "norm", None) or backbone.norm_f
    hook = norm.register_forward_hook(lambda module, given, output: seen.extend((given[0][0], output[0])))
    model(input_ids=tokens[None], use_cache=False)
    hook.remove()
    return seen[0], seen[1]
