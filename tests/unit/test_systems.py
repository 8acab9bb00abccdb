"""Tests features one by one that other operating systems than Linux lack or have in another form;
`tests/swarm/test_systems.py` tests these features together."""

from __future__ import annotations

import ast
import errno
import io
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from splitnet.checkpoint import demo
from splitnet.checkpoint.safetensors import SafetensorsStore
from splitnet.cli import main
from splitnet.directory import mdns
from splitnet.errors import LanError, ModelNotFound, SplitnetError
from splitnet.transport import flow
from splitnet.transport.flow import Wake
from tests.other_system import ROOT


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Two connections, each given by its two ends."""
    made: list[tuple[socket.socket, socket.socket]] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(2):
            mine = socket.create_connection(listener.getsockname())
            made.append((mine, listener.accept()[0]))
    yield made
    for pair in made:
        for end in pair:
            end.close()


def test_the_wake_flag_is_a_socket_without_eventfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "eventfd", raising=False)
    wake = Wake()
    poller = zmq.Poller()
    poller.register(wake.fileno(), zmq.POLLIN)
    assert socket.socket(fileno=os.dup(wake.fileno())).close() is None, "ZeroMQ on Windows polls nothing else"
    assert not poller.poll(0)
    for _ in range(2):
        for _ in range(100_000):  # More than a socket buffer holds.
            wake.set()
        assert poller.poll(1000)
        wake.clear()
        assert not poller.poll(0)
    wake.close()


@pytest.mark.parametrize("lacks", ["the option", "Linux"])
def test_without_socket_cookies_connections_are_identified_by_their_ends(
    lacks: str, monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    if lacks == "Linux":
        monkeypatch.setattr(flow, "_LINUX", False)
    else:
        monkeypatch.setattr(flow, "_SO_COOKIE", 9999)
    (first, its_end), (second, other_end) = pairs
    cookies = [flow.cookie(end.fileno()) for pair in pairs for end in pair]
    assert len(set(cookies)) == 4 and flow.cookie(first.fileno()) == cookies[0]
    flow.shut_down(second.fileno(), cookies[0])  # The descriptor belonged to the first connection before.
    other_end.setblocking(False)
    with pytest.raises(BlockingIOError):
        other_end.recv(1)
    flow.shut_down(first.fileno(), cookies[0])
    assert its_end.recv(1) == b""
    with open(os.devnull, "rb") as file, pytest.raises(OSError):
        flow.cookie(file.fileno())


@pytest.mark.parametrize("model", [r"C:\models\llama", r"models\llama", "C:/models/llama", "./llama"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(model: str) -> None:
    with pytest.raises(ModelNotFound, match="there is no folder"):
        SafetensorsStore.open(model, None)


def test_pipes_use_utf_8_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr(main, "app", lambda: print("日本語"))
    monkeypatch.setattr(main, "claim_process", lambda: None)
    monkeypatch.setattr(main, "ENDING", ())
    main.main()
    sys.stdout.flush()
    assert written.getvalue().decode().strip() == "日本語"


def full(path: str = "/cache/file") -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def blamed(cause: BaseException, text: str = "the model cannot be read: check the network") -> SplitnetError:
    error = SplitnetError(text)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (full(), "/cache/file: the disk is full (No space left on device): free some space"),
        (blamed(full()), "/cache/file: the disk is full (No space left on device): free some space"),
        (blamed(full(), "cannot keep it (No space left on device): free 300 MB"), "cannot keep it (No space left on "),
        (Exception("I/O error: No space left on device (os error 28)"), "the disk is full (No space left on device)"),
        (OSError(errno.EDQUOT, "x"), "your share of the disk is used up"),
        (OSError(errno.EROFS, "x", "/ro"), "/ro: nothing can be written there"),
        (PermissionError(errno.EACCES, "x", "/root"), "/root: this user may not use it"),
        (OSError(errno.EMFILE, "x"), "too many files and connections are open in this process"),
        (blamed(blamed(OSError(errno.ENFILE, "x"))), "too many files are open on this machine"),
        (MemoryError(), "there is not enough memory"),
        (blamed(ConnectionRefusedError(errno.ECONNREFUSED, "x")), "the model cannot be read: check the network"),
    ],
)
def test_errors_of_the_operating_system_are_one_sentence(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence names the cause in the operating system, even if the outer error blames something else."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(main, "claim_process", lambda: None)
    monkeypatch.setattr(main, "ENDING", ())
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1 and said in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "app", lambda: [].pop())
    monkeypatch.setattr(main, "claim_process", lambda: None)
    monkeypatch.setattr(main, "ENDING", ())
    with pytest.raises(IndexError):
        main.main()


def test_a_full_disk_does_not_blame_the_index_of_packages() -> None:
    with pytest.raises(OSError, match="No space left on device") as raised:
        demo._download_error("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    assert raised.value.errno == errno.ENOSPC
    assert "check the network" in str(demo._download_error("ERROR: No matching distribution"))


def test_an_error_names_a_system_that_hides_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ifaddr.get_adapters", refuse)
    with pytest.raises(LanError, match="does not give the addresses of this machine"):
        mdns.LocalNetwork("ab" * 32)


def test_all_text_files_are_opened_with_an_explicit_encoding() -> None:
    files = [
        file for folder in ("peers", "scheduler", "simulator", "splitnet") for file in (ROOT / folder).rglob("*.py")
    ]
    assert [place for file in files for place in _without_encoding(file)] == []


def _without_encoding(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        mode = next((arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant) and arg.value in _MODES), "")
        text = name in ("read_text", "write_text") or (name in ("open", "fdopen") and mode and "b" not in str(mode))
        if text and not any(keyword.arg == "encoding" for keyword in node.keywords):
            yield f"{file.relative_to(ROOT)}:{node.lineno}"


_MODES = {"r", "w", "a", "x", "r+", "w+", "rb", "wb", "ab", "xb", "rt", "wt"}
