"""A peer daemon as a child process of a command, until the command ends."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from splitnet.cli.configuration import without_options
from splitnet.errors import SplitnetError
from splitnet.process import ENDING

STOP_TIMEOUT_S = 15.0
LOOK_S = 0.05  # interval between two looks at the child's address file


class ForkedCommand:
    """`splitnet ...` as a fork of a process that has imported a peer's modules, which several peers then share. The
    methods are those of `subprocess.Popen`. For Linux: libraries of macOS do not survive a fork."""

    @staticmethod
    def prepare() -> None:
        """Begins the imports."""
        from multiprocessing.forkserver import ensure_running, set_forkserver_preload  # not on Windows

        set_forkserver_preload(["peers.preloaded", "splitnet.cli.main"])
        ensure_running()

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.prepare()
        context: Any = get_context("forkserver")
        self._process = context.Process(target=_run_command, args=(arguments, log, environment), daemon=True)
        self._process.start()
        self.pid: int = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self._process.exitcode


def _run_command(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    os.setsid()
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["splitnet", *arguments]
    runpy.run_module("splitnet", run_name="__main__", alter_sys=True)


class PeerProcess:
    """`splitnet peer MODEL` in a process of its own. Options that come from variables do not apply to it.

    arguments: of the command, MODEL first. folder: for the files of this peer, which `name` begins. forked: see
    `ForkedCommand`.
    """

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, *, forked: bool = False) -> None:
        self.name = name
        self.address_file = folder / f"{name}-address"
        self._log = folder / f"{name}-log"
        words = ["peer", *arguments, "--address-file", str(self.address_file)]
        environment = without_options(os.environ)
        self.process: subprocess.Popen[bytes] | ForkedCommand
        if forked:
            self.process = ForkedCommand(words, self._log, environment)
            return
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "splitnet", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def log(self) -> str:
        """The output of the daemon so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def check_running(self) -> None:
        """Raises SplitnetError with the last line of the log if the daemon has ended."""
        if self.process.poll() is not None:
            lines = self.log().strip().splitlines()
            raise SplitnetError(f"{self.name} ended: {lines[-1] if lines else 'its log is empty'}")

    def await_address(self, timeout_s: float) -> str:
        """Waits until the daemon serves, and returns the address to join with.

        Raises SplitnetError: the daemon has ended, or does not serve after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not self.address_file.exists():
            self.check_running()
            if time.monotonic() > deadline:
                raise SplitnetError(f"{self.name} did not start in {timeout_s:.0f} s: is the machine busy?")
            time.sleep(LOOK_S)
        return self.address_file.read_text(encoding="utf-8").strip()

    def terminate(self) -> None:
        """Asks the daemon to leave its swarm."""
        self.process.terminate()

    def close(self) -> None:
        """Waits until the daemon has left, or kills it."""
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
