"""The files of `deploy/` fit the command line, systemd, Compose and Kubernetes."""

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
MANIFESTS = DEPLOY / "kubernetes"
KUBERNETES = "1.30"  # the oldest version that the manifests are checked for, besides the newest
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
    known |= {"read_only", "stop_grace_period", "tmpfs", "volumes"}
    for name, service in compose["services"].items():
        assert set(service) <= known, f"{name} has keys that Compose may not know"
        for other, condition in service.get("depends_on", {}).items():
            assert other in compose["services"] and condition == {"condition": "service_healthy"}
        # Podman refuses two mounts at one place.
        targets = [mount.split(":")[0] for mount in service["tmpfs"]]
        targets += [volume.rsplit(":/", 1)[1].split(":")[0] for volume in service["volumes"]]
        assert service["read_only"] and "/tmp" in targets and len(set(targets)) == len(targets)
        for volume in service["volumes"]:
            source = volume.rsplit(":/", 1)[0]
            assert source.startswith("${MODELS:?") or source in compose["volumes"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "by default, ports are open to this machine only"
    build = compose["services"]["dht"]["build"]
    root = (DEPLOY / build["context"]).resolve()
    assert (root / build["dockerfile"]) == DEPLOY / "Dockerfile"


def manifests() -> list[dict[str, Any]]:
    """All objects of the manifests."""
    listed = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"]
    assert sorted(["kustomization.yaml", *listed]) == sorted(path.name for path in MANIFESTS.iterdir())
    return [one for file in listed for one in yaml.safe_load_all((MANIFESTS / file).read_text())]


def pods() -> dict[str, dict[str, Any]]:
    """The pod of each workload, by the name of the workload."""
    return {one["metadata"]["name"]: one["spec"]["template"] for one in manifests() if "template" in one["spec"]}


POD_NAMES = ("splitnet-dht", "splitnet-peer", "splitnet-gateway")


def test_manifests_are_valid_in_the_oldest_and_newest_version_of_kubernetes() -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for one in manifests():
        for version in (KUBERNETES, schemas.latest_version()):
            schemas.validate(one, version, strict=True)


def test_selectors_ports_and_claims_of_manifests_fit_together() -> None:
    found = pods()
    assert tuple(found) == POD_NAMES
    for one in manifests():
        spec = one["spec"]
        labels = spec["selector"] if one["kind"] == "Service" else spec["selector"]["matchLabels"]
        pod = found[labels["app"]]
        assert pod["metadata"]["labels"] == labels
        (container,) = pod["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        if one["kind"] == "Service":
            assert {port["targetPort"]: port["port"] for port in spec["ports"]} == ports
        if one["kind"] == "StatefulSet":
            assert spec["serviceName"] == one["metadata"]["name"]
        if "template" in spec:
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
            assert mounted == claims | {volume["name"] for volume in pod["spec"]["volumes"]}


@pytest.mark.parametrize("name", POD_NAMES)
def test_a_pod_runs_an_existing_command_and_waits_for_the_address(name: str) -> None:
    (container,) = pods()[name]["spec"]["containers"]
    (generated,) = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["configMapGenerator"]
    variables = dict(literal.split("=", 1) for literal in generated["literals"])
    command = [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word) for word in container["args"]]
    joins = name != "splitnet-dht"
    options = parsed([*command, *(["--join", ADDRESS] if joins else [])])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if not joins:
        assert options["public_host"] == name
        assert f"/tcp/{ports['dht']}" in options["listen"]
        return
    assert container["envFrom"] == [{"configMapRef": {"name": generated["name"]}}]
    (variable,) = container["env"]
    assert variable["name"] == "SPLITNET_JOIN" and "optional" not in variable["valueFrom"]["configMapKeyRef"]
    if name == "splitnet-peer":
        assert options["listen"].endswith(f":{ports['activations']}")
        assert options["metrics_port"].endswith(f":{ports['metrics']}")
    else:
        assert (options["port"], options["allow_host"]) == (ports["http"], [name])


@pytest.mark.parametrize("name", POD_NAMES)
def test_a_pod_is_restricted_and_can_write_where_the_image_writes(name: str) -> None:
    pod = pods()[name]["spec"]
    (container,) = pod["containers"]
    image = (DEPLOY / "Dockerfile").read_text()
    (user,) = re.findall(r"useradd .*--uid (\d+)", image)
    security = pod["securityContext"]
    assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {str(security[key]) for key in ("runAsUser", "runAsGroup", "fsGroup")} == {user}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # Kubernetes would set SPLITNET_DHT_PORT and others, which are options.
    assert pod["enableServiceLinks"] is False
    writable = tuple(f"{mount['mountPath']}/" for mount in container["volumeMounts"])
    files = assignments(image, pattern=r"(?:^ENV |^ +)")
    assert all(f"{files[key]}/".startswith(writable) for key in files if key != "PATH")
    assert "/tmp/" in writable


@pytest.mark.parametrize("name", POD_NAMES[1:])
def test_a_pod_has_time_to_hand_over_its_work_and_is_not_drained_with_others(name: str) -> None:
    pod = pods()[name]["spec"]
    (container,) = pod["containers"]
    options = parsed([container["args"][0], "model", "--join", ADDRESS])
    slept = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert pod["terminationGracePeriodSeconds"] >= options["drain_s"] + int(slept[1]) + 5
    budgets = [one["spec"] for one in manifests() if one["kind"] == "PodDisruptionBudget"]
    assert {"maxUnavailable": 1, "selector": {"matchLabels": {"app": name}}} in budgets


def test_the_image_is_built_from_existing_files_and_runs_without_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for word in line.split()}
    assert copied == allowed
    assert all((DEPLOY.parent / name).exists() for name in copied)
    last_stage = text[text.rindex("\nFROM ") :]
    assert last_stage.index("\nUSER splitnet\n") < last_stage.index("\nENTRYPOINT ")
