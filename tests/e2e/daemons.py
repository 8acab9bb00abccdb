"""Peer daemons and client commands as a user starts them: processes of `python -m splitnet`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SPLITNET = (sys.executable, "-m", "splitnet")
LOOPBACK = ("--listen", "tcp://127.0.0.1:0", "--threads", "1")
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0


@dataclass
class Daemon:
    """A process of `splitnet peer` that has been started; it may not serve yet."""

    process: subprocess.Popen[bytes]
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
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.serves:
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"the daemon does not serve:\n{self.log}"
            time.sleep(0.02)
        return self.address_file.read_text().strip()

    def children(self) -> list[psutil.Process]:
        """Its child processes: the daemon of libp2p."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Sends a signal and waits for the end; gives the seconds that took."""
        began = time.monotonic()
        self.process.send_signal(number)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        return time.monotonic() - began


@contextmanager
def starting(folder: Path, model: str | Path, *arguments: str) -> Iterator[Daemon]:
    """Starts `splitnet peer MODEL ...` on loopback, and stops it at the end.

    Args:
        folder: for its log and its address file; must exist.
        arguments: more than where to listen.
    """
    name = f"peer-{len(list(folder.glob('*.log')))}"
    address_file, log_file = folder / f"{name}.address", folder / f"{name}.log"
    command = [*SPLITNET, "peer", str(model), *LOOPBACK, *arguments, "--address-file", str(address_file)]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(folder))
    daemon = Daemon(process, address_file, log_file)
    try:
        yield daemon
    finally:
        if process.poll() is None:
            daemon.stop()


@contextmanager
def daemons(folder: Path, model: str | Path, spans: Sequence[tuple[int, int]], *arguments: str) -> Iterator[list[Daemon]]:
    """Daemons that serve `spans` of a model in one swarm; the first began it."""
    with ExitStack() as stack:
        running: list[Daemon] = []
        for start, end in spans:
            join = ("--join", running[0].address()) if running else ()
            blocks = ("--blocks", f"{start}:{end}")
            running.append(stack.enter_context(starting(folder, model, *blocks, *join, *arguments)))
        for daemon in running:
            daemon.address()
        yield running


@dataclass
class Command:
    """A client command that runs, or has run."""

    process: subprocess.Popen[str]
    began: float
    given: str | None = None

    def result(self, timeout_s: float = 100.0) -> Finished:
        """Waits for the end of the command."""
        try:
            output, errors = self.process.communicate(self.given, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, errors = self.process.communicate()
            raise AssertionError(f"no end within {timeout_s} s; it said:\n{output}\n{errors}") from None
        return Finished(self.process.returncode, output, errors, time.monotonic() - self.began)


@dataclass(frozen=True)
class Finished:
    """What a command left: its exit code, its two outputs, and how long it took."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def error(self) -> str:
        """The one sentence that a failed command ends with."""
        assert "Traceback" not in self.errors, self.errors
        lines = [line for line in self.errors.splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("error: ")]
        assert len(found) == 1 and lines[-1] == found[0], self.errors
        return found[0].removeprefix("error: ")


def command(folder: Path, *arguments: str, given: str | None = None) -> Command:
    """Starts `splitnet ...`; several can run at once.

    Args:
        folder: holds the key of this user.
        given: what it reads from stdin.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [*SPLITNET, *arguments],
        stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder),
    )
    return Command(process, began, given)


def run(folder: Path, *arguments: str, given: str | None = None) -> Finished:
    """Runs `splitnet ...` to its end."""
    return command(folder, *arguments, given=given).result()


def environment(folder: Path) -> dict[str, str]:
    """This process's, with a key of its own and output that is the same on every terminal."""
    return {**os.environ, "SPLITNET_KEY_FILE": str(folder / "key"), "NO_COLOR": "1", "COLUMNS": "200"}
