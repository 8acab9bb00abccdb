"""`splitnet doctor --report`: what bug reports need is in it, and nothing that names a user, a machine or a text."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from splitnet.cli.main import app
from splitnet.errors import SplitnetError
from splitnet.security.identity import Identity
from splitnet.tools.doctor import examination
from splitnet.tools.doctor.machine_checks import CheckResult, failed, passed, warned
from splitnet.tools.doctor.report import SET, shown
from splitnet.version import __version__
from tests.option_table import settings

USER, HOST, HOME = "edgarallan", "ravens-nest", "/home/edgarallan"
SECRET, PROMPT = "sk-4f1c9a77e0", "Tell nobody about Lenore"
PEER = f"tcp://203.0.113.77:31331?key={Identity.generate().public.text}"
MULTIADDR = "/ip4/198.51.100.7/tcp/31330/p2p/12D3KooWG1v6rQ3nQ2Cvp5RdrM5EezFqUsDh7yHZiTWFcYGn7gyU"
IPV6 = "2001:db8::77:1"
PRIVATE = (
    *(USER, HOST, HOME, SECRET, PROMPT, PEER, PEER.rpartition("=")[2], "203.0.113.77", "198.51.100.7", IPV6),
    *("12D3KooW", "Lenore", "secret-model", "6379"),
)
CONFIGURATION = f"""
[common]
join = ["{MULTIADDR}"]
key-file = "{HOME}/key"
codec = "int8"
[generate]
system = "{PROMPT}"
[serve]
state = "redis://:{SECRET}@{HOST}:6379/0"
max-requests = 7
sampling-defaults = "checkpoint"
"""
FINDINGS = [
    passed("python", "3.11"),
    failed("model", f"there is no folder {HOME}/secret-model of {USER}@{HOST}: give another"),
    passed("peer", f"{PEER} answers"),
    warned("peer", f"[{IPV6}]:1 does not answer to {SECRET}: {PROMPT}"),
]
Doctor = Callable[..., Result]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Runs `splitnet doctor` on a machine with private names, whose checks find `FINDINGS`."""

    def findings(setup: object) -> Iterator[CheckResult]:
        yield from FINDINGS

    monkeypatch.setattr(examination, "examine", findings)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(getpass, "getuser", lambda: USER)
    for name, value in {"node": HOST, "release": f"6.1.7-{USER}", "version": f"#1 {USER}@{HOST}"}.items():
        monkeypatch.setattr(platform, name, lambda value=value: value)
    file = tmp_path / "config.toml"
    file.write_text(CONFIGURATION)
    for name in [name for name in os.environ if name.startswith("SPLITNET_")]:
        monkeypatch.delenv(name)
    names = {"HOME": HOME, "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST, "HF_TOKEN": SECRET}
    options = {"API_KEY_FILE": f"{HOME}/keys", "ALLOW_HOST": HOST, "PORT": "203.0.113.77", "MAX_WAITING": "3"}
    environment = names | {f"SPLITNET_SERVE_{name}": value for name, value in options.items()}
    environment |= {"SPLITNET_CHAT_SYSTEM": PROMPT, "SPLITNET_PEER_LISTEN": IPV6, "SPLITNET_PEER_KV_MEMORY": "8GiB"}
    environment |= {f"SPLITNET_{SECRET}": SECRET, "SPLITNET_CONFIG": str(file)}
    return lambda *arguments: CliRunner().invoke(app, ["doctor", *arguments], env=environment)


def test_a_report_has_nothing_private(doctor: Doctor, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    told = doctor("--no-lan", "--join", PEER, "--public-host", HOST, "--report", str(file))
    assert told.exit_code == 1 and HOME in told.output and "2 passed, 1 warned, 1 failed" in told.output
    text = file.read_text()
    assert [each for each in (*PRIVATE, str(tmp_path), str(Path.home())) if each.lower() in text.lower()] == []
    report: Any = json.loads(text)
    assert report["versions"]["splitnet"] == __version__ and report["versions"]["torch"]
    assert report["system"]["release"] == "6.1.7" and report["cpu"]["cores"] == os.cpu_count()
    assert report["checks"] == {"python": "pass", "model": "fail", "peer": "pass warn"}
    options = report["options"]
    assert {name for name, value in options.items() if value == SET} == {
        *(f"SPLITNET_SERVE_{name}" for name in ("API_KEY_FILE", "ALLOW_HOST", "PORT")),
        *("SPLITNET_CHAT_SYSTEM", "SPLITNET_PEER_LISTEN", "--join", "--public-host", "--report"),
        *("join in [common]", "key-file in [common]", "system in [generate]", "state in [serve]"),
    }
    values = {"SPLITNET_PEER_KV_MEMORY": "8GiB", "SPLITNET_SERVE_MAX_WAITING": "3", "codec in [common]": "int8"}
    values |= {"--lan": "False", "max-requests in [serve]": "7", "sampling-defaults in [serve]": "checkpoint"}
    assert {name: value for name, value in options.items() if value != SET} == values


def test_a_report_is_printed_alone(doctor: Doctor) -> None:
    told = doctor("--report", "-")
    assert told.exit_code == 1 and json.loads(told.output)["checks"]["model"] == "fail"


def test_a_file_that_cannot_be_written_is_named(doctor: Doctor, tmp_path: Path) -> None:
    told = doctor("--report", str(tmp_path / "absent" / "report"))
    assert isinstance(told.exception, SplitnetError) and "give another --report" in str(told.exception)


@given(st.sampled_from(settings()), st.sampled_from([each for each in PRIVATE if each != "6379"]))
def test_no_option_of_any_command_shows_a_private_value(setting: Any, value: str) -> None:
    assert shown(setting, value) == shown(setting, [value]) == SET
