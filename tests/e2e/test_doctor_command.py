"""`splitnet doctor`, run like a user runs it, on daemons."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.conftest import DUO_SPANS, Here
from tests.e2e.small_model import small_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWG1v6rQ3nQ2Cvp5RdrM5EezFqUsDh7yHZiTWFcYGn7gyU"


def test_a_sound_swarm_passes(duo: str, small: Path, here: Here) -> None:
    told = here("doctor", str(small), "--join", duo, "--listen", "tcp://127.0.0.1:0")
    assert told.code == 0 and not told.errors
    *lines, summary = told.output.splitlines()
    # The result must not depend on a compiler on this machine.
    warned = [line for line in lines if line.startswith("warn kernels")]
    assert all(line.startswith("pass ") for line in lines if line not in warned)
    assert summary == f"{len(lines) - len(warned)} passed, {len(warned)} warned, 0 failed"
    for start, end in DUO_SPANS:
        assert re.search(
            rf"pass peer +sn1\w+ at tcp://127.0.0.1:\d+, blocks {start}..{end - 1}: answers in", told.output
        )


def test_a_context_length_is_checked(duo: str, small: Path, here: Here) -> None:
    told = here("doctor", str(small), "--join", duo, "--context", "200", "--json")
    by_check = {finding["check"]: finding for finding in json.loads(told.output)["findings"]}
    assert by_check["context"]["status"] == "pass"
    assert re.fullmatch(
        r"a session of 200 positions fits: [\d.]+ s to the first token of a prompt that long, then [\d.]+ tokens/s",
        by_check["context"]["text"],
    )
    assert here("doctor", "--context", "200").error == "--context needs a model: give MODEL, too"


def test_a_swarm_of_other_weights_fails_in_json(
    duo: str, small: Path, demo_checkpoint: Path, here: Here, tmp_path: Path
) -> None:
    (tmp_path / small.name).mkdir()
    revised = small_model(tmp_path / small.name, demo_checkpoint, seed=1)
    told = here("doctor", str(revised), "--json", "--join", duo, "--join", NOBODY)
    assert told.code == 1 and not told.errors
    report = json.loads(told.output)
    failed = {finding["check"]: finding["text"] for finding in report["findings"] if finding["status"] == "fail"}
    assert report["failed"] and list(failed) == ["swarm"]
    assert f"another revision of {small.name}" in failed["swarm"]


def test_errors_of_other_commands_recommend_doctor(small: Path, here: Here) -> None:
    told = here("status", str(small), "--join", NOBODY)
    assert told.error.endswith("; `splitnet doctor --join ADDR` looks for the cause")
    assert "doctor" not in here("peer", str(small), "--blocks", "4-9").error
