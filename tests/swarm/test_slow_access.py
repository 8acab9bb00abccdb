"""A client with a slow uplink: requests that wait on it do not count as lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import netlab
from scheduler import liveness
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.session.events import Cause
from splitnet.swarm.swarm import ModelFacts, Swarm
from tests.swarm.generation import prompt
from tests.swarm.harness import SPANS, local_swarm

pytestmark = pytest.mark.swarm

LENGTH = 150
AT_ONCE = 4
HOSTS = "abc"


@pytest.fixture
def lab() -> Iterator[netlab.Lab]:
    with ExitStack() as stack:
        try:
            yield stack.enter_context(netlab.Lab(["node", "client", *HOSTS], delay_ms=2.0))
        except netlab.LabError as error:
            pytest.skip(str(error))


@pytest.fixture
def model(lab: netlab.Lab, folder: Path) -> Iterator[RemoteCausalLM]:
    with ExitStack() as stack:
        with lab.inside("node"):
            node = stack.enter_context(DhtDirectory.start(listen=[f"/ip4/{lab.address('node')}/tcp/0"]))
        swarm = stack.enter_context(local_swarm(folder, []))
        for host, span in zip(HOSTS, SPANS, strict=True):
            with lab.inside(host):
                swarm.add(*span, listen=f"tcp://{lab.address(host)}:0", join=node.addresses)
        checkpoint = swarm.peers[0].checkpoint
        with lab.inside("client"):
            client = stack.enter_context(Swarm(ModelFacts.of(checkpoint), node.addresses))
            yield attach(checkpoint, client, codec="none")


@pytest.mark.full
def test_prompts_that_wait_for_each_other_do_not_count_as_lost(
    lab: netlab.Lab, model: RemoteCausalLM, local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pings and the messages that open the next session wait behind the prompts, too."""
    monkeypatch.setattr(liveness, "MAX_SILENCE_S", 0.3)
    prompts = prompt(length=LENGTH, batch=AT_ONCE)["input_ids"].split(1)

    def answered(ids: torch.Tensor) -> tuple[torch.Tensor, list[Cause]]:
        with model.session(max_length=LENGTH + 2) as cache:
            logits = model(ids, past_key_values=cache).logits
            assert cache.session is not None
            return logits, [each.cause for each in cache.session.recoveries]

    answered(prompts[0][:, :2])
    lab.access("client", delay_ms=2.0, rate_mbit=0.4)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(answered, prompts))
    for ids, (logits, recoveries) in zip(prompts, found, strict=True):
        assert recoveries == []
        assert torch.allclose(logits, local(ids).logits, atol=1e-4)
