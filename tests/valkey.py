"""A server of Valkey or Redis for tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")
NEEDS_VALKEY = pytest.mark.skipif(SERVER is None, reason="neither valkey-server nor redis-server is installed")


class Valkey:
    """A server of Valkey at a socket in this folder, with nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "valkey"
        self.url = f"unix://{self._socket}"
        self.start()

    def start(self) -> None:
        at = ["--port", "0", "--unixsocket", str(self._socket), "--save", "", "--dir", str(self._socket.parent)]
        self._process = subprocess.Popen([str(SERVER), *at], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "eady to accept connections" in line:
                return
        raise AssertionError("valkey-server has ended")

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
