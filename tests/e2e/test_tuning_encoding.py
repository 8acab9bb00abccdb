"""Training examples, encoded by the demo model's tokenizer and chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from splitnet.errors import DataError
from splitnet.serve.answers.call_forms import FORMS, Forms
from splitnet.serve.answers.parser import AnswerParser
from splitnet.tools.tune.data import read_examples
from splitnet.tools.tune.run import IGNORED, Encoded, Encoder, collate
from tests.unit.serve.test_forms import TEMPLATES

pytestmark = pytest.mark.e2e


def encode(tmp_path: Path, tokenizer: Any, *examples: Any, max_length: int = 256, **options: Any) -> list[Encoded]:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, examples)))
    read = read_examples(file)
    return Encoder(tokenizer, max_length, labels=read.labels, **options).encode_file(read)


def learned(tokenizer: Any, row: Encoded) -> list[str]:
    """The parts of the text that have a loss."""
    stretches: list[list[int]] = []
    for before, target in zip([IGNORED, *row.targets], row.targets, strict=False):
        if target != IGNORED:
            if before == IGNORED:
                stretches.append([])
            stretches[-1].append(target)
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_only_answers_of_a_chat_are_learned(tmp_path: Path, tokenizer: Any) -> None:
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
    # The text before the answer is the prompt that the model gets.
    asked = tokenizer.apply_chat_template(messages[:4], add_generation_prompt=True)["input_ids"]
    assert row.ids[: len(asked)] == asked


def test_an_answer_whose_history_changes_later_has_its_own_row(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.role + ':' + m.content }};{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [{"role": role, "content": f"{role} text {n}"} for n in (1, 2) for role in ("user", "assistant")]
    rows = encode(tmp_path, tokenizer, {"messages": turns})
    assert [learned(tokenizer, row) for row in rows] == [["assistant text 1;"], ["assistant text 2;"]]
    assert tokenizer.decode(rows[1].ids) == "user:user text 1;user:user text 2;assistant:assistant text 2;"
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="line 1: this model has no chat template"):
        encode(tmp_path, tokenizer, {"messages": turns})


def call(name: str, id: str, /, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}}]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it dry in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", "a", city="Rome", days=3)]},
    {"role": "tool", "tool_call_id": "a", "content": '{"sky": "grey"}'},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "And in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [call("weather", "b", city="Oslo", days=1)]},
]
FAMILY = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", FORMS)
def test_calls_are_learned_in_the_format_of_the_family(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", FAMILY.replace("CALL", TEMPLATES[name]))
    (row,) = encode(tmp_path, tokenizer, {"messages": CALLED, "tools": TOOLS}, max_length=2048)
    end = "<|im_end|>\n"
    asked, answered, again = learned(tokenizer, row)
    assert answered == "It rains." + end
    for text, arguments in ((asked, {"city": "Rome", "days": 3}), (again, {"city": "Oslo", "days": 1})):
        assert text.endswith(end)
        parser = AnswerParser(Forms(FORMS[name]), {"weather": PARAMETERS}, "")
        read = [
            parser.push_text(text.removesuffix(end).removesuffix("</s>").removesuffix("<|eot_id|>")),
            parser.flush(),
        ]
        assert [(one.name, json.loads(one.arguments)) for said in read for one in said.calls] == [
            ("weather", arguments)
        ]
        assert not "".join(said.text for said in read).strip()
    unlearned = tokenizer.decode([id for id, target in zip(row.ids, row.targets, strict=True) if target == IGNORED])
    assert "Tells it." in unlearned and "grey" in unlearned and "Oslo?" in unlearned


def test_reasoning_is_learned_once_and_left_out_of_later_histories(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Qwen3's template, only answers after the user's last message keep their reasoning."""
    last = "{% set ns = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.at = loop.index0 %}"
    thinks = "{% if m.role == 'assistant' and loop.index0 > ns.at and (loop.last or m.reasoning_content) %}"
    thinks += "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    family = FAMILY.replace("CALL", TEMPLATES["hermes"]).replace("{{ m.content }}", thinks)
    monkeypatch.setattr(tokenizer, "chat_template", last + "{% endif %}{% endfor %}" + family)
    said = [dict(one) for one in CALLED]
    said[1]["reasoning_content"], said[3]["reasoning_content"] = "I ask.", "Grey is wet."
    first, second = encode(tmp_path, tokenizer, {"messages": said, "tools": TOOLS}, max_length=2048)
    asked, answered = learned(tokenizer, first)
    assert asked.startswith("<think>\nI ask.\n</think>\n\n<tool_call>\n") and '"Rome"' in asked
    assert answered == "<think>\nGrey is wet.\n</think>\n\nIt rains.<|im_end|>\n"
    (again,) = learned(tokenizer, second)
    assert again.startswith("<think>\n\n</think>\n\n<tool_call>\n") and '"Oslo"' in again
    history = tokenizer.decode(second.ids).removesuffix(again)
    assert "I ask." not in history and "Grey is wet." not in history and "It rains." in history


def test_a_turn_of_weight_0_is_encoded_but_not_learned(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [call("weather", "a", city="Rome"), call("weather", "b", city="Oslo")]
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "Where is it dry?"},
        {"role": "assistant", "content": "BAD", "weight": 0},
        {"role": "user", "content": "Look."},
        {"role": "assistant", "tool_calls": both, "weight": 0},
        {"role": "tool", "tool_call_id": "b", "content": "snow"},
        {"role": "tool", "tool_call_id": "a", "content": "sun"},
        {"role": "assistant", "content": "GOOD", "weight": 1},
    ]
    for name in ("hermes", "llama"):  # The second template takes one call per message.
        monkeypatch.setattr(tokenizer, "chat_template", FAMILY.replace("CALL", TEMPLATES[name]))
        (row,) = encode(tmp_path, tokenizer, {"messages": chat}, max_length=2048)
        assert learned(tokenizer, row) == ["GOOD<|im_end|>\n"]
        text = tokenizer.decode(row.ids)
        order = ["BAD", "Rome", "Oslo", "snow", "sun"] if name == "hermes" else ["BAD", "Rome", "sun", "Oslo", "snow"]
        assert sorted(order, key=text.index) == order


