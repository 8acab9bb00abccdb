"""The files of `deploy/` fit the command line, systemd and Compose."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from splitnet.cli.main import app

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = sorted(path.name for path in DEPLOY.glob("*.service"))
ADDRESS = "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooWG1v6rQ3nQ2Cvp5RdrM5EezFqUsDh7yHZiTWFcYGn7gyU"
BINARY = "/opt/splitnet/bin/splitnet"

COMMANDS: Mapping[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def parsed(command: list[str]) -> dict[str, Any]:
    """The options that `splitnet ...` would run with; fails for wrong usage."""
    name, *arguments = command
    with COMMANDS[name].make_context(name, arguments) as context:
        return context.params


def assignments(text: str, *, pattern: str) -> dict[str, str]:
    """The variables that a text sets as `NAME=value`, at the places that match `pattern`."""
    return {match[1]: match[2] for match in re.finditer(pattern + r"([A-Z_]+)=(\S*)", text, re.MULTILINE)}


def variables_of_options() -> dict[str, Any]:
    """For each environment variable, the option or options that it sets."""
    found: dict[str, Any] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            names = parameter.envvar or ()
            for name in [names] if isinstance(names, str) else names:
                found[name] = (command, parameter)
    return found


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    unit = tmp_path / name
    unit.write_text((DEPLOY / name).read_text().replace(BINARY, sys.executable))
    told = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    # systemd only warns about unknown settings.
    assert name not in told.stderr, told.stderr


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_starts_an_existing_command(name: str) -> None:
    text = (DEPLOY / name).read_text()
    (line,) = re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
    binary, *command = shlex.split(line.replace("${SPLITNET_MODEL}", "model"))
    assert binary == BINARY
    assert command[0] == name.removeprefix("splitnet-").removesuffix(".service")
    joined = ["--join", ADDRESS] if command[0] != "dht" else []
    assert parsed([*command, *joined])
    (file,) = re.findall(r"^EnvironmentFile=-?/etc/splitnet/(.+)$", text, re.MULTILINE)
    assert (DEPLOY / file).is_file()


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_bounds_memory_and_descriptors_and_restarts_hung_daemons(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert re.search(r"^MemoryMax=(\d+%|\dG)$", text, re.MULTILINE)
    assert re.search(r"^LimitNOFILE=\d{5}$", text, re.MULTILINE)
    watched = name != "splitnet-dht.service"
    for line in ("Type=notify", "NotifyAccess=main", "WatchdogSec=60", "TimeoutStartSec=infinity"):
        assert (f"\n{line}\n" in text) == watched
    assert "\nRestart=on-failure\n" in text


@pytest.mark.parametrize("name", [*UNITS, "dht.env", "peer.env", "serve.env", "Dockerfile"])
def test_variables_set_options_to_valid_values(name: str) -> None:
    text = (DEPLOY / name).read_text()
    where = {"e": r"(?:^Environment=|^#?| )", "k": r"(?:^ENV |^ +)", "v": r"^#?"}[name[-1]]
    options = variables_of_options()
    set_here = {key: value for key, value in assignments(text, pattern=where).items() if key.startswith("SPLITNET_")}
    assert set_here
    for variable, value in set_here.items():
        if variable in ("SPLITNET_MODEL", "SPLITNET_CACHE"):
            continue
        command, parameter = options[variable]
        taken = ADDRESS if variable == "SPLITNET_JOIN" else value
        with command.make_context(command.name, [], resilient_parsing=True) as context:
            assert parameter.process_value(context, [taken] if parameter.multiple else taken) is not None


def test_the_document_names_existing_variables() -> None:
    named = set(re.findall(r"SPLITNET_[A-Z_]+", (DEPLOY.parent / "docs" / "deploy.md").read_text()))
    assert named and named <= variables_of_options().keys()


def services(compose: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Yields each service with its command; variables are replaced by their values, as Compose does."""
    for name, service in compose["services"].items():
        command = [re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)\}", r"\2", word) for word in service["command"]]
        yield name, service, [word if word != "/models/" else "/models/model" for word in command]


def test_every_service_runs_an_existing_command(compose: dict[str, Any]) -> None:
    kinds: list[str] = []
    for _, service, command in services(compose):
        kinds.append(command[0])
        joins = "--join" in " ".join(service.get("entrypoint", ()))
        assert joins == (command[0] != "dht")
        assert parsed([*command, *(["--join", ADDRESS] if joins else [])])
    assert kinds == ["dht", "peer", "peer", "peer", "serve"]


def test_the_entrypoint_of_peers_joins_through_the_address_in_the_file(compose: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "splitnet").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (tmp_path / "splitnet").chmod(0o755)
    (tmp_path / "address").write_text(ADDRESS + "\n")
    _, script, name = compose["services"]["peer-1"]["entrypoint"][1:]
    script = script.replace("$$", "$").replace("/swarm/", f"{tmp_path}/")
    told = subprocess.run(
        ["sh", "-c", script, name, "peer", "a model"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert told.stdout == f"peer|a model|--join|{ADDRESS}|"


def test_services_refer_to_known_keys_services_and_volumes(compose: dict[str, Any]) -> None:
    known = {"build", "cap_drop", "command", "depends_on", "entrypoint", "image", "ports", "restart", "security_opt"}
    known |= {"stop_grace_period", "volumes"}
    for name, service in compose["services"].items():
        assert set(service) <= known, f"{name} has keys that Compose may not know"
        for other, condition in service.get("depends_on", {}).items():
            assert other in compose["services"] and condition == {"condition": "service_healthy"}
        for volume in service["volumes"]:
            source = volume.rsplit(":/", 1)[0]
            assert source.startswith("${MODELS:?") or source in compose["volumes"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "by default, ports are open to this machine only"
    build = compose["services"]["dht"]["build"]
    root = (DEPLOY / build["context"]).resolve()
    assert (root / build["dockerfile"]) == DEPLOY / "Dockerfile"


def test_the_image_is_built_from_existing_files_and_runs_without_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for word in line.split()}
    assert copied == allowed
    assert all((DEPLOY.parent / name).exists() for name in copied)
    last_stage = text[text.rindex("\nFROM ") :]
    assert last_stage.index("\nUSER splitnet\n") < last_stage.index("\nENTRYPOINT ")
