"""Compresses blocks for clients that the owner allows, one job at a time, in a program of the lowest priority beside
the sessions.

A job is a folder: hidden states that its client brings, and compressed tensors that the client takes. It is kept for
the client that returns, and removed when another job begins.
"""

from __future__ import annotations

import logging
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Final

import torch
from filelock import FileLock, Timeout

from peers.peer_links import ReplyTarget
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.compress.blocks import INPUTS, block_file, compressed_blocks, states_file
from splitnet.compress.job import error_of, start_program
from splitnet.compress.rounding import (
    GROUPS,
    LEAST_LENGTH,
    MOST_POSITIONS,
    Compression,
    moments_bytes,
    sequence_lengths,
)
from splitnet.quant.device import free_memory
from splitnet.security.identity import AuthorizedKeys
from splitnet.wire.endpoints import Connection
from splitnet.wire.messages import (
    MAX_PART_BYTES,
    AskCompression,
    CompressionState,
    CompressionWish,
    Failure,
    FailureCode,
)

log = logging.getLogger(__name__)

WAITING: Final = 16  # messages of all clients that wait; each has at most `MAX_PART_BYTES`
SILENCE_S: Final = 300.0  # the program ends, and another client may begin, when the client is silent for this time
DISK_SHARE: Final = 0.5  # share of the free disk that a job may use
MEMORY_SHARE: Final = 0.5  # share of the free memory that the program may use


