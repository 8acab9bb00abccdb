"""Text from tokens, in any pieces: whole characters, stop strings, calls of tools."""

from __future__ import annotations

import itertools
import json
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from splitnet.serve.answers.call_forms import FORMS, Forms
from splitnet.serve.answers.parser import AnswerParser
from splitnet.serve.answers.sampling import ScoredToken
from splitnet.serve.answers.text import Detokenizer, StopStrings
from splitnet.serve.apis.openai import DONE
from splitnet.serve.generation import TokenCollector
from splitnet.serve.prompts import Prompts
from splitnet.serve.responses import framed

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
CLOCK = '<tool_call>{"name": "clock"}</tool_call>'


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def decode(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode(errors="replace")


def before_stop(pieces: list[str], strings: list[str], apart: tuple[list[str], str] = ([], "")) -> tuple[str, bool]:
    stops = StopStrings(strings, apart)
    text = ""
    for piece in pieces:
        certain, stopped = stops.push_text(piece)
        text += certain
        if stopped:
            return text, True
    return text + stops.flush(), False


@given(
    st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0))
)
def test_stop_strings_do_not_depend_on_where_text_is_cut(text: str, strings: list[str], places: list[int]) -> None:
    assert before_stop(cut(text, places), strings) == before_stop(list(text), strings)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_certain_text_holds_no_stop_string(text: str, strings: list[str]) -> None:
    certain, stopped = before_stop(list(text), strings)
    assert text.startswith(certain)
    assert not any(string in certain for string in strings)
    assert stopped == any(string in text for string in strings)
    assert stopped or certain == text


def test_text_is_released_as_soon_as_it_is_certain() -> None:
    stops = StopStrings(["END"])
    assert [stops.push_text(piece)[0] for piece in ("one E", "N", "O ", "E", "ND two")] == ["one ", "", "ENO ", "", ""]


