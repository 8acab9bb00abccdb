"""Prompts for the text between a prefix and a suffix with the marks of each family, and the ends of such answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import AddedToken

from splitnet.serve.failures import ApiError
from splitnet.serve.infill import MARKS, InfillMarks
from splitnet.serve.prompts import Prompts
from tests.unit.serve.stand_in import MODEL, client

BEFORE, AFTER = "def add(a, b):\n    ", "\n    return total\n"


def with_marks(shared_tokenizer: Any, *marks: str, special: bool = False) -> Any:
    tokenizer = copy.deepcopy(shared_tokenizer)
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks if mark])
    return tokenizer


def prompts_of(tokenizer: Any, positions: int = 1024) -> Prompts:
    return Prompts(tokenizer, len(tokenizer), positions)


def shown(prompts: Prompts, tokens: list[int]) -> str:
    return prompts.decode_all(tokens)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks.prefix)
def test_a_prompt_has_the_marks_of_the_family_in_its_order(
    marks: InfillMarks, special: bool, shared_tokenizer: Any
) -> None:
    tokenizer = with_marks(shared_tokenizer, marks.prefix, marks.suffix, marks.middle, special=special)
    prompts = prompts_of(tokenizer)
    tokens = prompts.tokens_of_gap(BEFORE, AFTER)
    parts = [marks.prefix + BEFORE, marks.suffix + AFTER]
    parts.reverse() if marks.suffix_first else None
    assert shown(prompts, tokens) == "".join(parts) + marks.middle
    named = {tokenizer.convert_tokens_to_ids(mark) for mark in (marks.prefix, marks.suffix, marks.middle) if mark}
    assert [token for token in tokens if token in named] == [token for token in tokens if token >= 49152], (
        "each mark is one token"
    )
    assert named <= prompts.infill_ends


@pytest.mark.parametrize("special", [False, True])
def test_marks_in_texts_of_users_stay_text(special: bool, shared_tokenizer: Any) -> None:
    marks = MARKS[0]
    tokenizer = with_marks(
        shared_tokenizer, marks.prefix, marks.suffix, marks.middle, "<|repo_name|>", "<|file_sep|>", special=special
    )
    prompts = prompts_of(tokenizer)
    text = f"a{marks.middle}b<|file_sep|><|repo_name|>{marks.prefix}{marks.suffix}<|endoftext|>"
    tokens = prompts.tokens_of_gap(text, text, [(text, text)])
    added = [prompts.text_of(token) for token in tokens if token >= 49152 or token < 17]
    assert added == [
        *("<|repo_name|>", "<|file_sep|>", "<|file_sep|>"),
        *(marks.prefix, marks.suffix, marks.middle),
    ]
    assert shown(prompts, tokens).count(text) == 4


def test_other_files_come_before_with_marks_or_as_snippets(shared_tokenizer: Any) -> None:
    files = [("a.py", "A = 1\n"), ("b.py", "B = 2\n")]
    marks = MARKS[0]
    prompts = prompts_of(with_marks(shared_tokenizer, marks.prefix, marks.suffix, marks.middle, "<|file_sep|>"))
    repository = "<|file_sep|>a.py\nA = 1\n<|file_sep|>b.py\nB = 2\n<|file_sep|>filename\n"
    whole = shown(prompts, prompts.tokens_of_gap(BEFORE, AFTER, files))
    assert whole.endswith(repository + f"{marks.prefix}{BEFORE}{marks.suffix}{AFTER}{marks.middle}")
    room = prompts_of(prompts._tokenizer, 40)  # pyright: ignore[reportPrivateUsage]
    asked = len(prompts.tokens_of_gap(BEFORE, AFTER))
    cut = room.tokens_of_gap(BEFORE, AFTER, files * 9, 8)
    assert len(cut) == 32 and cut[-asked:] == prompts.tokens_of_gap(BEFORE, AFTER), "their end is read, as room is left"


def test_the_marks_that_a_file_of_the_model_names_are_used(shared_tokenizer: Any) -> None:
    tokenizer = with_marks(shared_tokenizer, "<p>", "<s>", "<m>", *(MARKS[0].prefix, MARKS[0].suffix, MARKS[0].middle))
    tokenizer.infill_marks = ["<p>", "<s>", "<m>"]
    prompts = prompts_of(tokenizer)
    assert shown(prompts, prompts.tokens_of_gap("a", "b")) == "<p>a<s>b<m>"
    assert tokenizer.convert_tokens_to_ids("<m>") in prompts.infill_ends
    tokenizer = with_marks(shared_tokenizer, "[PREFIX]", "[SUFFIX]")
    tokenizer.infill_marks = ["[PREFIX]", "[SUFFIX]", ""]
    prompts = prompts_of(tokenizer)
    assert shown(prompts, prompts.tokens_of_gap("a", "b")) == "[SUFFIX]b[PREFIX]a"


def test_a_model_without_marks_is_named(shared_tokenizer: Any) -> None:
    with pytest.raises(ApiError, match="no marks for a text before a suffix"):
        prompts_of(with_marks(shared_tokenizer)).tokens_of_gap("a", "b")


MIDDLE = "total = a + b"
VSCODE = {
    "id_slot": 0,
    "input_prefix": "def add(a, b):\n",
    "input_suffix": AFTER,
    "input_extra": [{"text": "A = 1\n", "time": 1, "filename": "a.py"}],
    "prompt": "    ",
    "n_predict": 128,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
}
"""The body that llama.vscode sends to `/infill` (`createRequestPayload` in its `llama-server.ts`)."""
WARM = {**VSCODE, "input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0, "samplers": []}


@pytest.fixture
def coder(shared_tokenizer: Any) -> Any:
    return with_marks(shared_tokenizer, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")


def test_the_request_of_an_editor_gets_the_middle(coder: Any) -> None:
    http, writer = client(coder, lambda prompt: [f"{MIDDLE}<|fim_pad|>{AFTER}"])
    reply = http.post("/infill", json=VSCODE)
    assert reply.status_code == 200, reply.text
    said = reply.json()
    assert said["content"] == MIDDLE and said["stop"] is True and said["truncated"] is False
    assert said["timings"]["predicted_n"] == said["tokens_predicted"] > 0 and "tokens_cached" in said
    prompt = writer.decode_prompt(0)
    assert prompt.endswith(f"A = 1\n<file_sep>filename\n<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>")
    events = [line for line in http.post("/infill", json=VSCODE | {"stream": True}).text.split("\n\n") if line]
    assert len(events) > 2 and '"stop":true' in events[-1]
    assert http.post("/infill", json=WARM).json()["content"] == ""
    assert "logprobs is not" in http.post("/infill", json=VSCODE | {"logprobs": 2}).json()["error"]["message"]


def test_suffix_is_honoured_or_refused_by_its_name(coder: Any) -> None:
    http, writer = client(coder, lambda prompt: [f"{MIDDLE}<|fim_pad|>{AFTER}"])
    body = {"prompt": BEFORE, "suffix": AFTER, "max_tokens": 64, "logprobs": 1}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (MIDDLE, "stop")
    asked = {"model": MODEL, "prompt": BEFORE, "suffix": AFTER, "stream": False}
    said = http.post("/api/generate", json=asked).json()
    assert (said["response"], said["done_reason"]) == (MIDDLE, "stop")
    empty = http.post("/api/generate", json=asked | {"prompt": ""}).json()
    assert empty["response"] == MIDDLE
    assert "insert" in http.post("/api/show", json={"model": MODEL}).json()["capabilities"]
    assert (
        writer.decode_prompt(0)
        == writer.decode_prompt(1)
        == f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>"
    )
    for more in ({"echo": True}, {"truncate_prompt_tokens": 5}, {"prompt": [5, 6]}):
        refused = http.post("/v1/completions", json=body | more)
        assert refused.status_code == 400 and "suffix needs a text" in refused.json()["error"]["message"]
    for more in ({"raw": True}, {"system": "Be brief."}, {"think": True}):
        refused = http.post("/api/generate", json=asked | more)
        assert refused.status_code == 400 and "exclude each other" in refused.json()["error"]
    ignored = http.post("/v1/completions", json=body | {"ignore_eos": True}).json()["choices"][0]
    assert AFTER in ignored["text"], "ignore_eos holds for marks, too"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/api/generate", {"model": MODEL, "prompt": "a", "suffix": "b"}),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
    ],
)
def test_a_request_to_a_model_without_marks_is_a_400(path: str, body: dict[str, Any], shared_tokenizer: Any) -> None:
    http, _ = client(with_marks(shared_tokenizer), lambda prompt: ["x"])
    reply = http.post(path, json=body)
    assert reply.status_code == 400 and "no marks" in reply.text
