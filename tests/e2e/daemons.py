"""Peer daemons and client commands, started as a user starts them: processes of `python -m splitnet`."""

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
"""An environment variable that marks a started process, and its children, which inherit it."""
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
COMMAND_TIMEOUT_S = 90.0


@dataclass
class Daemon:
    """A started process of `splitnet peer` or `dht`, which may not serve yet."""

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
        """Waits until the daemon serves, and returns the address to join with."""
        self.wait_for(lambda: self.serves)
        # The file appears only when its text is complete.
        text = self.address_file.read_text()
        assert re.fullmatch(r"(/ip4/127\.0\.0\.1/tcp/\d+/p2p/\w+|tcp://127\.0\.0\.1:\d+\?key=\w+)\n", text), text
        return text.strip()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition while the daemon runs."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"the daemon takes too long:\n{self.log}"
            time.sleep(0.01)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Sends a signal, waits for the end, and checks that no child is left; returns the seconds that this took."""
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
        folder: an existing folder for the log and the address file.
        arguments: further arguments besides --listen.
    """
    return daemon(folder, "peer", str(model), *LOOPBACK, *arguments)


@contextmanager
def daemon(folder: Path, *arguments: str) -> Iterator[Daemon]:
    """Starts `splitnet ...`, which serves until a signal ends it, and stops it at the end.

    Args:
        folder: an existing folder for the log and the address file.
        arguments: all arguments except --address-file.
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
    """Daemons that serve `spans` of a model in one swarm, which the first daemon starts. each: further arguments of
    each daemon."""
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
    """The result of a command: its exit code, its two outputs, and its duration."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def error(self) -> str:
        """The last sentence of a failed command; only progress messages may come before it."""
        assert self.code == 1, self.errors
        *progress, last = self.errors.splitlines()
        assert all(line.endswith(" ...") for line in progress), self.errors
        assert last.startswith("error: "), self.errors
        return last.removeprefix("error: ")


def run(folder: Path, *arguments: str, given: str | None = None) -> Finished:
    """Runs `splitnet ...` to its end, and checks that none of its processes is left.

    Args:
        folder: the folder with the user's key.
        given: text for the command's stdin.
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
        """Waits for a condition while the command runs."""
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def stop(self, number: signal.Signals) -> Finished:
        """Sends a signal, and waits for the end."""
        self.process.send_signal(number)
        return self.finish(left=number == signal.SIGKILL)

    def finish(self, *, left: bool = False) -> Finished:
        """Waits for the end. left: allows a child that ends only when it notices the end of its parent."""
        output, errors = (text.decode() for text in self.process.communicate(timeout=COMMAND_TIMEOUT_S))
        if not left:
            expect_nothing_left(self.run)
        return Finished(self.process.returncode, output, errors, time.monotonic() - self.began)


@contextmanager
def background(folder: Path, *arguments: str, program: Sequence[str] = SPLITNET) -> Iterator[Background]:
    """Starts `splitnet ...`, and kills it at the end if it still runs; `folder` has the user's key."""
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
    """Fails if a process that a command has started is alive."""
    left: list[str] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_VARIABLE) == run:
                left.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue  # The process belongs to another user, or has just ended.
    assert not left, f"still running: {left}"


def _environment(folder: Path, run: str) -> dict[str, str]:
    """This process's environment, but with a separate key, without a hub, and with the same output on every
    terminal."""
    own = {"SPLITNET_KEY_FILE": str(folder / "key"), RUN_VARIABLE: run}
    return {**os.environ, **own, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "100"}
