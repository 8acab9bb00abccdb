"""A checkpoint with tensors that its model does not take is refused, with their names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitnet.blocks.client_part import load_classifier_part, load_client_part
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import UnsupportedModel
from splitnet.tools.doctor.machine_checks import Status, open_model
from tests.unit.quantized_checkpoints import quantized_pair, tensors_of, write_checkpoint
from tests.unit.random_models import random_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama", blocks=2)


def _with(source: Path, folder: Path, *names: str, **config: Any) -> Path:
    """A copy with one more tensor of each of these names."""
    tensors = tensors_of(source) | {name: torch.ones(4) for name in names}
    return write_checkpoint(folder, source, tensors, json.loads((source / "config.json").read_text()) | config)


def _load_block(checkpoint: Checkpoint) -> object:
    return Span.load(checkpoint, 1, 2)


def _load_shell(checkpoint: Checkpoint) -> object:
    return load_client_part(checkpoint, nn.Identity())


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("model.layers.1.self_attn.q_proj.bias", _load_block),
        ("model.layers.1.self_attn.q_proj.weight_scale_inv", _load_block),
        ("model.layers.1.mlp.shared_expert.up_proj.weight", _load_block),
        ("model.layers.2.self_attn.q_proj.weight", _load_block),  # a block that does not exist
        ("model.norm.bias", _load_shell),
        ("v_head.summary.weight", _load_shell),
    ],
)
def test_one_tensor_too_many(name: str, load: Callable[[Checkpoint], object], llama: Path, tmp_path: Path) -> None:
    folder = _with(llama, tmp_path / "more", name)
    with pytest.raises(UnsupportedModel, match=name.replace(".", r"\.")):
        load(Checkpoint.open(folder))
    found, checkpoint = open_model(str(folder))
    assert found.status is Status.failed and name in found.text and checkpoint is None


def test_the_first_of_many_are_named(llama: Path, tmp_path: Path) -> None:
    folder = _with(llama, tmp_path / "more", *(f"model.layers.0.mlp.gate{index}.weight" for index in range(7)))
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.gate0\.weight.*gate2\.weight and 4 more"):
        Span.load(Checkpoint.open(folder), 0, 1)
    assert Span.load(Checkpoint.open(folder), 1, 2).start == 1  # its tensors are complete


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (("model.layers.0.self_attn.rotary_emb.inv_freq",), {}),
        (("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"), {}),
        (("model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight"), {"num_nextn_predict_layers": 1}),
    ],
)
def test_tensors_that_are_ignored_on_purpose(
    names: tuple[str, ...], config: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    folder = _with(llama, tmp_path / "more", *names, **config)
    checkpoint = Checkpoint.open(folder)
    assert open_model(str(folder))[0].status is Status.passed
    assert Span.load(checkpoint, 0, 2).end == 2
    load_client_part(checkpoint, nn.Identity())


def test_a_family_lists_ignored_tensors(tmp_path: Path) -> None:
    source = random_checkpoint("gpt2", tmp_path / "gpt2", blocks=2)
    folder = _with(source, tmp_path / "more", "transformer.h.0.attn.bias")
    assert Span.load(Checkpoint.open(folder), 0, 2).end == 2
    assert open_model(str(folder))[0].status is Status.passed


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "gpt_neox", "gemma3_text"])
def test_names_that_transformers_converts_are_taken(family: str, tmp_path: Path) -> None:
    found, _ = open_model(str(random_checkpoint(family, tmp_path / family, blocks=4)))
    assert found.status is Status.passed, found.text


def test_a_classifier_leaves_the_head_of_a_causal_model(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    config = checkpoint.config
    config.num_labels, config.pad_token_id = 3, 0
    assert "lm_head.weight" in checkpoint.store.tensor_names
    load_classifier_part(checkpoint, config, nn.Identity())


def test_a_multimodal_checkpoint(llama: Path, tmp_path: Path) -> None:
    text = json.loads((llama / "config.json").read_text())
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {"model_type": "pixtral"}}
    known = {f"language_model.{name}": tensor for name, tensor in tensors_of(llama).items()}
    known |= {"vision_tower.ln_pre.weight": torch.ones(4), "multi_modal_projector.norm.weight": torch.ones(4)}
    folder = write_checkpoint(tmp_path / "known", llama, known, config)
    assert open_model(str(folder))[0].status is Status.passed
    for name in ("language_model.model.layers.0.mlp.extra.weight", "language_model.model.extra.weight", "extra.weight"):
        folder = write_checkpoint(tmp_path / name, llama, known | {name: torch.ones(4)}, config)
        found, _ = open_model(str(folder))
        assert found.status is Status.failed and name in found.text


def test_integers_without_a_config(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = tensors_of(llama)
    tensors |= {name: (tensors[name] * 100).to(torch.int8), "model.layers.1.attn.bias": torch.ones(1, 1, 4, 4).byte()}
    folder = write_checkpoint(tmp_path / "integers", llama, tensors, json.loads((llama / "config.json").read_text()))
    with pytest.raises(UnsupportedModel, match=f"{name}.* in integers"):
        _load_block(Checkpoint.open(folder))


def test_biases_of_zeros(llama: Path, tmp_path: Path) -> None:
    """AutoGPTQ stores one with every layer, even if the model has none."""
    folder, _ = quantized_pair(llama, tmp_path, "gptq")
    config = json.loads((folder / "config.json").read_text())
    bias = "model.layers.0.mlp.up_proj.bias"
    zero = write_checkpoint(tmp_path / "zero", folder, tensors_of(folder) | {bias: torch.zeros(128)}, config)
    assert Span.load(Checkpoint.open(zero), 0, 1).end == 1
    assert open_model(str(zero))[0].status is Status.passed
    other = write_checkpoint(tmp_path / "other", folder, tensors_of(folder) | {bias: torch.ones(128)}, config)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.up_proj\.bias"):
        Span.load(Checkpoint.open(other), 0, 1)
