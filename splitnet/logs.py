"""The log on stderr: text for people, or one JSON object per line for programs."""

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
    """The text with control characters replaced by escapes such as `\\x1b`; newlines and tabs stay."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


_PAUSE_S = 1.0


class RateLimitedWarnings:
    """Logs at most one warning per `_PAUSE_S`, and other events at debug level. For one thread."""

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
"""Names of levels, because libraries rename logging's levels for the whole process."""

_NO_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}
"""Attributes of every record, and uvicorn's message for terminals: not fields of `extra`."""


class LogFormat(StrEnum):
    """The format of the log."""

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
    """Formats events as text without control characters, which could steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up(format: LogFormat, level: int) -> None:
    """Writes events of this level or above to stderr; in JSON also Python's warnings and uncaught errors."""
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
    """Whether stderr gets only JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def write_user_message(level: int, text: str) -> None:
    """Writes a sentence for the user of a command to stderr, as an event if stderr gets only JSON. level:
    `logging.ERROR` for errors, `WARNING` for dangers, `INFO` for other facts."""
    if for_programs():
        log.log(level, "%s", text)
    elif level < logging.WARNING:
        typer.secho(printable(text), dim=True, err=True)
    else:
        word, colour = ("error", "red") if level >= logging.ERROR else ("warning", "yellow")
        typer.secho(f"{word}: {printable(text)}", fg=colour, err=True)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if not isinstance(error, SystemExit | None):  # SystemExit ends a thread silently
        log.critical("unexpected error", exc_info=(kind, error, traceback))
