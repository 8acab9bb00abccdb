"""The messages that a serving daemon sends to systemd."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from splitnet.process import EVERY_S, Watchdog


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_gets_a_message_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
    now = [0.0]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}" if abstract else name)
        systemd.setblocking(False)
        watchdog = Watchdog(lambda: now[0])
        for now[0] in (0.0, EVERY_S / 2, EVERY_S):
            watchdog.alive()
        assert [systemd.recv(100) for _ in range(2)] == [b"READY=1\nWATCHDOG=1"] * 2
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
    now[0] = 3 * EVERY_S
    watchdog.alive()  # No socket listens any more.


def test_no_message_is_sent_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(socket, "socket", None)
    Watchdog().alive()
