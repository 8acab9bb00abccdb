"""A daemon that gets a signal to end hands its session over, and the text of the real model continues."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from splitnet.hf.causal_lm import AutoModelForCausalLM
from splitnet.security.identity import Identity
from tests.e2e.conftest import SPANS
from tests.e2e.daemons import Daemon, starting
from tests.swarm.generation import After

pytestmark = pytest.mark.e2e

TOKENS = 40


def test_a_daemon_with_sigterm_hands_its_session_over(
    trio: list[Daemon], demo_checkpoint: Path, local: Any, tokenizer: Any, tmp_path: Path
) -> None:
    prompt = tokenizer("Bees find their way home by", return_tensors="pt")
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    address, (start, end) = trio[0].address(), SPANS[1]
    blocks = ("--blocks", f"{start}:{end}", "--join", address, "--kv-memory", "64MiB")
    with starting(tmp_path, demo_checkpoint, *blocks) as leaver:
        leaver.address()
        model = AutoModelForCausalLM.from_pretrained(
            demo_checkpoint, initial_peers=[address], codec="none", identity=Identity.generate()
        )
        (twin,) = (peer.key.text for peer in model.swarm.peers() if peer.address in trio[1].log)

        def leave() -> None:
            assert cache.session is not None
            assert cache.session.hops[1].endpoint.address in leaver.log
            model.swarm.bans.lift(twin)
            leaver.process.send_signal(signal.SIGTERM)

        model.swarm.ban(twin, seconds=60.0)  # The session then begins on the peer that will leave.
        try:
            with model.session() as cache:
                got = model.generate(**prompt, **options, streamer=After(5, leave))
                assert cache.session is not None
                causes = [cause for recovery in cache.session.recoveries for cause in recovery.lost]
        finally:
            model.close()
        assert leaver.process.wait(20) == 0
        assert "leaving the swarm" in leaver.log
    assert any("leaving" in cause for cause in causes), causes
    assert torch.equal(got, local.generate(**prompt, **options))
