"""`splitnet service` with stand-ins for systemd's programs, and the real `systemd-analyze`."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitnet.cli.main import app
from splitnet.cli.service import UNIT
from splitnet.errors import SplitnetError

ADDRESS = "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWG1v6rQ3nQ2Cvp5RdrM5EezFqUsDh7yHZiTWFcYGn7gyU"
PEER = ["model folder", "--memory", "4GiB", "--join", ADDRESS, "--blocks", "0:4"]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file with the calls of systemd's programs. They fail if the file `fails` has their name."""
    programs, log, fails = tmp_path / "programs", tmp_path / "calls", tmp_path / "fails"
    programs.mkdir()
    log.touch()
    fails.touch()
    for name in ("systemctl", "systemd-analyze", "loginctl"):
        fail = f'if grep -qx "{name} $1\\|{name} $2" {fails}; then echo no bus >&2; exit 1; fi'
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n{fail}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SPLITNET_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    yield log


def unit(folder: Path) -> Path:
    return folder / "config" / "systemd" / "user" / NAME


def asked(*arguments: str) -> str:
    """The output of the command; raises its error."""
    result = CliRunner().invoke(app, ["service", *arguments])
    if isinstance(result.exception, SplitnetError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


NAME = "splitnet-peer.service"


def test_the_unit_starts_the_peer_with_the_options_folder_and_variables(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITNET_PEER_KV_MEMORY", "1GiB")
    monkeypatch.setenv("HF_TOKEN", 'a "secret" of 100%')
    asked("install", *PEER)
    file = unit(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600
    lines = file.read_text().splitlines()
    (command,) = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
    assert shlex.split(command) == [sys.executable, "-m", "splitnet", "peer", *PEER]
    assert f"WorkingDirectory={tmp_path}" in lines
    variables = [line for line in lines if line.startswith("Environment=")]
    assert variables == ['Environment="HF_TOKEN=a \\"secret\\" of 100%%"', 'Environment="SPLITNET_PEER_KV_MEMORY=1GiB"']
    assert calls.read_text().splitlines() == [
        f"systemd-analyze --user verify --man=no {file}",
        "systemctl --user daemon-reload",
        "systemctl --user enable splitnet-peer.service",
        "systemctl --user restart --no-block splitnet-peer.service",
        "loginctl enable-linger",
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_accepts_the_unit(calls: Path, tmp_path: Path) -> None:
    asked("install", 'a model of 100% $HOME \\ "quotes"', *PEER[1:])
    real = os.environ["PATH"].partition(os.pathsep)[2]
    command = [str(shutil.which("systemd-analyze", path=real)), "verify", "--man=no", str(unit(tmp_path))]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and "splitnet-peer" not in told.stderr, told.stderr


def test_the_unit_has_what_the_unit_of_the_documents_has() -> None:
    def settings(text: str) -> dict[str, dict[str, str]]:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment]
        parser.read_string(text)
        return {name: dict(parser[name]) for name in parser.sections()}

    documented = settings((Path(__file__).parents[3] / "deploy" / NAME).read_text())["Service"]
    own = settings(UNIT.replace("{environment}", ""))["Service"]
    for name in own.keys() - {"ExecStart", "WorkingDirectory"}:
        assert own[name] == documented[name], name


def test_remove_stops_the_peer_and_deletes_the_unit(calls: Path, tmp_path: Path) -> None:
    asked("install", *PEER)
    calls.write_text("")
    asked("status")
    asked("remove")
    assert not unit(tmp_path).exists()
    assert calls.read_text().splitlines() == [
        f"systemctl --user --no-pager status {NAME}",
        f"systemctl --user disable --now {NAME}",
        "systemctl --user daemon-reload",
    ]
    for action in ("status", "remove"):
        with pytest.raises(SplitnetError, match="splitnet service install MODEL"):
            asked(action)


@pytest.mark.parametrize("failing", ["systemd-analyze verify", "systemctl daemon-reload", "systemctl enable"])
def test_a_failure_leaves_the_unit_as_it_was(calls: Path, tmp_path: Path, failing: str) -> None:
    fails = tmp_path / "fails"
    fails.write_text(f"{failing}\n")
    with pytest.raises(SplitnetError, match="failed: no bus"):
        asked("install", *PEER)
    assert not unit(tmp_path).exists()
    fails.write_text("")
    asked("install", *PEER)
    before = unit(tmp_path).read_text()
    fails.write_text(f"{failing}\n")
    with pytest.raises(SplitnetError, match="failed: no bus"):
        asked("install", "another model")
    assert unit(tmp_path).read_text() == before


def test_without_linger_it_says_when_the_peer_runs(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "fails").write_text("loginctl enable-linger\n")
    assert "while you are logged in" in asked("install", *PEER)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["install"], "name a model"),
        (["install", "model", "--threads", "x"], "--threads"),
        (["install", "model", "--no-such-option"], "--no-such-option"),
        (["status", "model"], "takes no arguments"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    calls: Path, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    result = CliRunner().invoke(app, ["service", *arguments])
    assert result.exit_code != 0 and reason in (result.output + str(result.exception))
    assert not unit(tmp_path).exists() and not calls.read_text()


def test_root_and_machines_without_systemd_are_told_what_to_do(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(SplitnetError, match=r"docs/deploy\.md"):
        asked("install", *PEER)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SplitnetError, match=f"no systemd.*splitnet peer {shlex.join(PEER)}"):
        asked("install", *PEER)
    assert not unit(tmp_path).exists()
