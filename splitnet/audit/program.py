"""The program that computes pieces again beside a client: at the lowest priority, with one thread.

    python -m splitnet.audit.program MODEL

A load of weights changes defaults of torch for all threads of a process, so a client that generates does not load them
itself. Reads files of pieces from stdin, each behind 8 bytes with its length, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from splitnet.audit.comparison import Verdict
from splitnet.audit.evidence import write_piece
from splitnet.audit.piece import Piece
from splitnet.errors import SplitnetError

IDLE_S = 60.0  # after this time without a piece the program ends, to free its memory
ANSWER_S = 600.0  # after this time a piece counts as impossible to compute here
LENGTH_BYTES = 8
_NICE = 19


class AuditProgram:
    """The program for one model, which starts with the first piece. One thread at a time.

    source: folder or file of the model.
    """

    MOST_POSITIONS = 4096  # of a piece

    def __init__(self, source: str) -> None:
        self._source = source
        self._running: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # of both

    def examine(self, piece: Piece) -> Verdict:
        """As `splitnet.audit.examine.examine`. Raises SplitnetError: the piece cannot be computed here."""
        data = write_piece(piece)
        for _ in range(2):  # the program may have ended because it was idle
            answer = self._ask(data)
            if answer is not None:
                if "error" in answer:
                    raise SplitnetError(answer["error"])
                return Verdict(**answer)
            self._stop()
        raise SplitnetError("the program that computes audits was killed, perhaps because memory was short")

    def close(self) -> None:
        """Ends the program for good. Any thread may call this."""
        with self._lock:
            self._closed = True
        self._stop()

    def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.kill()
            with suppress(OSError), running:
                pass

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self._source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt at the terminal reaches only the client, which ends the program
        )

    def _ask(self, data: bytes) -> dict[str, Any] | None:
        with self._lock:
            if self._closed:
                raise SplitnetError("the client is closed")
            running = self._running = self._running or self._start()
        assert running.stdin is not None and running.stdout is not None
        timer = threading.Timer(ANSWER_S, running.kill)
        timer.daemon = True
        timer.start()
        try:
            running.stdin.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
            running.stdin.flush()
            return json.loads(running.stdout.readline())
        except (OSError, ValueError):
            return None
        finally:
            timer.cancel()


def main() -> None:
    with suppress(AttributeError, OSError):  # Windows has no such priorities
        os.nice(_NICE)
    import torch

    from splitnet.audit.evidence import read_piece
    from splitnet.audit.examine import examine
    from splitnet.checkpoint.checkpoint import Checkpoint

    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(sys.argv[1])
    given, told = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with answers
    while True:
        timer = threading.Timer(IDLE_S, os._exit, [0])
        timer.daemon = True
        timer.start()
        size = int.from_bytes(given.read(LENGTH_BYTES), "little")
        timer.cancel()
        data = given.read(size)
        if not size or len(data) < size:
            return
        try:
            answer = asdict(examine(checkpoint, read_piece(data)))
        except Exception as error:  # of the family's code, for example
            answer = {"error": str(error) or type(error).__name__}
        told.write(json.dumps(answer).encode() + b"\n")
        told.flush()


if __name__ == "__main__":
    main()
