"""Bounds of time and memory for libraries that read what strangers wrote: chat templates, grammars, schemas, images.

The library runs in a separate process (`bounded_program.py`) that is killed when a question exceeds its bounds.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

from splitnet.bounded_program import BESIDE, LENGTH_BYTES, too_much
from splitnet.errors import SplitnetError

_PROGRAM: Final = Path(__file__).with_name("bounded_program.py")
START_S: Final = 60.0  # Time within which the process must be ready
ANSWER_S: Final = 15.0  # Time within which a question must be answered, also on a busy machine
MOST_BYTES: Final = 64 << 20  # Longest answer


class BoundedProcess:
    """A process for the questions of one job. Thread-safe; it starts with `start_process` or with the first question.

    Args:
        job: a key of `bounded_program.JOBS`.
        setup: makes the setup that the process receives once, before its first question.
    """

    def __init__(self, job: str, setup: Callable[[], Any] = lambda: None) -> None:
        self._job, self._setup = job, setup
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def start_process(self) -> None:
        """Starts the process without waiting until it is ready."""
        with self._lock:
            if self._running is None:
                self._running = self._start()

    def ask(self, question: Any, data: bytes = b"") -> tuple[Any, str | None]:
        """The answer to a question in JSON, or the error of the question, such as exceeded bounds. Bytes beside the
        JSON of an answer are the last item of the answer.

        data: bytes beside the JSON of the question, because JSON of many bytes would hold up all threads.

        Raises SplitnetError if the process does not start.
        """
        with self._lock:
            if self._running is not None and self._running.poll() is not None:  # the process was killed
                self._stop(self._running)
            process = self._running = self._running or self._start()
            if not self._is_ready:
                if self._read_answer(process, self._setup(), START_S) is None:
                    self._stop(process)
                    command = f"{sys.executable} {_PROGRAM} {self._job}"
                    raise SplitnetError(f"the reader of {self._job}s does not start: run `{command}` to see why")
                self._is_ready = True
            try:
                answer = self._read_answer(process, question, ANSWER_S, data)
            except BaseException:  # the unread answer would be read as the answer to the next question
                self._stop(process)
                raise
            if answer is None:
                self._stop(process)
                return None, too_much(self._job)
            head, _, beside = answer.partition(BESIDE)
            found, error = json.loads(head)
            return ([*found, beside] if beside else found), error

    def _start(self) -> subprocess.Popen[bytes]:
        atexit.register(self.kill_process)
        # In a separate session, so that an interrupt at the terminal does not reach the process.
        return subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), self._job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @staticmethod
    def _read_answer(
        process: subprocess.Popen[bytes], question: Any, seconds: float, data: bytes = b""
    ) -> bytes | None:
        """The frame of the answer to a question; None: the process has ended, or took too long and was killed."""
        asked, told = process.stdin, process.stdout
        assert asked is not None and told is not None
        timer = threading.Timer(seconds, _kill, [process])
        timer.daemon = True
        timer.start()
        try:
            head = json.dumps(question, default=str).encode() + BESIDE
            asked.write((len(head) + len(data)).to_bytes(LENGTH_BYTES, "big") + head)
            asked.write(data)
            asked.flush()
            return _read(told)
        except OSError:
            return None
        finally:
            timer.cancel()
            timer.join()

    def kill_process(self) -> None:
        """Kills the process if it runs: a process that is still starting would outlive the interpreter."""
        if self._running is not None:
            _kill(self._running)
            self._running.wait()
        atexit.unregister(self.kill_process)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        self._running, self._is_ready = None, False
        atexit.unregister(self.kill_process)
        _kill(process)
        with suppress(OSError), process:  # closes the pipes of the dead process, and waits
            pass


def _read(told: IO[bytes]) -> bytes | None:
    head = told.read(LENGTH_BYTES)
    size = int.from_bytes(head, "big")
    if len(head) < LENGTH_BYTES or size > MOST_BYTES:
        return None
    data = told.read(size)
    return data if len(data) == size else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its children."""
    if process.poll() is None and hasattr(os, "killpg"):
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
