"""The client part of classifiers, over spans in this process, against transformers' whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    PreTrainedModel,
)

from splitnet.blocks.client_part import load_classifier_part
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import UnsupportedModel
from tests.unit.blocks.test_span_families import LocalChain
from tests.unit.random_models import random_checkpoint

LABELS = 3
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "opt": {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "bloom": {},
    "gpt_neox": {},
    "gemma3_text": {"layer_types": ["sliding_attention"] * 4},
}


def shell_of(folder: Path) -> PreTrainedModel:
    checkpoint = Checkpoint.open(folder)
    config = copy.deepcopy(checkpoint.config)
    config.num_labels = LABELS
    torch.manual_seed(2)
    spans = [Span.load(checkpoint, 0, 1), Span.load(checkpoint, 1, 4)]
    return load_classifier_part(checkpoint, config, LocalChain(spans)).eval()


def assert_same_logits(client_part: Any, whole: Any) -> None:
    ids = torch.randint(3, 280, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = client_part(ids).logits, whole(ids).logits
    assert expected.shape == (2, LABELS)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_on_a_causal_checkpoint(family: str, tmp_path: Path) -> None:
    random_checkpoint(family, tmp_path, blocks=4, **FAMILIES[family])
    client_part = shell_of(tmp_path)
    torch.manual_seed(2)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=LABELS, dtype=torch.float32)
    assert_same_logits(client_part, whole.eval())


def test_the_head_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = sizes | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "sliding_window": 8, "pad_token_id": 0}
    config = Gemma3Config(
        text_config=text,  # type: ignore[arg-type]
        vision_config=sizes | {"image_size": 32, "patch_size": 8},  # type: ignore[arg-type]
        mm_tokens_per_image=4,
        image_token_index=290,
    )
    config.num_labels = LABELS
    torch.manual_seed(1)
    whole = Gemma3ForSequenceClassification(config).eval()
    nn.init.normal_(whole.score.weight)
    whole.save_pretrained(tmp_path)
    client_part = shell_of(tmp_path)
    assert_same_logits(client_part, whole)


def test_what_is_missing_besides_the_head_is_an_error(tmp_path: Path) -> None:
    random_checkpoint("llama", tmp_path, blocks=4)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.client_part_names_of = tuple(
        name for name in checkpoint.client_part_names_of if name != "model.norm.weight"
    )
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight is missing"):
        load_classifier_part(checkpoint, checkpoint.config, nn.Identity())


def test_a_family_without_classifiers_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint("granite", tmp_path, blocks=2))
    with pytest.raises(UnsupportedModel, match="no sequence classification for models of the family 'granite'"):
        load_classifier_part(checkpoint, checkpoint.config, nn.Identity())
