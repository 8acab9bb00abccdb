"""Examples as the demo model's tokenizer and chat template write them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from splitnet.errors import DataError
from splitnet.tools.tune.data import read_examples
from splitnet.tools.tune.run import IGNORED, Encoded, Encoder, collate

pytestmark = pytest.mark.e2e


def encode(tmp_path: Path, tokenizer: Any, *examples: Any, max_length: int = 256, **options: Any) -> list[Encoded]:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, examples)))
    read = read_examples(file)
    return Encoder(tokenizer, max_length, labels=read.labels, **options).encode(read)


def learned(tokenizer: Any, row: Encoded) -> list[str]:
    """The stretches of text that have a loss."""
    stretches: list[list[int]] = []
    for before, target in zip([IGNORED, *row.targets], row.targets, strict=False):
        if target != IGNORED:
            if before == IGNORED:
                stretches.append([])
            stretches[-1].append(target)
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_answers_of_a_chat_are_learned_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four."},
    ]
    (row,) = encode(tmp_path, tokenizer, {"messages": messages})
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert learned(tokenizer, row) == ["Two.<|im_end|>\n", "Four.<|im_end|>\n"]
    # What comes before the answer is what the model is asked with.
    asked = tokenizer.apply_chat_template(messages[:4], add_generation_prompt=True)["input_ids"]
    assert row.ids[: len(asked)] == asked


def test_a_template_that_rewrites_earlier_answers_is_told(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.role + ':' + m.content }};{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [{"role": role, "content": "text"} for role in ("user", "assistant")]
    (row,) = encode(tmp_path, tokenizer, {"messages": turns})
    assert learned(tokenizer, row) == ["text;"]
    with pytest.raises(DataError, match=r"line 1: .*give one answer only"):
        encode(tmp_path, tokenizer, {"messages": turns * 2})
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="line 1: this model has no chat template"):
        encode(tmp_path, tokenizer, {"messages": turns})


def test_completions_end(tmp_path: Path, tokenizer: Any) -> None:
    (row,) = encode(tmp_path, tokenizer, {"prompt": "The sky is", "completion": " blue today"})
    assert tokenizer.decode(row.ids) == "The sky is blue today<|im_end|>"
    assert learned(tokenizer, row) == [" blue today<|im_end|>"]


def test_long_text_is_cut_and_nothing_is_lost(tmp_path: Path, tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog, " * 9
    rows = encode(tmp_path, tokenizer, {"text": text}, max_length=16)
    assert len(rows) > 4
    assert tokenizer.decode([token for row in rows for token in row.ids]) == text + "<|im_end|>"
    assert all(row.targets == [IGNORED, *row.ids[1:]] for row in rows)


def test_other_examples_are_not_cut(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="line 2: 31 tokens are more than 16: shorten it or raise --max-length"):
        short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a" + " b" * 28, "completion": " c"}
        encode(tmp_path, tokenizer, short, long, max_length=16)


def test_labels_by_words(tmp_path: Path, tokenizer: Any) -> None:
    examples = {"text": "it is dark", "label": "lights"}, {"text": "a song", "label": "music"}
    rows = encode(tmp_path, tokenizer, *examples, template="{text} ->")
    assert tokenizer.decode(rows[0].ids) == "it is dark -> lights<|im_end|>"
    assert learned(tokenizer, rows[1]) == [" music<|im_end|>"]
    assert [row.choice for row in rows] == [0, 1]
    words = Encoder(tokenizer, 16, labels=["lights", "music"]).words()
    assert tokenizer.batch_decode([[word] for word in words]) == [" lights", " music"]
    with pytest.raises(DataError, match=r"'blue sky' and 'blue sea' begin with the same token.*--head"):
        Encoder(tokenizer, 16, labels=["blue sky", "blue sea"]).words()


def test_labels_by_a_head(tmp_path: Path, tokenizer: Any) -> None:
    rows = encode(tmp_path, tokenizer, {"text": "it is dark", "label": "b"}, {"text": "x", "label": "a"}, head=True)
    assert tokenizer.decode(rows[0].ids) == "it is dark"
    batch = collate(rows, pad=2, head=True)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"][1].tolist() == [rows[1].ids[0], 2, 2]


def test_a_label_that_training_does_not_know(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text('{"text": "a", "label": "weather"}')
    with pytest.raises(DataError, match="line 1: the label 'weather' is none of the training data's: lights, music"):
        Encoder(tokenizer, 16, labels=["lights", "music"]).encode(read_examples(file))


def test_a_text_of_one_token_teaches_nothing(tmp_path: Path, tokenizer: Any) -> None:
    assert encode(tmp_path, tokenizer, {"text": "The"})[0].learned == 1  # the end
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="line 1: nothing to learn"):
        encode(tmp_path, endless, {"text": "The"})
