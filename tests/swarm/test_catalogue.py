"""Published models that people split over devices, with small random weights.

The list is that of the model cards of exo (commit b5375f8). Three unequal spans compute the same as transformers with
the numbers that the published codes represent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from splitnet.checkpoint.families import check_can_be_cut
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import UnsupportedModel
from tests.published import (
    DELTA,
    FP8_CONFIG,
    INT4_CONFIG,
    LATENT,
    MOE,
    MXFP4_CONFIG,
    QWEN_VISION,
    VOCAB,
    Published,
    bfloat16,
    fp8_blocks,
    int4_groups,
    mxfp4_experts,
)
from tests.swarm.harness import local_swarm

pytestmark = pytest.mark.swarm

_QWEN_EXPERTS = {**MOE, "num_experts": 4}
_SHARED = {**_QWEN_EXPERTS, "shared_expert_intermediate_size": 64}
_GLM = {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_INDEXER = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}
_MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8}
_NEMOTRON_EXPERTS = {
    **MOE,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
}
_GEMMA = {
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
_KIMI_VISION = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
_KIMI_NAMES = {r"^language_model\.model\.blocks\.": "language_model.model.layers."}

CATALOGUE: dict[str, tuple[tuple[str, ...], Published]] = {
    "llama-bfloat16": (
        (
            *("Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct", "Llama-3.3-70B-Instruct"),
            *("Llama-3.1-Nemotron-70B-Instruct", "Llama-3.1-Nemotron-Nano-4B"),
        ),
        Published("llama", store=bfloat16),
    ),
    "llama-tied-bfloat16": (
        ("Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct"),
        Published("llama", {"tie_word_embeddings": True}, store=bfloat16),
    ),
    "qwen3-bfloat16": (("Qwen3-0.6B",), Published("qwen3", {"tie_word_embeddings": True}, store=bfloat16)),
    "qwen3_moe-bfloat16": (
        ("Qwen3-30B-A3B", "Qwen3-235B-A22B-2507", "Qwen3-Coder-480B-A35B"),
        Published("qwen3_moe", _QWEN_EXPERTS, store=bfloat16),
    ),
    "glm4_moe-bfloat16": (
        ("GLM-4.5-Air", "GLM-4.7"),
        Published("glm4_moe", {**_GLM, "use_qk_norm": True}, store=bfloat16),
    ),
    "glm4_moe_lite-bfloat16": (("GLM-4.7-Flash",), Published("glm4_moe_lite", {**MOE, **LATENT}, store=bfloat16)),
    "qwen3_next-bfloat16": (
        ("Qwen3-Next-80B-A3B-Instruct", "Qwen3-Next-80B-A3B-Thinking", "Qwen3-Coder-Next"),
        Published("qwen3_next", {**_SHARED, **DELTA}, store=bfloat16),
    ),
    "qwen3_5-bfloat16": (
        ("Qwen3.5-2B", "Qwen3.5-9B", "Qwen3.5-27B", "Qwen3.6-27B"),
        Published("qwen3_5", DELTA, QWEN_VISION, bfloat16),
    ),
    "qwen3_5_moe-bfloat16": (
        ("Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B", "Qwen3.6-35B-A3B"),
        Published("qwen3_5_moe", {**_SHARED, **DELTA}, QWEN_VISION, bfloat16),
    ),
    "nemotron_h-experts-bfloat16": (
        ("NVIDIA-Nemotron-3-Nano-30B-A3B",),
        Published(
            "nemotron_h",
            {
                **_MAMBA,
                **_NEMOTRON_EXPERTS,
                "layers_block_type": ["mamba", "moe", "attention", "mamba", "moe", "mamba"],
            },
            store=bfloat16,
        ),
    ),
    "nemotron_h-bfloat16": (
        ("NVIDIA-Nemotron-Nano-9B-v2",),
        Published(
            "nemotron_h",
            {**_MAMBA, "layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp", "mamba"]},
            store=bfloat16,
        ),
    ),
    "deepseek_v3-fp8": (
        ("DeepSeek-V3.1",),
        Published("deepseek_v3", {**MOE, **LATENT}, store=fp8_blocks, quantization=FP8_CONFIG),
    ),
    "deepseek_v32-fp8": (
        ("DeepSeek-V3.2",),
        Published("deepseek_v32", {**MOE, **LATENT, **_INDEXER}, store=fp8_blocks, quantization=FP8_CONFIG),
    ),
    "glm_moe_dsa-bfloat16": (
        ("GLM-5", "GLM-5.1"),
        Published("glm_moe_dsa", {**MOE, **LATENT, **_INDEXER}, store=bfloat16),
    ),
    "kimi_k2-fp8": (
        ("Kimi-K2-Instruct",),
        Published(
            "deepseek_v3",
            {**MOE, **LATENT, "n_group": 1},
            store=fp8_blocks,
            quantization=FP8_CONFIG,
            stored_as="kimi_k2",
        ),
    ),
    "kimi_k2-int4": (
        ("Kimi-K2-Thinking",),
        Published(
            "deepseek_v3",
            {**MOE, **LATENT, "n_group": 1},
            store=int4_groups,
            quantization=INT4_CONFIG,
            stored_as="kimi_k2",
        ),
    ),
    "kimi_k25-int4": (
        ("Kimi-K2.5", "Kimi-K2.6", "Kimi-K2.7-Code"),
        Published(
            "kimi_k25",
            {**MOE, **LATENT, "n_group": 1, "model_type": "deepseek_v3"},
            _KIMI_VISION,
            int4_groups,
            INT4_CONFIG,
            rename=_KIMI_NAMES,
        ),
    ),
    "minimax_m2-fp8": (
        ("MiniMax-M2.1", "MiniMax-M2.5", "MiniMax-M2.7"),
        Published(
            "minimax_m2", {"num_local_experts": 4, **MOE, "rotary_dim": 8}, store=fp8_blocks, quantization=FP8_CONFIG
        ),
    ),
    "gpt_oss-mxfp4": (
        ("gpt-oss-20b", "gpt-oss-120b"),
        Published(
            "gpt_oss",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
            store=mxfp4_experts,
            quantization=MXFP4_CONFIG,
        ),
    ),
    "gemma4-bfloat16": (("gemma-4-31b",), Published("gemma4", {**_GEMMA, "attention_k_eq_v": True}, {}, bfloat16)),
    "gemma4-small-bfloat16": (
        ("gemma-4-E2B", "gemma-4-E4B"),
        Published(
            "gemma4",
            {
                **_GEMMA,
                "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"] * 2,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": VOCAB,
                "num_kv_shared_layers": 1,
            },
            {},
            bfloat16,
        ),
    ),
    "gemma4-experts-bfloat16": (
        ("gemma-4-26b-a4b",),
        Published(
            "gemma4",
            {**_GEMMA, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
            {},
            bfloat16,
        ),
    ),
    "step3p5-bfloat16": (
        ("Step-3.5-Flash",),
        Published(
            "step3p7",
            {
                **MOE,
                "n_routed_experts": 4,
                "num_local_experts": 4,
                "share_expert_dim": 64,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 2,
                "mlp_layer_types": ["dense"] + ["sparse"] * 5,
            },
            {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
            bfloat16,
            stored_as="step3p5",
            text_only=True,
        ),
    ),
    "qwen3_vl-bfloat16": (("Qwen3-VL-4B-Instruct",), Published("qwen3_vl", {}, QWEN_VISION, bfloat16)),
}
"""Family and format -> the models published in it, and a small checkpoint of it."""

NOT_CUT = (
    (
        ("DeepSeek-V4-Flash", "DeepSeek-V4-Pro"),
        "deepseek_v4",
        "between its blocks there are several hidden states, and some blocks choose experts by the token",
    ),
)
"""Models, their family, and the reason of the refusal."""


@pytest.mark.default_cases(entry=("deepseek_v3-fp8", "gpt_oss-mxfp4", "gemma4-bfloat16"))
@pytest.mark.parametrize("entry", CATALOGUE)
def test_published_models_compute_the_same_as_transformers(entry: str, node: DhtDirectory, tmp_path: Path) -> None:
    _, published = CATALOGUE[entry]
    local: Any = published.write(tmp_path / "published", tmp_path / "plain")
    ids = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with local_swarm(tmp_path / "published", [(0, 1), (1, 4), (4, 6)], node=node, dtype="float32") as swarm:
        remote = swarm.model(dtype="float32")
        with torch.no_grad():
            logits, expected = remote(ids).logits, local(input_ids=ids).logits
        # Random indexers give many keys a score of zero, and the choice among these depends on the number of positions
        # per step.
        drafts = {"speculate": "off"} if "index_topk" in published.text else {}
        tokens = remote.generate(ids, attention_mask=torch.ones_like(ids), **options, **drafts)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(tokens, local.generate(ids, attention_mask=torch.ones_like(ids), **options))


@pytest.mark.parametrize(("family", "why"), [(family, why) for _, family, why in NOT_CUT])
def test_models_that_cannot_be_split_are_refused_with_the_reason(family: str, why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        check_can_be_cut(CONFIG_MAPPING[family]().get_text_config())


def test_the_catalogue_has_all_forty_nine_models() -> None:
    assert sum(len(models) for models, _ in CATALOGUE.values()) == 47
    assert sum(len(models) for models, *_ in NOT_CUT) == 2
