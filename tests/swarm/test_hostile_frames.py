"""Mutated frames of honest traffic reach live peers, clients and nodes of the directory."""

from __future__ import annotations

import contextlib
import logging
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.errors import ProtocolError
from splitnet.hf.causal_lm import attach
from splitnet.security.identity import Identity
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.messages import decode
from tests.attacks import requests
from tests.attacks.directory import fake_record
from tests.attacks.frames import SESSIONS, flood, frames_of, mutated, said
from tests.attacks.hop import HostileHop, use
from tests.swarm.harness import dht_node, local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

MEMORY_BOUND = 192 * 2**20


def test_a_peer_keeps_answering_with_bounded_memory(tmp_path: Path, node: DhtDirectory) -> None:
    folder = random_checkpoint("llama", tmp_path, blocks=4, hidden=64)
    ids = torch.arange(9)[None] + 3
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = local.generate(ids, **options)
    with local_swarm(folder, [(0, 4)], node=node, kv_memory=16 * 2**20) as swarm:
        peer = swarm.peers[0]
        facts = ModelFacts.of(peer.checkpoint)
        assert torch.equal(swarm.model().generate(ids, **options), expected)
        flood(peer.endpoint, facts, count=4_000, blocks=(0, 4), seed=1)
        before = psutil.Process().memory_info().rss
        assert flood(peer.endpoint, facts, count=16_000, blocks=(0, 4), seed=2) >= 16_000
        assert psutil.Process().memory_info().rss - before < MEMORY_BOUND
        assert torch.equal(swarm.model().generate(ids, **options), expected)


def announce(node: DhtDirectory, hop: HostileHop, facts: ModelFacts) -> None:
    claims = {"address": hop.endpoint.address, "end": facts.num_blocks, "num_blocks": facts.num_blocks}
    assert node.announce(fake_record(hop.identity, facts.fingerprint, **claims), hop.identity)


@pytest.mark.full
def test_a_client_keeps_working_with_bounded_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = random_checkpoint("llama", tmp_path, blocks=4, hidden=64)
    checkpoint = Checkpoint.open(folder)
    facts = ModelFacts.of(checkpoint)
    with dht_node() as node:
        with HostileHop(facts) as hop:
            announce(node, hop, facts)
            heard = SimpleNamespace(value=0)
            use(folder, node.addresses, 60.0, heard, count=2_000)
            before = psutil.Process().memory_info().rss
            caplog.set_level(logging.WARNING)
            use(folder, node.addresses, 60.0, heard, count=30_000)
            assert heard.value >= 30_000
            assert psutil.Process().memory_info().rss - before < MEMORY_BOUND
            assert len([line for line in caplog.messages if "an invalid message" in line or "answered:" in line]) < 60
        with HostileHop(facts, is_wild=False) as hop, Swarm(facts, node.addresses) as swarm:
            announce(node, hop, facts)
            ids = torch.arange(9)[None] + 3
            model: Any = attach(checkpoint, swarm, codec="none")
            assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8).shape == (1, 17)


@pytest.mark.full
def test_a_node_of_the_directory_keeps_answering_with_bounded_memory() -> None:
    identity = Identity.generate()
    record = fake_record(identity, requests.MODEL)
    with dht_node() as node, DhtDirectory.start(initial_peers=node.addresses) as reader:
        requests.ask(node.addresses[0], count=64)
        before = psutil.Process().memory_info().rss
        assert requests.ask(node.addresses[0], count=3_000, seed=1) >= 3_000
        handed = SimpleNamespace(value=0)
        requests.hand_over(60.0, handed, count=6_000)
        assert psutil.Process().memory_info().rss - before < MEMORY_BOUND
        assert reader.announce(record, identity)
        assert identity.public in {peer.key for peer in reader.peers(requests.MODEL)}


def test_frames_that_are_no_messages_are_protocol_errors() -> None:
    """Clients use the same decoder."""
    facts = ModelFacts(fingerprint=bytes(32).hex(), name="a model", num_blocks=4, hidden_size=64, max_positions=512)
    messages = [message for session in SESSIONS for message in said(facts, (0, 4), session)]
    decoded = 0
    for frames in islice(mutated(frames_of(messages), 3), 20_000):
        with contextlib.suppress(ProtocolError):
            decode(frames)
            decoded += 1
    assert 1_000 < decoded < 19_000
