"""The real nginx with the example of `deploy`, before gateways of a test."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.swarm.harness import wait_until

SERVER = shutil.which("nginx")
NEEDS_NGINX = pytest.mark.skipif(SERVER is None, reason="nginx is not installed")


@contextmanager
def nginx(folder: Path, ports: Sequence[str]) -> Iterator[str]:
    """The path of the socket of nginx, which runs with the example of `deploy`, before gateways at these ports."""
    socket = folder / "nginx"
    example = (Path(__file__).parents[1] / "deploy" / "nginx.conf").read_text()
    first, *others = re.findall(r"server 127.0.0.1:\d+ (.*);", example)
    assert all(other == first for other in others)
    servers = "\n".join(f"server 127.0.0.1:{port} {first};" for port in ports)
    example, count = re.subn(r"(    server 127.0.0.1:\d+ .*;\n)+", servers, example)
    assert count == 1 and "listen 127.0.0.1:8000;" in example
    (folder / "gateways.conf").write_text(example.replace("listen 127.0.0.1:8000;", f"listen unix:{socket};"))
    (folder / "nginx.conf").write_text(
        f"user {getpass.getuser()}; daemon off; pid pid; error_log stderr;\nevents {{}}\n"
        "http { access_log off; client_body_temp_path body; proxy_temp_path proxy; include gateways.conf; }\n"
    )
    command = [str(SERVER), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
    with subprocess.Popen(command) as process:
        try:
            wait_until(socket.exists)
            yield str(socket)
        finally:
            process.terminate()
