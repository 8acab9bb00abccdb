"""Renders chat templates in a process of their own: they are programs of whoever made the checkpoint.

That process is bounded in memory and time, and another one takes its place when it has ended.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final

from splitnet.checkpoint.template_program import LENGTH_BYTES, MEMORY_BYTES, RENDER_S
from splitnet.errors import SplitnetError

_PROGRAM: Final = Path(__file__).with_name("template_program.py")
START_S: Final = 60.0  # in which the process is ready
MOST_BYTES: Final = 64 << 20  # of what a template makes


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    answer: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template` would make it. answer: whether it ends with what
    an answer begins with. variables: what the template is given besides. Raises jinja2.TemplateError if the template
    refuses the messages, fails, or takes too long or too much memory; SplitnetError if none can be rendered here."""
    question = {
        "template": tokenizer.get_chat_template(tools=tools),
        "messages": [{name: value for name, value in one.items() if value is not None} for one in messages],
        "tools": tools,
        "answer": answer,
        "variables": {**tokenizer.special_tokens_map, **variables},
    }
    return _answer(question)


def variables_of(template: str) -> set[str]:
    """What a template uses and does not set, but for what all are given. Errors as of `render`."""
    return set(_answer({"template": template}))


def _answer(question: dict[str, Any]) -> Any:
    from jinja2 import TemplateError

    answered = _process.ask(json.dumps(question, default=str).encode())
    if answered is None:
        raise TemplateError(f"it takes more than {RENDER_S} s or {MEMORY_BYTES >> 20} MiB")
    answer, error = json.loads(answered)
    if error is not None:
        raise TemplateError(error)
    return answer


class _Process:
    """Thread-safe; begins when it is first asked, or before that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def begin(self) -> None:
        """Begins, and waits for nothing."""
        with self._lock:
            if self._running is None:
                self._running = self._start()

    def ask(self, question: bytes) -> bytes | None:
        """The answer; None: it took too much."""
        with self._lock:
            if self._running is not None and self._running.poll() is not None:  # others, or the system, have ended it
                self._end(self._running)
            process = self._running = self._running or self._start()
            if not self._is_ready:
                if self._read(process, START_S) is None:
                    self._end(process)
                    raise SplitnetError(
                        f"chat templates cannot be rendered: run `{sys.executable} {_PROGRAM}` to see why"
                    )
                self._is_ready = True
            assert process.stdin is not None
            try:
                process.stdin.write(len(question).to_bytes(LENGTH_BYTES, "big") + question)
                process.stdin.flush()
                answer = self._read(process, RENDER_S)
            except OSError:
                answer = None
            except BaseException:  # an answer that nobody reads would be taken for the next one's
                self._end(process)
                raise
            if answer is None:
                self._end(process)
            return answer

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        # In a session of its own, as an interrupt at the terminal is not meant for it.
        return subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @staticmethod
    def _read(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """A frame; None: the process has ended, or is ended now as it takes too long."""
        told: IO[bytes] | None = process.stdout
        assert told is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            head = told.read(LENGTH_BYTES)
            size = int.from_bytes(head, "big")
            if len(head) < LENGTH_BYTES or size > MOST_BYTES:
                return None
            data = told.read(size)
            return data if len(data) == size else None
        finally:
            timer.cancel()
            timer.join()

    def end(self) -> None:
        """Ends the process, if it runs: one that is about to be ready would outlive this one for a moment."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._running, self._is_ready = None, False
        process.kill()
        with suppress(OSError), process:  # closes its pipes, into which nothing can be written any more, and waits
            pass


_process = _Process()
atexit.register(_process.end)
begin = _process.begin  # has the process ready when it is asked, which takes a second
