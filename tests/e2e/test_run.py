"""`splitnet run` joins or starts a swarm, serves the missing blocks, and answers."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from splitnet.blocks.block_sizes import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.run import FOR_PEER
from splitnet.session.options import ConnectionOptions
from tests.e2e.conftest import Here
from tests.e2e.daemons import SPLITNET
from tests.swarm.harness import local_swarm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

LIMIT_S = 120.0
SHORT = ("--max-new-tokens", "8")


def peers_left() -> list[psutil.Process]:
    """The peers of `splitnet run` that still run; their files are in a folder of this command."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("splitnet-run-" in argument for argument in child.cmdline())]


def test_one_machine_serves_everything_and_answers_once(small: Path, here: Here) -> None:
    answer = here("run", str(small), "bees", "--serve", "--no-lan", "--stats", *SHORT)
    assert answer.code == 0, answer.errors
    assert answer.output.strip() and "blocks 0..5" in answer.errors
    assert f"on other machines: splitnet run {small} --join" in answer.errors
    assert not peers_left()


def test_only_missing_blocks_are_served(small: Path, here: Here) -> None:
    with local_swarm(small, [(0, 4)]) as swarm:
        join = ("--join", swarm.addresses[0])
        refused = here("run", str(small), "bees", *join, *SHORT)
        assert refused.code == 1 and "blocks 4..5" in refused.error and "give --serve" in refused.error
        assert re.search(r"can serve 6 of 6 blocks in [\d.]+ GiB of memory; .* at most \d+ tokens/s", refused.error)
        refused = here("run", str(small), "bees", *join, "--no-serve")
        assert refused.code == 1 and "leave out --no-serve" in refused.error
        memory = 2 * block_bytes(Checkpoint.open(small), None, "auto", "cpu")
        serving = ("--serve", "--memory", f"{memory}B", "--stats")
        answer = here("run", str(small), *join, *serving, *SHORT, given="bees\n")
        assert answer.code == 0, answer.errors
        assert answer.output.strip() and "waiting for peers" not in answer.errors
        assert "blocks 0..3" in answer.errors and "blocks 4..5" in answer.errors
    assert not peers_left()


def test_a_whole_swarm_needs_no_peer_here(duo: str, small: Path, here: Here) -> None:
    answer = here("run", str(small), "bees", "--join", duo, *SHORT)
    assert answer.code == 0 and answer.output.strip()
    assert answer.output == here("generate", str(small), "bees", "--join", duo, *SHORT).output
    assert "starting a peer" not in answer.errors


def test_a_peer_that_ends_tells_why(small: Path, here: Here) -> None:
    failed = here("run", str(small), "bees", "--serve", "--no-lan", "--memory", "1KiB")
    assert failed.code == 1 and re.search("the peer ended: .*use --memory with more", failed.error)
    assert here("run", str(small), "bees", "--no-serve", "--memory", "1GiB").code == 2


def test_without_a_model_it_lists_models(
    small: Path, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / small.name).symlink_to(small)
    (tmp_path / "one.gguf").write_bytes(bytes(2**20))
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    listed = here("run", "--memory", "0.5MiB")
    assert listed.code == 1 and listed.error == "name a model: splitnet run MODEL, on as many machines"
    rows = [re.split(" {2,}", line.strip()) for line in listed.output.splitlines()]
    assert ["./one.gguf", "0.0", "2", "this folder"] in rows
    assert [f"./{small.name}"] == [name for name, *_ in rows if name.startswith("./") and "one" not in name]
    assert any(name == "Qwen/Qwen3-8B" and size == "8.1" for name, size, *_ in rows)


def test_options_of_its_peer_are_options_of_connections() -> None:
    assert all(hasattr(ConnectionOptions, name) for name in FOR_PEER)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_asks_once_at_a_terminal_and_ends_its_peer_with_itself(small: Path, home: Path) -> None:
    terminal, inner = pty.openpty()
    command = [*SPLITNET, "run", str(small), "--no-lan", *SHORT]
    environment = os.environ | {"SPLITNET_KEY_FILE": str(home / "key")}
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment) as process:
        shown = b""

        def shows(text: bytes) -> bool:
            nonlocal shown
            shown += os.read(terminal, 4096)
            return text in shown

        try:
            until(lambda: shows(b"serve them here? [Y/n]"))
            os.write(terminal, b"\n")
            until(lambda: shows(b"/reset forgets"))
            (peer,) = peers_left()
            os.write(terminal, b"bees\n")
            process.terminate()
            assert process.wait(LIMIT_S) == 143
            assert not peer.is_running()
        finally:
            process.kill()
    os.close(inner)
    os.close(terminal)
