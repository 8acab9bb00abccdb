from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet import logs
from splitnet.logs import printable
from splitnet.wire.messages import Failure, FailureCode, decode, encode

TITLE = "\x1b]0;pwned\x07\x1b[2J\x9b31m\rok\u202etxt"


@given(st.text())
def test_printable_text_has_no_control_sequences_and_can_be_encoded(text: str) -> None:
    safe = printable(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 for c in safe)
    safe.encode()
    assert printable(safe) == safe


def test_ordinary_text_stays_unchanged() -> None:
    text = "naïve 漢字\u3000 עברית \U0001f468\u200d\U0001f469\n\ttabs"
    assert printable(text) == text


def test_the_text_of_a_failure_has_no_control_sequences() -> None:
    failure = Failure(bytes(16), 1, 1, FailureCode.INTERNAL, TITLE)
    (got,) = (decode(encode(failure)),)
    assert isinstance(got, Failure)
    assert got.text == printable(TITLE) and "\x1b" not in got.text


def test_errors_and_the_log_have_no_control_sequences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "for_programs", lambda: False)
    logs.write_user_message(logging.ERROR, TITLE)
    assert capsys.readouterr().err == f"error: {printable(TITLE)}\n"
    record = logging.LogRecord("peers", logging.WARNING, "file", 1, "%s", (TITLE,), None)
    assert logs.TextFormatter().format(record) == printable(TITLE)


class _Terminal:
    def __init__(self, *, terminal: bool) -> None:
        self.text, self.isatty = "", lambda: terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


@pytest.mark.parametrize("terminal", [True, False])
def test_text_of_a_model_is_escaped_on_terminals_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitnet.cli.text_generator import _TimedStreamer

    tokenizer: Any = None
    out = _Terminal(terminal=terminal)
    monkeypatch.setattr(sys, "stdout", out)
    _TimedStreamer(tokenizer).on_finalized_text(TITLE)
    assert out.text == (printable(TITLE) if terminal else TITLE)
