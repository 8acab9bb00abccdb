"""Changed bytes of honest traffic reach a live peer, and are decoded by whoever reads them."""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from splitnet.client.swarm import ModelFacts
from splitnet.errors import ProtocolError
from splitnet.net.messages import decode
from tests.attacks.frames import SESSIONS, flood, frames_of, mutated, said
from tests.swarm.harness import local_swarm
from tests.unit.random_models import random_checkpoint

pytestmark = pytest.mark.swarm

MEMORY_BOUND = 192 * 2**20


def test_a_peer_answers_on_and_keeps_its_memory(tmp_path: Path) -> None:
    folder = random_checkpoint("llama", tmp_path, blocks=4, hidden=64)
    ids = torch.arange(9)[None] + 3
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = local.generate(ids, **options)
    with local_swarm(folder, [(0, 4)], kv_memory=16 * 2**20) as swarm:
        peer = swarm.peers[0]
        facts = ModelFacts.of(peer.checkpoint)
        assert torch.equal(swarm.model().generate(ids, **options), expected)
        flood(peer.endpoint, facts, count=4_000, blocks=(0, 4), seed=1)
        before = psutil.Process().memory_info().rss
        assert flood(peer.endpoint, facts, count=16_000, blocks=(0, 4), seed=2) >= 16_000
        assert psutil.Process().memory_info().rss - before < MEMORY_BOUND
        assert torch.equal(swarm.model().generate(ids, **options), expected)


def test_frames_that_are_no_messages_are_protocol_errors() -> None:
    """Clients decode by the same code."""
    facts = ModelFacts(fingerprint=bytes(32).hex(), name="a model", num_blocks=4, hidden_size=64, max_positions=512)
    messages = [message for session in SESSIONS for message in said(facts, (0, 4), session)]
    decoded = 0
    for frames in islice(mutated(frames_of(messages), 3), 20_000):
        with contextlib.suppress(ProtocolError):
            decode(frames)
            decoded += 1
    assert 1_000 < decoded < 19_000