def test_calls_and_results_in_plain_text_are_encoded(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", FAMILY.replace("CALL", TEMPLATES["llama"]))
    texts = [("user", "?"), ("assistant", "ask(1)"), ("tool", "one"), ("assistant", "ask(2)"), ("tool", "two")]
    chat = [{"role": role, "content": text} for role, text in (*texts, ("assistant", "three"))]
    (row,) = encode(tmp_path, tokenizer, {"messages": chat})
    assert learned(tokenizer, row) == [f"{text}<|im_end|>\n" for text in ("ask(1)", "ask(2)", "three")]
    assert "one" in tokenizer.decode(row.ids) and "two" in tokenizer.decode(row.ids)


PLAIN = FAMILY.replace("CALL", "").replace("{{ tools | tojson }}", "")
HERMES = FAMILY.replace("CALL", TEMPLATES["hermes"])
THOUGHT = {"messages": [*CALLED[:1], {"role": "assistant", "content": "Yes.", "reasoning_content": "It may be."}]}


@pytest.mark.parametrize(
    ("template", "chat", "said"),
    [
        (PLAIN, {"messages": CALLED}, "leaves out 'weather'"),
        (PLAIN, {"messages": [CALLED[0], {**CALLED[1], "content": "I call weather."}]}, "leaves out 'weather'"),
        (PLAIN, {"messages": [CALLED[0], CALLED[3]], "tools": TOOLS}, "leaves out 'weather'"),
        (HERMES.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}"), {}, "leaves out 'One moment.'"),
        (HERMES.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), {}, 'leaves out \'{"sky": '),
        (HERMES, THOUGHT, "leaves out 'It may be.'"),
        (HERMES.replace("assistant\n{% endif", "assistant\n<think>{% endif"), THOUGHT, "answers with '.*<think>', but"),
        ("{{ raise_exception('no roles') }}", {}, "refuses the messages .no roles."),
    ],
)
def test_messages_omitted_by_a_template_are_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, chat: Any, said: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    spoken = [CALLED[0], {**CALLED[1], "content": "One moment.", "weight": 1}, *CALLED[2:]]
    if "sky" in said:
        spoken[1]["content"] = ""
    with pytest.raises(DataError, match=f"line 1: .*{said}"):
        encode(tmp_path, tokenizer, {"messages": spoken, **chat}, max_length=2048)


def test_completions_have_an_end_token(tmp_path: Path, tokenizer: Any) -> None:
    (row,) = encode(tmp_path, tokenizer, {"prompt": "The sky is", "completion": " blue today"})
    assert tokenizer.decode(row.ids) == "The sky is blue today<|im_end|>"
    assert learned(tokenizer, row) == [" blue today<|im_end|>"]


def test_a_long_text_is_split_without_loss(tmp_path: Path, tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog, " * 9
    rows = encode(tmp_path, tokenizer, {"text": text}, max_length=16)
    assert len(rows) > 4
    assert tokenizer.decode([token for row in rows for token in row.ids]) == text + "<|im_end|>"
    assert all(row.targets == [IGNORED, *row.ids[1:]] for row in rows)


def test_other_long_examples_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="line 2: 31 tokens are more than 16: shorten it or raise --max-length"):
        short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a" + " b" * 28, "completion": " c"}
        encode(tmp_path, tokenizer, short, long, max_length=16)


def test_labels_are_encoded_as_words(tmp_path: Path, tokenizer: Any) -> None:
    examples = {"text": "it is dark", "label": "lights"}, {"text": "a song", "label": "music"}
    rows = encode(tmp_path, tokenizer, *examples, template="{text} ->")
    assert tokenizer.decode(rows[0].ids) == "it is dark -> lights<|im_end|>"
    assert learned(tokenizer, rows[1]) == [" music<|im_end|>"]
    assert [row.choice for row in rows] == [0, 1]
    words = Encoder(tokenizer, 16, labels=["lights", "music"]).words()
    assert tokenizer.batch_decode([[word] for word in words]) == [" lights", " music"]
    with pytest.raises(DataError, match=r"'blue sky' and 'blue sea' begin with the same token.*--head"):
        Encoder(tokenizer, 16, labels=["blue sky", "blue sea"]).words()


def test_labels_are_encoded_for_a_head(tmp_path: Path, tokenizer: Any) -> None:
    rows = encode(tmp_path, tokenizer, {"text": "it is dark", "label": "b"}, {"text": "x", "label": "a"}, head=True)
    assert tokenizer.decode(rows[0].ids) == "it is dark"
    batch = collate(rows, pad=2, head=True)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"][1].tolist() == [rows[1].ids[0], 2, 2]


def test_a_label_missing_in_the_training_data_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text('{"text": "a", "label": "weather"}')
    with pytest.raises(DataError, match="line 1: the label 'weather' is not in the training data: lights, music"):
        Encoder(tokenizer, 16, labels=["lights", "music"]).encode_file(read_examples(file))


def test_a_text_of_one_token_without_an_end_token_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    assert encode(tmp_path, tokenizer, {"text": "The"})[0].learned == 1  # The end token.
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="line 1: there is nothing to learn"):
        encode(tmp_path, endless, {"text": "The"})
