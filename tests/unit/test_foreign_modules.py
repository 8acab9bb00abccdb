"""An error reports modules of another project that have the name of one of splitnet's packages, and names their
file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitnet import foreign_modules
from splitnet.cli.main import app
from splitnet.errors import SplitnetError
from splitnet.tools.doctor import machine_checks
from splitnet.tools.doctor.machine_checks import Status

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["scheduler", "peers"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["{}.py", "{}/__init__.py"])
def foreign(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A module of this name in a folder of `tmp_path`."""
    file = tmp_path / "first" / request.param.format(name)
    file.parent.mkdir(parents=True)
    file.write_text('"""Runs jobs at their times."""\n')
    return file


def advice(name: str, file: Path) -> str:
    return f"`import {name}` finds {file}, which is not part of splitnet: install splitnet in an environment of its own"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder; its modules take precedence."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_splitnets_own_modules_are_not_foreign() -> None:
    assert foreign_modules() == []


def test_the_first_import_warns_of_a_foreign_module(name: str, foreign: Path, tmp_path: Path) -> None:
    ran = run(tmp_path / "first", "-c", "import splitnet")
    assert ran.returncode == 0
    assert f"RuntimeWarning: {advice(name, foreign)}" in ran.stderr


@pytest.mark.parametrize("foreign", ["{}.py"], indirect=True)
@pytest.mark.parametrize("name", ["scheduler"])
def test_commands_with_a_foreign_import_end_with_the_advice(name: str, foreign: Path, tmp_path: Path) -> None:
    for command in ("doctor", "status"):
        ran = run(tmp_path / "first", "-m", "splitnet", command)
        assert ran.returncode == 1
        assert ran.stderr.splitlines()[-1].startswith(f"error: {advice(name, foreign)}")


def test_doctor_and_peer_fail_with_a_foreign_module(
    name: str, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "first")
    found = next(machine_checks.software())
    assert found.status is Status.failed and found.check == "libraries" and found.text.startswith(advice(name, foreign))
    ran = CliRunner().invoke(app, ["peer", "m"])
    assert isinstance(ran.exception, SplitnetError) and str(ran.exception).startswith(advice(name, foreign))


def test_a_module_without_a_file_is_foreign(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, type(sys)(name))
    (sentence,) = foreign_modules()
    assert sentence.startswith(f"`import {name}` finds a module without a file, which is not part of splitnet")
