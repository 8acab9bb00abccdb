"""The log as JSON: one line per event, for any logged text and for all other output to stderr."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.cli.stage_progress import StageProgress
from splitnet.logs import JsonFormatter, LogFormat, set_up
from splitnet.serve.server import _Server

FIXED = {"time", "level", "logger", "message"}
FIELDS = st.sampled_from(["session", "peer", "time", "level", "blocks"])


def event(record: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return json.loads(line)


@given(st.text(), st.dictionaries(FIELDS, st.text() | st.integers()))
def test_an_event_is_one_line_with_its_fields(text: str, extra: dict[str, Any]) -> None:
    record = logging.makeLogRecord(
        {"name": "splitnet.nat", "levelno": 30, "levelname": "WARN", "msg": "%s", "args": (text,), **extra}
    )
    told = event(record)
    assert (told["level"], told["logger"], told["message"]) == ("warning", "splitnet.nat", text)
    assert {name: told[name] for name in extra.keys() - FIXED} == {name: extra[name] for name in extra.keys() - FIXED}
    at = datetime.fromisoformat(told["time"])
    assert at.utcoffset() == timedelta(0) and abs(at.timestamp() - record.created) < 0.002


def test_an_exception_is_a_field() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.getLogger("a").makeRecord("a", 40, __file__, 1, "failed", (), sys.exc_info())
    told = event(record)
    assert told["message"] == "failed" and told["exception"].endswith("ValueError: two\nlines")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[Any]]]:
    """Sets the log format to JSON; yields a function that reads the lines."""
    root = logging.getLogger()
    level = root.level
    stderr = StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    set_up(LogFormat.json, logging.INFO)
    yield lambda: [json.loads(line) for line in stderr.getvalue().splitlines()]
    logging.captureWarnings(False)
    root.setLevel(level)


def test_the_server_and_progress_log_in_the_same_form(lines: Callable[[], list[Any]]) -> None:
    generations: Any = None
    server = _Server(lambda: None, generations, 0.0)
    for_terminals = {"color_message": "Started \33[36m%d\33[0m"}
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7, extra=for_terminals)
    assert server.config.log_config is None
    with StageProgress() as progress:
        progress.update("load blocks 0..9", 1, 2)
    events = lines()
    assert {frozenset(event) for event in events} == {frozenset(FIXED)}
    told = [(event["logger"], event["message"]) for event in events]
    assert told == [
        ("uvicorn.error", "Started server process [7]"),
        ("splitnet.cli.stage_progress", "load blocks 0..9"),
    ]


def test_an_error_that_ends_a_thread_is_an_event(lines: Callable[[], list[Any]]) -> None:
    thread = threading.Thread(target=lambda: [].pop())
    thread.start()
    thread.join()
    (told,) = lines()
    assert told["level"] == "critical" and told["exception"].endswith("IndexError: pop from empty list")


@pytest.mark.full
def test_an_error_that_ends_a_command_is_an_event() -> None:
    command = [sys.executable, "-m", "splitnet", "--log-format", "json", "peer", "nothing", "--blocks", "3:1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    told = json.loads(ended.stderr)
    assert told["level"] == "error" and "write START:END" in told["message"]


def test_events_of_the_hub_client_are_written_once() -> None:
    program = (
        "import logging; from splitnet.logs import *; from splitnet.cli.arguments import quiet_libraries\n"
        "set_up(LogFormat.text, logging.WARNING); quiet_libraries(); import huggingface_hub.file_download\n"
        "logging.getLogger('huggingface_hub.utils._http').warning('Retrying')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr.count("Retrying") == 1


@pytest.mark.default_cases(bars=("0",))
@pytest.mark.parametrize("bars", [None, "0", "1"])
def test_hiding_transformers_progress_bars_causes_no_warning(bars: str | None) -> None:
    """The hub client warns if the call conflicts with the environment; on terminals, this warning appeared above every
    answer."""
    program = (
        "from splitnet.cli.arguments import quiet_libraries; quiet_libraries()\n"
        "from transformers.utils import logging; logging.disable_progress_bar(); logging.enable_progress_bar()"
    )
    own = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    own |= {"HF_HUB_DISABLE_PROGRESS_BARS": bars} if bars else {}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=own)
    assert ended.stderr == ""
