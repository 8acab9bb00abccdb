"""The image of `deploy/Dockerfile` is built, and `deploy/compose.yaml` runs with it: a node of the DHT, three peers of
the demo model, and a gateway."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.containers import BASE, BUILD_TIMEOUT_S, NEEDS_PODMAN, ROOT, Podman, make_base, make_wheels, run

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(2400), NEEDS_PODMAN]

PEERS = ("peer-1", "peer-2", "peer-3")
SERVICES = ("dht", *PEERS, "gateway")
HEALTHY_TIMEOUT_S = 400.0


class Swarm:
    """The services of `deploy/compose.yaml`, which are started one by one."""

    def __init__(self, podman: Podman, model: Path, port: int) -> None:
        self._podman = podman
        self._env = {"MODELS": str(model.parent), "MODEL": model.name, "PEER_MEMORY": "60MiB", "PORT": str(port)}
        # Peers share few cores, as in other tests.
        services = {peer: {"environment": {"SPLITNET_PEER_THREADS": "1"}} for peer in PEERS}
        self._threads = model.with_name("threads.json")
        self._threads.write_text(json.dumps({"services": services}))

    def compose(self, *arguments: str) -> None:
        file = ROOT / "deploy" / "compose.yaml"
        command = ["podman-compose", "--podman-path", self._podman.program, "--file", file, "--file", self._threads]
        run([*command, *arguments], timeout=HEALTHY_TIMEOUT_S, env=self._env)

    def container(self, service: str) -> str:
        """The id of the container of a service."""
        label = f"label=com.docker.compose.service={service}"
        (found,) = self._podman("ps", "--all", "--quiet", "--filter", label).split()
        return found

    def wait_until_healthy(self, service: str) -> None:
        """Waits for the check of the image: without systemd, podman itself does not repeat the check."""
        container = self.container(service)
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        while not self._passes(container):
            assert time.monotonic() < deadline, self.log(service)
            time.sleep(0.5)

    def _passes(self, container: str) -> bool:
        try:
            self._podman("healthcheck", "run", container)
        except AssertionError:
            return False
        return True

    def exit_code(self, service: str) -> str:
        return self._podman("inspect", "--format", "{{.State.ExitCode}}", self.container(service)).strip()

    def read(self, service: str, *files: str) -> str:
        """The texts of files in a container."""
        return self._podman("exec", self.container(service), "cat", *files)

    def log(self, service: str) -> str:
        both = 'exec "$0" logs "$1" 2>&1'
        return run(["sh", "-c", both, self._podman.program, self.container(service)], timeout=60)


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman with the image `splitnet`."""
    folder = tmp_path_factory.mktemp("containers")
    for part in ("base", "wheels"):
        (folder / part).mkdir()
    try:
        with closing(Podman(folder)) as podman:
            make_base(podman, folder / "base")
            make_wheels(folder / "wheels")
            (folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
            # HEALTHCHECK is not part of the default format.
            options = ["--format=docker", "--layers=false", f"--build-arg=BASE={BASE}", "--tag=splitnet"]
            options += [f"--volume={folder}/wheels:/wheels:ro", f"--volume={folder}/pip.conf:/etc/pip.conf:ro"]
            podman("build", *options, f"--file={ROOT}/deploy/Dockerfile", ROOT, timeout=BUILD_TIMEOUT_S)
            yield podman
    finally:
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_the_image_serves_as_the_compose_file_says(podman: Podman, demo_checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / demo_checkpoint.name
    shutil.copyfile(demo_checkpoint, model)
    model.chmod(0o644)
    tmp_path.chmod(0o755)
    port = free_port()
    swarm = Swarm(podman, model, port)
    for service in SERVICES:
        swarm.compose("up", "--detach", "--no-build", "--no-deps", service)
        swarm.wait_until_healthy(service)

    spans = {re.findall(r"serving blocks (\S+) of", swarm.log(peer))[0] for peer in PEERS}
    assert len(spans) > 1, spans

    asked = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 10}
    reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"].strip()

    for service in SERVICES:
        status = swarm.read(service, "/proc/1/status", "/proc/1/mounts")
        assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE) and re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        assert re.search(r"^\S+ / \S+ ro,", status, re.MULTILINE), status

    swarm.compose("stop")
    codes = {service: swarm.exit_code(service) for service in SERVICES}
    assert codes == dict.fromkeys(SERVICES, "0"), "\n".join(map(swarm.log, SERVICES))

    for service in ("dht", "peer-1"):
        swarm.compose("start", service)
        swarm.wait_until_healthy(service)
    for service, key in (("dht", r"/p2p/(\w+)"), ("peer-1", r"\?key=(sn1\w+)")):
        first, second = re.findall(key, swarm.log(service))
        assert first == second
