"""A peer daemon as a child process of a command, until the command ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from splitnet.cli.configuration import without_options
from splitnet.errors import SplitnetError

STOP_TIMEOUT_S = 15.0
LOOK_S = 0.05  # interval between two looks at the child's address file


class PeerProcess:
    """`splitnet peer MODEL` in a process of its own. Options that come from variables do not apply to it.

    arguments: of the command, MODEL first. folder: for the files of this peer, which `name` begins.
    """

    def __init__(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        self.name = name
        self.address_file = folder / f"{name}-address"
        self._log = folder / f"{name}-log"
        command = [sys.executable, "-m", "splitnet", "peer", *arguments, "--address-file", str(self.address_file)]
        environment = without_options(os.environ)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
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
