"""How the log is written to stderr: as text for people, or as one JSON object per line for programs."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType

import typer

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with escapes such as `\\x1b` in the place of such characters; newlines and tabs stay."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


_PAUSE_S = 1.0


class SeldomWarnings:
    """Logs the first event of each `_PAUSE_S` as a warning, and others for debugging. For one thread."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._warn_at = 0.0

    def say(self, text: str, *facts: object, extra: dict[str, object] | None = None) -> None:
        now = time.monotonic()
        warns = now >= self._warn_at
        self._log.log(logging.WARNING if warns else logging.DEBUG, text, *facts, extra=extra)
        if warns:
            self._warn_at = now + _PAUSE_S


log = logging.getLogger(__name__)

_LEVELS = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warning",
    logging.ERROR: "error",
    logging.CRITICAL: "critical",
}
"""Libraries give other names to levels, for the whole process."""

_NO_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}
"""What records have without `extra`, and uvicorn's message for terminals."""


class LogFormat(StrEnum):
    """How a line of the log looks."""

    text = "text"
    json = "json"


class JsonFormatter(logging.Formatter):
    """One line per event: time (ISO 8601, UTC), level, logger, message, `exception` with its traceback, and `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        given = {name: value for name, value in vars(record).items() if name not in _NO_FIELDS}
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event = {
            "time": time.replace("+00:00", "Z"),
            "level": _LEVELS.get(record.levelno, record.levelname.lower()),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            event["stack"] = self.formatStack(record.stack_info)
        return json.dumps({**event, **{name: value for name, value in given.items() if name not in event}}, default=str)


class TextFormatter(logging.Formatter):
    """Text that cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up(format: LogFormat, level: int) -> None:
    """Has all events of this level or above written to stderr; in JSON also warnings of Python, and uncaught errors."""
    handler = logging.StreamHandler(sys.stderr)
    if format is LogFormat.json:
        handler.setFormatter(JsonFormatter())
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda uncaught: _log_uncaught(
            uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback
        )
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def for_programs() -> bool:
    """Whether stderr holds JSON only."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def tell(level: int, text: str) -> None:
    """Tells the user of a command something on stderr; as an event where that holds JSON. level: `logging.ERROR`: what
    went wrong; `WARNING`: what is dangerous; `INFO`: what is good to know."""
    if for_programs():
        log.log(level, "%s", text)
    elif level < logging.WARNING:
        typer.secho(printable(text), dim=True, err=True)
    else:
        word, colour = ("error", "red") if level >= logging.ERROR else ("warning", "yellow")
        typer.secho(f"{word}: {printable(text)}", fg=colour, err=True)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if not isinstance(error, SystemExit | None):  # which ends a thread without a word
        log.critical("an error that nobody expected", exc_info=(kind, error, traceback))
