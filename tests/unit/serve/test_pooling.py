"""How embeddings are made, read from the files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitnet.errors import ModelNotFound
from splitnet.serve.generation import group_by_length
from splitnet.serve.pooling import Pooling

ST = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules.pooling."


def modules(*kinds: str) -> list[dict[str, str]]:
    return [{"type": kind, "path": f"{index}_x" if index else ""} for index, kind in enumerate(kinds)]


QWEN3 = modules(f"{ST}Transformer", f"{ST}Pooling", f"{ST}Normalize")
LAST = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
SCORED = modules("a.Transformer", "sentence_transformers.cross_encoder.modules.logit_score.LogitScore")


class Store:
    """Files in a folder, and a config."""

    def __init__(self, folder: Path, files: dict[str, Any], config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def find_file(self, name: str) -> Path | None:
        return self.folder / name if (self.folder / name).is_file() else None

    def told_config(self) -> str:
        return json.dumps(self.config)


def pooling_of(folder: Path, files: dict[str, Any], config: dict[str, Any] | None = None, most: int = 512) -> Pooling:
    tokenizer = SimpleNamespace(convert_tokens_to_ids={"yes": 7, "no": 8}.get)
    store: Any = Store(folder, files, config or {})
    checkpoint: Any = SimpleNamespace(store=store, max_positions=most, tokenizer=lambda: tokenizer)
    return Pooling.of(checkpoint)


def test_files_of_sentence_transformers_are_read(tmp_path: Path) -> None:
    told = pooling_of(
        tmp_path,
        {
            "modules.json": QWEN3,
            "1_x/config.json": LAST,
            "config_sentence_transformers.json": {"prompts": {"query": "Q:"}, "default_prompt_name": None},
            "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        },
    )
    assert told == Pooling(prompts={"query": "Q:"}, most=256, told=True)
    assert told.sentence == "embeddings are the last token's state, normalised, as the checkpoint says"


@pytest.mark.parametrize(
    ("pooled", "mode"),
    [
        ({"pooling_mode": "lasttoken", "include_prompt": True}, "lasttoken"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
    ],
)
def test_modes(tmp_path: Path, pooled: dict[str, Any], mode: str) -> None:
    kinds = modules("sentence_transformers.base.modules.transformer.Transformer", f"{NEW}Pooling")
    told = pooling_of(tmp_path, {"modules.json": kinds, "1_x/config.json": pooled})
    assert (told.mode, told.normalizes, told.refused, told.most) == (mode, False, "", 512)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"modules.json": modules(f"{ST}Transformer", f"{ST}Pooling", f"{ST}Dense")}, "Dense"),
        ({"1_x/config.json": {"pooling_mode_max_tokens": True}}, "max"),
        ({"1_x/config.json": LAST | {"pooling_mode_mean_tokens": True}}, "lasttoken"),
        ({"1_x/config.json": {}}, "damaged"),
        ({"1_x/config.json": "["}, "damaged"),
        ({"modules.json": "[" * 10_000}, "damaged"),
        ({"modules.json": {"type": 1}}, "damaged"),
        ({"modules.json": [{"type": "Pooling", "path": "../elsewhere"}]}, "elsewhere"),
        ({"sentence_bert_config.json": {"do_lower_case": True}}, "do_lower_case"),
        (
            {
                "1_x/config.json": {"pooling_mode": "mean", "include_prompt": False},
                "config_sentence_transformers.json": {"prompts": {"query": "Q:"}},
            },
            "include_prompt",
        ),
    ],
)
def test_unknown_descriptions_are_refused(tmp_path: Path, files: dict[str, Any], why: str) -> None:
    told = pooling_of(tmp_path, {"modules.json": QWEN3, "1_x/config.json": LAST} | files)
    assert why in told.refused and not told.reranks and told.sentence == f"no embeddings: {told.refused}"


def test_an_unreachable_hub_is_not_a_missing_description() -> None:
    def find(name: str) -> None:
        raise ModelNotFound("the hub cannot be reached")

    checkpoint: Any = SimpleNamespace(store=SimpleNamespace(find_file=find), max_positions=None)
    assert Pooling.of(checkpoint) == Pooling(refused="the hub cannot be reached")


def test_defaults_without_a_description(tmp_path: Path) -> None:
    told = pooling_of(tmp_path, {"README.md": "# Qwen3-0.6B\n"})
    assert told == Pooling(most=512)
    assert told.sentence == "embeddings are the last token's state, normalised, as the checkpoint says nothing of them"


@pytest.mark.parametrize(("number", "mode"), [(1, "mean"), (2, "cls"), (3, "lasttoken")])
def test_metadata_of_gguf_files(tmp_path: Path, number: int, mode: str) -> None:
    assert pooling_of(tmp_path, {}, {"pooling_type": number}) == Pooling(mode=mode, most=512, told=True)


def test_a_mode_of_a_gguf_file_that_is_not_known_is_refused(tmp_path: Path) -> None:
    assert pooling_of(tmp_path, {}, {"pooling_type": 4}).refused


@pytest.mark.parametrize(
    ("files", "reranks"),
    [
        ({"README.md": "---\nlicense: x\n---\n# Qwen3-Reranker-8B\n"}, True),
        ({"modules.json": SCORED, "1_x/config.json": {"true_token_id": 7, "false_token_id": 8}}, True),
        ({"modules.json": SCORED, "1_x/config.json": {"true_token_id": 7, "false_token_id": None}}, False),
        ({"modules.json": SCORED, "1_x/config.json": {"true_token_id": 8, "false_token_id": 7}}, False),
    ],
)
def test_rerankers(tmp_path: Path, files: dict[str, Any], reranks: bool) -> None:
    told = pooling_of(tmp_path, files)
    assert (told.reranks, told.refused) == (reranks, "the model is a reranker")


def test_vectors() -> None:
    states = [torch.tensor([[3.0, 4.0, 9.0], [1.0, 0.0, 9.0]]), torch.tensor([[0.0, 2.0, 9.0]])]
    assert Pooling().pool(states, 2).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert Pooling(mode="mean", normalizes=False).pool(states).tolist() == [[2.0, 2.0, 9.0], [0.0, 2.0, 9.0]]
    assert torch.allclose(Pooling(mode="cls").pool(states, 2), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_texts_of_similar_lengths_are_read_together() -> None:
    assert group_by_length([3, 9, 2, 3, 1], 9) == [[1], [0, 3, 2], [4]]
    assert group_by_length([20], 9) == [[0]]