class _Refused(Exception):
    """A request that is refused with this code and text."""

    def __init__(self, code: FailureCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class CompressionService:
    """Answers `AskCompression`. Thread-safe; close it when done.

    Args:
        checkpoint: returns the checkpoint whose blocks are served.
        blocks: returns the served blocks `[start, end)`, whose tensors are on this machine.
        clients: the keys that may ask; None: none.
        folder: where jobs have their folders.
    """

    def __init__(
        self,
        checkpoint: Callable[[], Checkpoint],
        blocks: Callable[[], tuple[int, int]],
        outbox: ReplyTarget,
        clients: AuthorizedKeys | None,
        folder: Path,
    ) -> None:
        self._checkpoint, self._blocks, self._outbox = checkpoint, blocks, outbox
        self._clients, self._folder = clients, folder
        self._waiting: queue.Queue[tuple[Connection, AskCompression] | None] = queue.Queue(WAITING)
        self._job: _Job | None = None
        self._thread = threading.Thread(target=self._answer_all, name="splitnet-compression", daemon=True)

    def receive_request(self, source: Connection, message: AskCompression) -> None:
        if self._clients is None or not self._clients.allows(source.curve):
            text = "this peer does not compress for this client: its owner must list the client with --compress-for"
            self._refuse(source, message, _Refused(FailureCode.WRONG_MODEL, text))
        elif len(message.payload) > MAX_PART_BYTES:
            self._refuse(source, message, _Refused(FailureCode.BAD_MESSAGE, "the part is too large"))
        else:
            try:
                self._waiting.put_nowait((source, message))
            except queue.Full:
                self._refuse(source, message, _Refused(FailureCode.BUSY, "too many parts of texts wait here"))

    def start(self) -> None:
        if self._clients is not None:
            self._thread.start()

    def close(self) -> None:
        """Ends the program. Its folder stays for the client's next request."""
        if self._thread.ident is not None:
            self._waiting.put(None)
            self._thread.join()

    def _answer_all(self) -> None:
        while True:
            try:
                asked = self._waiting.get(timeout=SILENCE_S)
            except queue.Empty:
                self._leave_job()
                continue
            if asked is None:
                return self._leave_job()
            try:
                self._outbox.send(asked[0], self._answer(*asked))
            except _Refused as refused:
                self._refuse(*asked, refused)
            except Exception as error:
                log.exception("could not compress")
                self._leave_job()
                self._refuse(*asked, _Refused(FailureCode.INTERNAL, f"an error at this peer: {error}"))

    def _answer(self, source: Connection, message: AskCompression) -> CompressionState:
        job = self._job_of(source, message)
        total, part = 0, b""
        if message.wish == CompressionWish.COMPRESS:
            job.receive_part(message)
        elif message.wish in (CompressionWish.BLOCK, CompressionWish.STATES):
            total, part = job.read_part(message)
        else:
            raise _Refused(FailureCode.BAD_MESSAGE, "this peer does not know this wish")
        return CompressionState(message.number, job.received, job.done, total, job.take_error(), part)

    def _job_of(self, source: Connection, message: AskCompression) -> _Job:
        """The job of a request, which begins if no other client has one."""
        checkpoint, (start, end) = self._checkpoint(), self._blocks()
        if message.model != checkpoint.fingerprint:
            raise _Refused(FailureCode.WRONG_MODEL, f"this peer serves {checkpoint.name}, which is another model")
        if not start <= message.start < message.end <= end:
            raise _Refused(FailureCode.WRONG_BLOCKS, f"this peer serves blocks {start}:{end}")
        if self._job is not None and self._job.name == _name(message):
            self._job.heard_at = time.monotonic()
            return self._job
        if self._job is not None:
            if self._job.client != source.curve and time.monotonic() < self._job.heard_at + SILENCE_S:
                raise _Refused(FailureCode.BUSY, "this peer compresses for another client: try again later")
            self._leave_job()
        self._job = _Job(checkpoint, source.curve, message, self._folder)
        return self._job

    def _leave_job(self) -> None:
        if self._job is not None:
            self._job.close()
            self._job = None

    def _refuse(self, source: Connection, message: AskCompression, refused: _Refused) -> None:
        self._outbox.send(source, Failure(b"", 0, message.number, refused.code, str(refused)))


def _name(message: AskCompression) -> str:
    fields = (message.model, message.start, message.end, message.bits, message.group)
    return sha256(repr((*fields, message.positions, message.length, message.states)).encode()).hexdigest()


class _Job:
    """A job in its folder. Raises _Refused: this peer cannot do it.

    received: bytes of the hidden states that are here. heard_at: time of the client's last message.
    """

    def __init__(self, checkpoint: Checkpoint, client: bytes, message: AskCompression, folder: Path) -> None:
        self.name, self.client, self.heard_at = _name(message), client, time.monotonic()
        if message.group not in GROUPS or not 2 <= message.bits <= 8:
            raise _Refused(FailureCode.BAD_MESSAGE, f"this peer compresses to 2 to 8 bits, in groups of {GROUPS}")
        if not LEAST_LENGTH <= message.length <= message.positions <= MOST_POSITIONS:
            text = f"this peer compresses by at most {MOST_POSITIONS} positions, in sequences of {LEAST_LENGTH} or more"
            raise _Refused(FailureCode.BAD_MESSAGE, text)
        most = checkpoint.max_positions or message.length
        if message.length > most:
            raise _Refused(
                FailureCode.BAD_MESSAGE, f"{checkpoint.name} was made for sequences of at most {most} positions"
            )
        self._size = message.positions * checkpoint.hidden_size * 2
        self._start, self._end, self._states = message.start, message.end, message.states
        lengths = sequence_lengths(message.positions, message.length)
        self._how = Compression(message.bits, message.group, lengths)
        self._checkpoint = checkpoint
        self._folder = folder / self.name
        self._program: subprocess.Popen[bytes] | None = None
        self._check_room(folder)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = FileLock(self._folder.with_suffix(".lock"))
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise _Refused(FailureCode.BUSY, "another peer on this machine has this job: try again later") from None
        inputs = self._inputs()
        self.received = inputs.stat().st_size if inputs.exists() else 0

    @property
    def done(self) -> int:
        return compressed_blocks(self._folder, self._start, self._end)

    def receive_part(self, message: AskCompression) -> None:
        """Appends a part of the hidden states, and starts the program when all parts are here."""
        part = message.payload
        if part and message.offset == self.received and self.received + len(part) <= self._size:
            with self._inputs().open("ab") as file:
                file.write(part)
            self.received += len(part)
        if self.received == self._size and self._program is None and self.done < self._end:
            self._begin()

    def read_part(self, message: AskCompression) -> tuple[int, bytes]:
        """The bytes of a file, and a part of it."""
        is_states = message.wish == CompressionWish.STATES
        block = self._end - 1 if is_states else message.block
        if not self._start <= block < self.done:
            raise _Refused(FailureCode.WRONG_BLOCKS, f"block {block} is not compressed yet")
        with (states_file if is_states else block_file)(self._folder, block).open("rb") as file:
            total = file.seek(0, 2)
            file.seek(min(message.offset, total))
            return total, file.read(MAX_PART_BYTES)

    def take_error(self) -> str:
        """Why the program has failed; then the next part or question starts it again."""
        if self._program is None or self._program.poll() is None:
            return ""
        error = error_of(self._folder) if self._program.returncode else ""
        self._end_program()
        return error[:1000]

    def close(self) -> None:
        self._end_program()
        self._lock.release()

    def _inputs(self) -> Path:
        whole = self._folder / INPUTS
        return whole if whole.exists() else whole.with_suffix(".part")

    def _begin(self) -> None:
        inputs = self._inputs()
        if inputs.name != INPUTS:
            with inputs.open("rb") as file:
                digest = file_digest(file, "sha256").digest()
            if digest != self._states:
                inputs.unlink()
                self.received = 0
                raise _Refused(FailureCode.BAD_MESSAGE, "the hidden states do not have their digest")
            inputs.rename(self._folder / INPUTS)
        log.info("compressing blocks %d..%d", self._start, self._end - 1)
        self._program = start_program(self._folder, self._checkpoint, self._start, self._end, self._how)

    def _end_program(self) -> None:
        if self._program is not None:
            self._program.kill()
            self._program.communicate()
            self._program = None

    def _check_room(self, folder: Path) -> None:
        """Removes the folders of other jobs, and refuses a job without enough disk and memory."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for other in folder.iterdir():
            if other.is_dir() and other.name != self.name:
                lock = other.with_suffix(".lock")
                with suppress(Timeout), FileLock(lock, blocking=False):
                    shutil.rmtree(other, ignore_errors=True)
                    with suppress(OSError):  # Windows keeps an open file; there `FileLock` removes it
                        lock.unlink()
        checkpoint = self._checkpoint
        names = [[tensor.name for tensor in block] for block in checkpoint.block_tensors[self._start : self._end]]
        disk = 3 * self._size + sum(checkpoint.bytes_of(block, checkpoint.dtype) for block in names)
        free = int(shutil.disk_usage(folder).free * DISK_SHARE)
        if disk > free:
            text = f"these blocks and this text need {disk >> 20} MiB of disk, and this peer gives {free >> 20} MiB"
            raise _Refused(FailureCode.TOO_LONG, text)
        facts = [list(checkpoint.store.tensor_facts(block).values()) for block in names]
        widest = max(one.shape[-1] for block in facts for one in block if len(one.shape) > 1)
        memory = max(sum(one.bytes_as(torch.float32) for one in block) for block in facts)
        # While bits are chosen, some weights are kept in floats beside the rounded ones.
        memory = moments_bytes(widest) + (memory if self._how.uniform else 2 * memory)
        if any("experts." in name for block in names for name in block):  # their inputs are kept, and then joined
            memory += 2 * self._how.positions * checkpoint.hidden_size * torch.float32.itemsize
        free = int(free_memory("cpu") * MEMORY_SHARE)
        if memory > free:
            text = f"a block needs {memory >> 20} MiB of memory, and this peer gives {free >> 20} MiB"
            raise _Refused(FailureCode.TOO_LONG, text)
