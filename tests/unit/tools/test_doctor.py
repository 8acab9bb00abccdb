"""The checks of `splitnet doctor` that need no swarm."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.blocks.model_sizes import ModelSizes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.hivemind_node import NodeAnswer
from splitnet.directory.record import PeerRecord
from splitnet.quant.native import Kernels
from splitnet.security.identity import Identity
from splitnet.tools.doctor import document, examination, has_failed, machine_checks, summary
from splitnet.tools.doctor.machine_checks import CheckResult, Status, failed, memory, open_model, passed, warned
from tests.unit.random_models import random_checkpoint
from tests.unit.swarm.test_swarm import RECORD

ALLOWED_S = 3.0
SIZES = ModelSizes(
    name="small",
    dtype="float32",
    num_blocks=6,
    hidden_size=64,
    block_bytes=2**30,
    expert_bytes=0,
    expert_share=1.0,
    kv_bytes=512,
    client_part_bytes=2**29,
    head_bytes=0,
    max_positions=None,
)


@pytest.mark.parametrize("version", ["3.11.0", "3.14.0rc1"])
def test_a_supported_python_passes(version: str) -> None:
    assert machine_checks.python_version(">=3.11", version) == passed("python", version)


def test_an_old_python_fails() -> None:
    found = machine_checks.python_version(">=3.11", "3.10.12")
    assert found.status is Status.failed and "3.10.12, splitnet needs >=3.11: install that" in found.text


def test_missing_and_unfit_libraries_are_named_with_a_command() -> None:
    requirements = ["alpha>=2,<3", "beta", "gamma>=1; extra == 'dev'", "delta; python_version < '3'"]
    there = {"alpha": "3.1", "beta": "0.1"}
    (found,) = machine_checks.libraries(requirements, there.get)
    assert found.status is Status.failed
    assert found.text == "alpha is 3.1, splitnet needs <3,>=2: run `pip install 'alpha<3,>=2'`"
    (found,) = machine_checks.libraries(["beta", "epsilon>=1"], there.get)
    assert found.text == "epsilon is not installed: run `pip install 'epsilon>=1'`"
    (found,) = machine_checks.libraries(requirements, {**there, "alpha": "2.0+cpu"}.get)
    assert found == passed("libraries", "2 are installed, in versions that fit")


def test_little_disk_space_is_a_warning(tmp_path: Path) -> None:
    assert machine_checks.disk(tmp_path / "absent" / "cache", 1).status is Status.passed
    found = machine_checks.disk(tmp_path, 1 << 60)
    assert found.status is Status.warned and "the whole model takes" in found.text and "HF_HOME" in found.text


def test_the_key_check_creates_no_key(tmp_path: Path) -> None:
    found, identity = machine_checks.key_of(tmp_path / "folder" / "key")
    assert found.status is Status.passed and identity is None and list(tmp_path.iterdir()) == []
    mine = Identity.load_or_create(tmp_path / "key")
    found, identity = machine_checks.key_of(tmp_path / "key")
    assert found.status is Status.passed and identity is not None and identity.public == mine.public


@pytest.mark.parametrize(
    ("free", "status", "text"),
    [
        (4 * 2**30, Status.passed, "room for 2 of 6 blocks"),
        (100 * 2**30, Status.passed, "room for 6 of 6 blocks"),
        (2**30, Status.warned, "enough for a client, but not for one block"),
        (2**28, Status.failed, "a client of small takes 0.5 GiB: end other programs"),
    ],
)
def test_the_memory_check_counts_blocks_and_the_client_part(free: int, status: Status, text: str) -> None:
    found = memory(SIZES, free)
    assert found.status is status and text in found.text


@pytest.mark.parametrize("fault", ["no folder", "no config", "a shard is missing", "the index is damaged", "a family"])
def test_an_unusable_model_fails_with_a_remedy(fault: str, tmp_path: Path) -> None:
    folder = random_checkpoint("llama", tmp_path / "model", blocks=2)
    assert open_model(str(folder))[0].status is Status.passed
    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    if fault == "no folder":
        folder = tmp_path / "other"
        expected = f"there is no folder {folder}: give"
    elif fault == "no config":
        config.unlink()
        expected = "has no config.json: give"
    elif fault == "a shard is missing":
        next(folder.glob("*.safetensors")).unlink()
        expected = "download it again"
    elif fault == "the index is damaged":
        index.write_text("{")
        expected = "does not name, for each tensor, a file in the same folder"
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "t5"}))
        expected = "cannot be cut into spans"
    found, checkpoint = open_model(str(folder))
    assert found.status is Status.failed and expected in found.text and checkpoint is None


answers = st.lists(st.builds(NodeAnswer, st.uuids().map(str), ahead_s=st.floats(-1e6, 1e6)), min_size=1, max_size=7)


@given(answers)
def test_the_clock_check_fails_only_if_most_nodes_disagree(nodes: list[NodeAnswer]) -> None:
    found = examination.clocks(nodes, ALLOWED_S)
    off = [node for node in nodes if abs(node.ahead_s) > ALLOWED_S]
    if not off:
        assert found.status is Status.passed
    elif found.status is Status.warned:
        assert any(node.address in found.text for node in off)
    if found.status is Status.failed:
        assert 2 * len(off) >= len(nodes)
    if len(off) == len(nodes) and len({node.ahead_s > 0 for node in nodes}) == 1:
        assert found.status is Status.failed


@given(st.text(max_size=60))
def test_every_fault_of_a_node_has_a_remedy(fault: str) -> None:
    (found,) = examination.join_addresses([NodeAnswer("/ip4/192.0.2.1/tcp/1/p2p/x", fault=f"!{fault}")])
    assert found.status is Status.failed and ("check" in found.text or "copy" in found.text)


def test_blocks_without_memory_for_a_context_are_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint("llama", tmp_path / "llama", blocks=6, max_position_embeddings=8192))

    def peer(start: int, end: int, free: int, capacity: int = 8192, **facts: Any) -> PeerRecord:
        facts |= {"start": start, "end": end, "kv_free_positions": free, "kv_capacity": capacity, "bytes_per_ms": 1e5}
        return replace(RECORD, key=Identity.generate().public, **facts)

    def told(positions: int, *records: PeerRecord) -> CheckResult:
        return examination.context(checkpoint, positions, records, {record.key.text: 2.0 for record in records})

    head, tail = peer(0, 3, 8000), peer(3, 6, 3000)
    reads = {"past_ms": ((1.0, 100.0), (10.0, 900.0))}
    assert told(3000, head, tail).status is Status.passed
    busy = told(4096, head, tail)
    assert busy.status is Status.warned and "blocks 3..5 have room for 3000 at most now" in busy.text
    assert told(4096, head, tail, peer(2, 6, 5000)).status is Status.passed
    small = told(4096, head, peer(3, 6, 3000, 3500))
    assert small.status is Status.failed and "blocks 3..5 hold 3500 at most: start peers" in small.text
    assert "made for 8192 positions" in told(10_000, head, tail).text
    # The blocks take 6 ms per token and the links 2 ms; after 8,192 positions each block reads for 10 ms more.
    whole = peer(0, 6, 8192)
    speeds = [
        float(found[1])
        for record in (whole, replace(whole, **reads))
        if (found := re.search(r"then ([\d.]+) tokens/s", told(8192, record).text))
    ]
    assert speeds == pytest.approx([1000 / 8, 1000 / 68], rel=0.02)
    assert "which some peers do not report" in told(2000, head, tail).text
    assert "which some peers do not report" not in told(2000, replace(head, **reads), replace(tail, **reads)).text


def test_a_swarm_without_peers_fails() -> None:
    found = examination.served_model({}, None)
    assert found.status is Status.failed and "splitnet peer MODEL" in found.text


def test_the_report_counts_and_lists_findings() -> None:
    findings = [passed("python", "3.11"), warned("disk", "little"), failed("port", "taken")]
    assert summary(findings).startswith("1 passed, 1 warned, 1 failed: docs/doctor.md")
    assert summary(findings[:1]) == "1 passed, 0 warned, 0 failed"
    assert has_failed(findings) and not has_failed(findings[:2])
    told = json.loads(json.dumps(document(findings)))
    assert told["failed"] is True
    assert told["findings"][1] == {"check": "disk", "status": "warn", "text": "little"}


def test_the_installed_package_passes() -> None:
    assert {finding.check: finding.status for finding in machine_checks.software()} == {
        "python": Status.passed,
        "libraries": Status.passed,
    }
    assert machine_checks.devices().status is Status.passed


@pytest.mark.parametrize(
    ("kernels", "status"),
    [(Kernels.FAST, Status.passed), (Kernels.PLAIN, Status.passed), (Kernels.NONE, Status.warned)],
)
def test_missing_kernels_are_a_warning(kernels: Kernels, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitnet.quant.native.kernels_here", lambda: kernels)
    assert machine_checks.kernels().status is status
