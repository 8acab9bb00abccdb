"""`splitnet compress`, and a swarm that serves its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Here
from tests.e2e.daemons import daemons
from tests.swarm.harness import local_swarm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_peers_serve_a_compressed_model(small: Path, here: Here, tmp_path: Path) -> None:
    few = tmp_path / "few"
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    refused = here("compress", str(small), "--output", str(few), "--text", str(short))
    assert "too few to compress by: give at least 2048" in refused.error

    other = here("compress", str(small), "--output", str(few), "--model-id", "ab" * 32)
    assert f"the model must be {'ab' * 32}" in other.error

    command = ("compress", str(small), "--output", str(few), "--positions", "2048")
    done = here(*command)
    assert done.code == 0, done.errors
    assert f"splitnet peer {few}" in done.output
    assert "has something else" in here(*command).error

    with local_swarm(few, [(0, 2), (2, 6)], dtype="float32") as swarm:
        join = ("--join", swarm.addresses[0])
        told = here("generate", str(few), *join, "--max-new-tokens", "4", "Hello")
        assert told.code == 0 and told.output.strip(), told.errors
        status = json.loads(here("status", str(few), "--json", *join).output)
    assert {peer["dtype"] for peer in status["peers"]} == {"stored/float32"}
    assert "in few bits already" in here("compress", str(few), "--output", str(tmp_path / "fewer")).error


def test_daemons_compress_a_model(small: Path, here: Here, tmp_path: Path, home: Path) -> None:
    whole, few = tmp_path / "whole", tmp_path / "few"
    settings = ("--positions", "2048", "--bits", "3")
    assert here("compress", str(small), "--output", str(whole), *settings).code == 0
    assert here("key").code == 0
    clients = tmp_path / "clients"
    clients.write_text(here("key").output, encoding="utf-8")
    with daemons(tmp_path, small, [(0, 2), (2, 6)], "--compress-for", str(clients)) as running:
        join = ("--join", running[0].address())
        done = here("compress", str(small), "--output", str(few), *settings, *join)
        assert done.code == 0, done.errors
    assert {file.name: file.read_bytes() for file in few.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }
