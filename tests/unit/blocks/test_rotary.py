"""Rotary embeddings."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import HunYuanVLTextConfig, LlamaConfig, Qwen2VLTextConfig
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from splitnet.blocks.rotary import axes_of

qwen2_rope: Any = Qwen2VLRotaryEmbedding  # annotated with the config of the whole model
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}


def rope(sections: list[int]) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


@pytest.mark.parametrize(
    ("embedding", "axes"),
    [
        (LlamaRotaryEmbedding(LlamaConfig(**SIZES)), 1),
        (qwen2_rope(Qwen2VLTextConfig(**SIZES, rope_parameters=rope([4, 2, 2]))), 3),
        (HunYuanVLRotaryEmbedding(HunYuanVLTextConfig(**SIZES, rope_parameters=rope([2, 2, 2, 2]))), 4),
        (None, 1),
    ],
    ids=["one", "three", "four", "none"],
)
def test_the_axes_of_positions_are_found_by_a_trial(embedding: nn.Module | None, axes: int) -> None:
    assert axes_of(embedding, 64) == axes
