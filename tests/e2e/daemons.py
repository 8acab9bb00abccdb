"""Peer daemons and client commands as a user starts them: processes of `python -m splitnet`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SPLITNET = (sys.executable, "-m", "splitnet")
LOOPBACK = ("--listen", "tcp://127.0.0.1:0", "--threads", "1", "--weights", "float32")
RUN_VARIABLE = "SPLITNET_TEST_RUN"
"""Marks a started process and, by inheritance, all that it starts."""
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 90.0


@dataclass
class Daemon:
    """A process of `splitnet peer` or `dht` that has been started; it may not serve yet."""

    process: subprocess.Popen[bytes]
    run: str
    address_file: Path
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def serves(self) -> bool:
        return self.address_file.exists()

    def address(self) -> str:
        """Waits until the daemon serves and gives the address to join with."""
        self.wait_for(lambda: self.serves)
        # The file is there at once with all of its text.
        text = self.address_file.read_text()
        assert re.fullmatch(r"(/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+|tcp://127\.0\.0\.1:\d+\?key=\w+)\n", text), text
        return text.strip()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until something is true of a daemon that runs."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"the daemon takes too long:\n{self.log}"
            time.sleep(0.01)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Sends a signal, waits for the end, expects that nothing is left; gives the seconds that took."""
        began = time.monotonic()
        self.process.send_signal(number)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        seconds = time.monotonic() - began
        expect_nothing_left(self.run)
        return seconds


def starting(folder: Path, model: str | Path, *arguments: str) -> AbstractContextManager[Daemon]:
    """Starts `splitnet peer MODEL ...` on loopback, and stops it at the end.

    Args:
        folder: for its log and its address file; must exist.
        arguments: more than where to listen.
    """
    return daemon(folder, "peer", str(model), *LOOPBACK, *arguments)


@contextmanager
def daemon(folder: Path, *arguments: str) -> Iterator[Daemon]:
    """Starts `splitnet ...`, which serves until it is told to end, and stops it at the end.

    Args:
        folder: for its log and its address file; must exist.
        arguments: all but --address-file.
    """
    run = uuid.uuid4().hex
    address_file, log_file = folder / f"{run}.address", folder / f"{run}.log"
    command = [*SPLITNET, *arguments, "--address-file", str(address_file)]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(folder, run)
        )
    started = Daemon(process, run, address_file, log_file)
    try:
        yield started
    finally:
        if process.poll() is None:
            started.stop()


@contextmanager
def daemons(
    folder: Path,
    model: str | Path,
    spans: Sequence[tuple[int, int]],
    *arguments: str,
    each: Sequence[Sequence[str]] | None = None,
) -> Iterator[list[Daemon]]:
    """Daemons that serve `spans` of a model in one swarm; the first began it. each: more arguments of each."""
    with ExitStack() as stack:
        running: list[Daemon] = []
        for (start, end), own in zip(spans, each or [()] * len(spans), strict=True):
            join = ("--join", running[0].address()) if running else ()
            blocks = ("--blocks", f"{start}:{end}")
            running.append(stack.enter_context(starting(folder, model, *blocks, *join, *arguments, *own)))
        for started in running:
            started.address()
        yield running


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code, its two outputs, and how long it took."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def error(self) -> str:
        """The one sentence with which a command that failed ends; before it may stand only what it was doing."""
        assert self.code == 1, self.errors
        *progress, last = self.errors.splitlines()
        assert all(line.endswith(" ...") for line in progress), self.errors
        assert last.startswith("error: "), self.errors
        return last.removeprefix("error: ")


def run(folder: Path, *arguments: str, given: str | None = None) -> Finished:
    """Runs `splitnet ...` to its end and expects that nothing is left of it.

    Args:
        folder: holds the key of this user.
        given: what it reads from stdin.
    """
    began = time.monotonic()
    run = uuid.uuid4().hex
    with subprocess.Popen(
        [*SPLITNET, *arguments],
        stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(folder, run),
    ) as process:
        try:
            said = process.communicate(None if given is None else given.encode(), timeout=COMMAND_TIMEOUT_S)
        except BaseException:
            process.terminate()
            raise
    output, errors = (text.decode() for text in said)
    finished = Finished(process.returncode, output, errors, time.monotonic() - began)
    assert "Traceback" not in errors, errors
    expect_nothing_left(run)
    return finished


@dataclass
class Background:
    """A command that is running."""

    process: subprocess.Popen[bytes]
    run: str
    began: float

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until something is true while the command runs."""
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def stop(self, number: signal.Signals) -> Finished:
        """Sends a signal and waits for the end."""
        self.process.send_signal(number)
        return self.finish(left=number == signal.SIGKILL)

    def finish(self, *, left: bool = False) -> Finished:
        """Waits for the end. left: a child may be left that ends when it sees its parent gone."""
        output, errors = (text.decode() for text in self.process.communicate(timeout=COMMAND_TIMEOUT_S))
        if not left:
            expect_nothing_left(self.run)
        return Finished(self.process.returncode, output, errors, time.monotonic() - self.began)


@contextmanager
def background(folder: Path, *arguments: str, program: Sequence[str] = SPLITNET) -> Iterator[Background]:
    """Starts `splitnet ...`, and kills it at the end if it still runs; `folder` holds the key of this user."""
    run = uuid.uuid4().hex
    process = subprocess.Popen(
        [*program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(folder, run),
    )
    with process:
        try:
            yield Background(process, run, time.monotonic())
        finally:
            if process.poll() is None:
                process.kill()


def expect_nothing_left(run: str) -> None:
    """Fails if a process lives that a command started."""
    left: list[str] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_VARIABLE) == run:
                left.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue  # of another user, or it has just ended
    assert not left, f"still running: {left}"


def _environment(folder: Path, run: str) -> dict[str, str]:
    """This process's, with a key of its own, without a hub, and with output that is the same on every terminal."""
    own = {"SPLITNET_KEY_FILE": str(folder / "key"), RUN_VARIABLE: run}
    return {**os.environ, **own, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "100"}
