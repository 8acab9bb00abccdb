"""Experts in codes give the results of the family's own code with the decoded numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from splitnet.blocks.backbone import hold_codes
from splitnet.quant.grouped import EXPERTS_FROM
from splitnet.quant.packed_tensor import CodeLayout, Codes, PackedTensor, ScaleFormat, StoredMatrix
from tests.unit.random_models import random_config

HIDDEN = 64
VOCAB = 128
FAMILIES = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe", "granitemoe", "olmoe"),
    *("ernie4_5_moe", "minimax_m2", "hunyuan_v1_moe", "phimoe", "flex_olmo", "dots1", "nemotron_h", "qwen3_next"),
    *("afmoe", "exaone_moe", "solar_open", "minimax", "lfm2_moe", "jamba", "glm_moe_dsa"),
)
SIZES: dict[str, Any] = {
    "n_routed_experts": 4,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_layer_start_index": 0,
    "decoder_sparse_step": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "num_dense_layers": 0,
}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "nemotron_h": {"layers_block_type": ["attention", "moe"]},
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["full_attention", "full_attention"]},
    "minimax": {"layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8},
    "dots1": {"n_shared_experts": 1},
    "glm_moe_dsa": {"num_key_value_heads": 4, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16},
}


def model_of(family: str) -> Any:
    default = random_config(family, blocks=2, hidden=HIDDEN, vocab=VOCAB)
    known = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    overrides = {**known, **FAMILY_SIZES.get(family, {})}
    config = random_config(family, blocks=2, hidden=HIDDEN, vocab=VOCAB, **overrides)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
    return model


def coded(weight: torch.Tensor, transposed: bool) -> PackedTensor:
    """Random codes for a weight of this size."""
    experts, outputs, inputs = (weight.transpose(1, 2) if transposed else weight).shape
    layout = CodeLayout(4, 32, ScaleFormat.FLOAT16, offset=8)

    def matrix() -> StoredMatrix:
        codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
        scales = torch.full((outputs, inputs // 32), 0.25 / math.sqrt(inputs)) * (1 + torch.rand(outputs, inputs // 32))
        read = Codes(codes, scales.half())
        return StoredMatrix(layout, (outputs, inputs), lambda: read)

    return PackedTensor.__new__(PackedTensor, [[matrix()] for _ in range(experts)], stacked=True, transposed=transposed)


@pytest.mark.parametrize("family", FAMILIES)
def test_held_experts_equal_the_familys_own(family: str) -> None:
    model = model_of(family)
    experts: list[Any] = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    assert experts
    stored: list[tuple[Any, str, PackedTensor]] = []
    for module in experts:
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                stored.append((module, name, coded(getattr(module, name), module.is_transposed)))
    with torch.no_grad():
        for module, name, codes in stored:
            getattr(module, name).copy_(codes.to_floats())
    ids = torch.randint(1, VOCAB, (1, 4 * EXPERTS_FROM), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = [model(some).logits for some in (ids, ids[:, :2])]
    for module, name, codes in stored:
        setattr(module, name, nn.Parameter(codes, requires_grad=False))
    hold_codes(model, torch.device("cpu"))
    assert all(name not in dict(module.named_parameters()) for module, name, _ in stored)
    with torch.no_grad():
        found = [model(some).logits for some in (ids, ids[:, :2])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=1e-3)


def test_gradients_flow_to_the_inputs_of_experts() -> None:
    model = model_of("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    names = ("gate_up_proj", "down_proj")
    codes = [coded(getattr(experts, name), False) for name in names]
    for name, one in zip(names, codes, strict=True):
        setattr(experts, name, nn.Parameter(one.to_floats(), requires_grad=False))
    index, weights = torch.tensor([[0, 1], [1, 3], [1, 2]]), torch.rand(3, 2)
    gradients: list[torch.Tensor] = []
    for held in (False, True):
        if held:
            for name, one in zip(names, codes, strict=True):
                setattr(experts, name, nn.Parameter(one, requires_grad=False))
            hold_codes(experts, torch.device("cpu"))
        given = torch.ones(3, HIDDEN, requires_grad=True)
        experts(given, index, weights).pow(2).sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, atol=1e-3 * float(gradients[0].abs().max()), rtol=1e-3)