@given(st.text(max_size=20))
def test_tokens_give_the_text_in_whole_characters(text: str) -> None:
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push_token(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.flush() == text
    assert all(len(piece) <= 1 for piece in pieces)


def test_invalid_bytes_are_released_with_the_next_character() -> None:
    detokenizer = Detokenizer(decode)
    assert [detokenizer.push_token(byte) for byte in (0xE2, 0x82, ord("a"))] == ["", "", "\ufffda"]
    detokenizer.push_token(0xE2)
    assert detokenizer.flush() == "\ufffd"


LLAMA = ["<unk>", "<s>", "</s>", "▁The", "▁capital", "▁is", "▁Paris", "ing", "<0xE6>", "<0x97>", "<0xA5>", "a"]


@pytest.fixture(scope="module")
def llama() -> Prompts:
    """The decoder of Llama 2, Mistral and Phi-3, which drops the space that a text begins with."""
    vocabulary = {token: number for number, token in enumerate(LLAMA)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return Prompts(wrapped, len(LLAMA), None)


# Words, and a character of three bytes. Wrong bytes make all neighbouring bytes unreadable, also earlier ones.
PIECES = st.lists(st.sampled_from([[3], [4], [5], [6], [7], [8, 9, 10]]), max_size=6).map(
    lambda each: [*chain.from_iterable(each)]
)


@given(prompt=PIECES, tokens=PIECES)
def test_a_completion_keeps_the_space_that_it_begins_with(llama: Prompts, prompt: list[int], tokens: list[int]) -> None:
    prompt = [1, *prompt, 5]
    choice = TokenCollector(0, llama.decode, len(tokens), {2}, (), prompt)
    said = "".join(choice.push_token(token, None).text for token in tokens)
    assert llama.decode(prompt) + said == llama.decode(prompt + tokens)


def test_a_completion_may_end_a_character_that_the_prompt_begins(llama: Prompts) -> None:
    choice = TokenCollector(0, llama.decode, 3, {2}, (), [1, 5, 8, 9])
    assert [choice.push_token(token, None).text for token in (10, 6, 7)] == ["日", " Paris", "ing"]


def test_a_message_begins_without_a_space(llama: Prompts) -> None:
    choice = TokenCollector(0, llama.decode, 3, {2}, ())
    assert [choice.push_token(token, None).text for token in (6, 5, 6)] == ["Paris", " is", " Paris"]


def test_the_text_of_a_token_keeps_its_space(llama: Prompts) -> None:
    assert [llama.text_of(token) for token in (1, 6, 7, 8)] == ["<s>", " Paris", "ing", "\ufffd"]


def test_tokens_begin_where_their_text_does(llama: Prompts) -> None:
    """Special tokens of an answer are not text, and three tokens make one character."""
    choice = TokenCollector(0, llama.decode, 9, {2}, ())
    pieces = [choice.push_token(token, None) for token in (3, 1, 8, 9, 10, 5, 2)]
    assert [(piece.text, piece.begins) for piece in pieces] == [
        ("The", 0),
        ("", 3),
        ("", 3),
        ("", 3),
        ("日", 3),
        (" is", 4),
        ("", 7),
    ]
    ids = [1, 3, 4, 8, 9, 10, 5]
    assert llama.begins(ids, "The capital日 is") == [0, 0, 3, 11, 11, 11, 12], "the first was added by the tokenizer"
    assert llama.begins(ids, llama.decode_all(ids)) == [0, 3, 7, 15, 15, 15, 16]


def test_invalid_bytes_are_read_in_linear_time(llama: Prompts) -> None:
    made = 0
    decode_all = llama.decode_all

    def counting(tokens: list[int]) -> str:
        nonlocal made
        made += len(tokens)
        return decode_all(tokens)

    llama.decode_all = counting
    try:
        begins = llama.begins([8] * 2000, "\ufffd" * 2000)
    finally:
        del llama.decode_all
    assert len(begins) == 2000 and made < 50 * 2000


def answer(text: str, *, max_tokens: int = 100, stops: tuple[str, ...] = ()) -> tuple[str, list[str | None], int]:
    """The text of an answer, the `finish` of each piece, and the number of tokens; checks that each token is scored."""
    choice = TokenCollector(0, decode, max_tokens, {0}, stops)
    said, finishes = "", []
    for byte in text.encode():
        piece = choice.push_token(byte, ScoredToken(byte, -1.0, ()))
        said += piece.text
        assert [scored.token for scored in piece.scored] == [byte]
        finishes.append(piece.finish)
        if choice.finished:
            break
    return said, finishes, choice.tokens


def test_an_end_token_releases_held_back_text() -> None:
    assert answer("un\0more", stops=("nine",)) == ("un", [None, None, "stop"], 3)


def test_an_answer_ends_before_a_stop_string() -> None:
    assert answer("one two", stops=("e t",)) == ("on", [None] * 4 + ["stop"], 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("So<c>a END b</c>, and END more", ("So<c>a END b</c>, and ", True)),
        ("an END <c>x</c>", ("an ", True)),
        ("<c>END</c><c>END", ("<c>END</c><c>END", False)),
        ("EN<c>D</c>EN", ("EN<c>D</c>EN", False)),
        ("<c END", ("<c ", True)),
    ],
)
@given(places=st.lists(st.integers(0), max_size=8))
def test_a_call_holds_no_stop_string(text: str, said: tuple[str, bool], places: list[int]) -> None:
    assert before_stop(cut(text, places), ["END"], (["<c>"], "</c>")) == said


def test_a_call_without_a_closing_mark_continues_to_the_end() -> None:
    assert before_stop(list("So [C] END"), ["END"], (["[C]"], "")) == ("So [C] END", False)


def test_the_length_limit_releases_held_back_text() -> None:
    assert answer("abcd", max_tokens=3, stops=("cd",)) == ("abc", [None, None, "length"], 3)
    assert answer("aé", max_tokens=2) == ("a\ufffd", [None, "length"], 2)


def calls_in(pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    parser = AnswerParser(Forms(FORMS["hermes"]), {})
    told = [parser.push_text(piece) for piece in pieces] + [parser.flush()]
    calls = [(call.name, json.loads(call.arguments)) for said in told for call in said.calls]
    return "".join(said.text for said in told), calls


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (WEATHER, "", [("weather", {"city": "Zürich"})]),
        (f"Let me look.\n{WEATHER}\n{CLOCK}\n", "Let me look.", [("weather", {"city": "Zürich"}), ("clock", {})]),
        (WEATHER.removesuffix("</tool_call>"), "", [("weather", {"city": "Zürich"})]),
        ("1 < 2 <tool> \n", "1 < 2 <tool> \n", []),
        ("<tool_call>nothing</tool_call> here", "<tool_call>nothing</tool_call> here", []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": 1}', '<tool_call>{"name": "f", "arguments": 1}', []),
        ("<tool_call>[", "<tool_call>[", []),
        ("So:\n\n<tool_call>nothing</tool_call> then", "So:\n\n<tool_call>nothing</tool_call> then", []),
        ("So:  \n<tool_call>open", "So:  \n<tool_call>open", []),
        (f"{CLOCK} \n<tool_call>[]</tool_call>", " \n<tool_call>[]</tool_call>", [("clock", {})]),
        ("<tool_", "<tool_", []),
    ],
)
@given(places=st.lists(st.integers(0), max_size=8))
def test_calls_of_tools(text: str, said: str, calls: list[Any], places: list[int]) -> None:
    assert calls_in(cut(text, places)) == (said, calls)


def test_calls_have_unique_ids() -> None:
    said = AnswerParser(Forms(FORMS["hermes"]), {}).push_text(CLOCK + CLOCK)
    assert len({call.id for call in said.calls}) == 2


@given(st.text())
def test_an_event_is_one_line_with_the_document(text: str) -> None:
    event = framed({"text": text})
    assert event.startswith("data: ") and event.endswith("\n\n") and event.count("\n") == 2 and "\r" not in event
    assert json.loads(event.removeprefix("data: ")) == {"text": text}
    assert DONE == "data: [DONE]\n\n"
