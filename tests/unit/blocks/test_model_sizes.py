from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from splitnet.blocks.model_sizes import ModelSizes
from splitnet.blocks.span import Span, block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import ModelNotFound, UnsupportedModel
from splitnet.quant.choose import WeightChoice
from tests.unit.random_models import HYBRIDS, SPARSE, random_checkpoint, random_config

BFLOAT16 = WeightChoice("bfloat16", torch.bfloat16)


def config_only(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    return folder


OVERRIDES = {
    "deepseek_v3": {
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
    }
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "deepseek_v3", "gemma3_text"])
def test_sizes_from_the_config_equal_those_that_a_peer_loads(family: str, tmp_path: Path) -> None:
    folder = random_checkpoint(family, tmp_path / "whole", blocks=2, **OVERRIDES.get(family, {}))
    sizes = ModelSizes.of(config_only(folder, tmp_path / "config"))
    checkpoint = Checkpoint.open(folder)
    span = Span.load(checkpoint, 1, 2)
    assert sizes.num_blocks == 2
    assert sizes.dtype == "float32"
    assert sizes.hidden_size == checkpoint.hidden_size
    assert sizes.block_bytes == block_bytes(checkpoint, None)
    assert sizes.kv_bytes == span.kv_bytes_per_position
    assert sizes.client_part_bytes == checkpoint.bytes_of(checkpoint.client_part_names_of, None)
    assert ModelSizes.of(folder, "bfloat16").block_bytes == block_bytes(checkpoint, "bfloat16")


@pytest.mark.default_cases(family=("qwen3_next", "nemotron_h", "lfm2", "jamba"))
@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h", "lfm2", "jamba", "deepseek_v32"])
def test_states_are_counted_from_the_config_too(family: str, tmp_path: Path) -> None:
    folder = random_checkpoint(family, tmp_path / "whole", **(HYBRIDS | SPARSE)[family])
    sizes = ModelSizes.of(config_only(folder, tmp_path / "config"), "bfloat16")
    span = Span.load(Checkpoint.open(folder), 0, 6, dtype="bfloat16")
    assert 0 <= 6 * sizes.kv_bytes - span.kv_bytes_per_position < 6
    assert 0 <= 6 * sizes.state_bytes - span.state_bytes < 6
    assert bool(sizes.state_bytes) == (family != "deepseek_v32")


def test_arithmetic_is_that_of_the_weights_that_a_position_uses() -> None:
    dense = ModelSizes.of_config("dense", random_config("llama", blocks=1, hidden=64, vocab=300), BFLOAT16)
    assert dense.expert_bytes == 0
    assert dense.flops_per_position == dense.block_bytes  # 2 bytes and 2 operations a weight
    assert dense.head_bytes == 300 * 64 * 2
    mixture = ModelSizes.of_config("moe", random_config("mixtral", blocks=1, hidden=64, vocab=300), BFLOAT16)
    assert mixture.expert_share == 0.5
    assert mixture.expert_bytes == 4 * 3 * 64 * 128 * 2
    assert mixture.flops_per_position == mixture.block_bytes - mixture.expert_bytes / 2


def test_models_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no folder"):
        ModelSizes.of(tmp_path / "nowhere")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "config.json").write_text('{"model_type": "gemma3n_text"}')
    with pytest.raises(UnsupportedModel, match="share states with each other"):
        ModelSizes.of(tmp_path / "shared")
    (tmp_path / "shared" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UnsupportedModel, match="does not know the architecture"):
        ModelSizes.of(tmp_path / "shared")
