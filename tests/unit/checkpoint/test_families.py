"""Configs from strangers are refused before transformers acts on their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitnet.checkpoint.checkpoint import open_store
from splitnet.checkpoint.families import MAX_LABELS, MAX_LAYERS
from splitnet.errors import UnsupportedModel

TINY = {"hidden_size": 8, "intermediate_size": 8, "model_type": "llama", "num_attention_heads": 1, "vocab_size": 4}


def config_of(folder: Path, **values: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 1, **values}))
    return open_store(folder).config


@pytest.mark.parametrize(
    "values",
    [
        {"num_labels": MAX_LABELS + 1},
        {"num_hidden_layers": MAX_LAYERS + 1},
        {"text_config": {"text_config": {"num_labels": MAX_LABELS + 1}}},
        {"a": {"b": {"c": {"attn_implementation": "somebody/kernels"}}}},
    ],
)
def test_huge_lists_and_foreign_code_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"are taken|code of hub repositories is not run"):
        config_of(tmp_path, **values)


def test_usual_values_are_accepted(tmp_path: Path) -> None:
    assert config_of(tmp_path, num_labels=1000).num_labels == 1000
