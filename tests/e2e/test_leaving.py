"""A daemon that is told to end hands its session over, and the text of the real model goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from splitnet.client.causal_lm import AutoModelForCausalLM
from splitnet.net.identity import Identity
from tests.e2e.conftest import SPANS
from tests.e2e.daemons import daemons
from tests.swarm.generation import After

pytestmark = pytest.mark.e2e

TOKENS = 40


def test_sigterm_hands_the_session_over(demo_checkpoint: Path, local: Any, tokenizer: Any, tmp_path: Path) -> None:
    prompt = tokenizer("Bees find their way home by", return_tensors="pt")
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    with daemons(tmp_path, demo_checkpoint, [*SPANS, SPANS[1]], "--kv-memory", "64MiB") as running:
        model = AutoModelForCausalLM.from_pretrained(
            demo_checkpoint, initial_peers=[running[0].address()], codec="none", identity=Identity.generate()
        )

        def leave() -> None:
            assert cache.session is not None
            address = cache.session.hops[1].endpoint.address
            leaver.append(next(daemon for daemon in running if address in daemon.log))
            leaver[0].process.send_signal(signal.SIGTERM)

        leaver: list[Any] = []
        try:
            with model.session() as cache:
                got = model.generate(**prompt, **options, streamer=After(5, leave))
                assert cache.session is not None
                causes = [cause for recovery in cache.session.recoveries for cause in recovery.lost]
        finally:
            model.close()
        assert leaver[0].process.wait(20) == 0
        assert "leaving the swarm" in leaver[0].log
    assert any("leaving" in cause for cause in causes), causes
    assert torch.equal(got, local.generate(**prompt, **options))
