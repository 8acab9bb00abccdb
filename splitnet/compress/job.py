"""The compression of some blocks in a folder by a program of its own: `python -m splitnet.compress.job FOLDER`.

The program has the lowest priority, so that a peer serves sessions beside it, and ends with the process that started
it. A new program continues with the next block.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress.blocks import compress_blocks
from splitnet.compress.rounding import Compression
from splitnet.errors import WrongSwarm

_JOB = "job.json"
_ERROR = "error"
_NICE = 19


def start_program(
    folder: Path, checkpoint: Checkpoint, start: int, end: int, how: Compression
) -> subprocess.Popen[bytes]:
    """Starts the compression of blocks `[start, end)` in a folder that has the file `inputs`. The program ends when its
    `stdin` closes."""
    (folder / _ERROR).unlink(missing_ok=True)
    job = {"source": checkpoint.source, "model": checkpoint.fingerprint, "blocks": [start, end], "how": asdict(how)}
    (folder / _JOB).write_text(json.dumps(job), encoding="utf-8")
    # In a separate session, so that an interrupt at the terminal reaches only the peer, which ends the program.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def error_of(folder: Path) -> str:
    """Why the program in a folder has failed."""
    try:
        if error := (folder / _ERROR).read_text(encoding="utf-8"):  # empty: the disk was full
            return error
    except OSError:
        pass
    return "the program that compresses was killed, perhaps because memory or disk was short"


def _compress(folder: Path) -> None:
    job = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    checkpoint = Checkpoint.open(job["source"])
    if checkpoint.fingerprint != job["model"]:
        raise WrongSwarm(f"the files of {checkpoint.name} have changed since the peer was started: start it again")
    start, end = job["blocks"]
    compress_blocks(checkpoint, start, end, folder, Compression(**job["how"]))


def _end_with_starter() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    folder = Path(sys.argv[1])
    if hasattr(os, "nice"):
        os.nice(_NICE)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    try:
        _compress(folder)
    except Exception as error:
        with suppress(OSError):
            (folder / _ERROR).write_text(f"{error or type(error).__name__}", encoding="utf-8")
        sys.exit(1)


if __name__ == "__main__":
    main()
