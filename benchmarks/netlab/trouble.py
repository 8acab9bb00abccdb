"""What a session meets when the network or a program fails in mid-answer, on hosts that are apart.

Host a has the first half of the blocks, b and c have the second half each. After some tokens something happens to the
second hop of a session that generates. The pause is how much longer one token took than usual.

    sudo .venv/bin/python -m benchmarks.netlab.trouble CHECKPOINT [--delay 10] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from splitnet.client.causal_lm import attach
from splitnet.client.swarm import ModelFacts, Swarm
from splitnet.model.checkpoint import Checkpoint
from splitnet.net.directory import Directory

from .generation import Clock, generate
from .lab import Lab, LabError
from .peers import LabPeers

TEXT = "The tides are the rise and fall of the sea, and they come from the pull of the moon and of the sun."
TOKENS = 48
AFTER = 12


@dataclass(frozen=True)
class Trouble:
    """Something that happens to a host, and how it ends."""

    name: str
    begin: Callable[[str], object]
    end: Callable[[str], object]


@dataclass(frozen=True)
class Seen:
    pause_ms: float
    repairs: int
    carried: bool
    same: bool


class Bench:
    """The lab with a DHT node beside the peers, since any of them may be killed.

    Args:
        lab: hosts client, a, b and c; the thread is in the client.
        checkpoint: the model.
    """

    def __init__(self, lab: Lab, peers: LabPeers, checkpoint: Checkpoint, address: str) -> None:
        self._peers = peers
        self._checkpoint = checkpoint
        self._address = address
        self._prompt = checkpoint.tokenizer()(TEXT, return_tensors="pt").input_ids
        leaving: list[threading.Thread] = []

        def leave(host: str) -> None:
            leaving.append(threading.Thread(target=peers.stop, args=(host,)))
            leaving[-1].start()

        def come_back(host: str) -> None:
            leaving.pop().join()
            peers.start(host)

        self.troubles = (
            Trouble("it leaves (SIGTERM)", leave, come_back),
            Trouble("its program is killed", peers.kill, peers.start),
            Trouble("its program hangs (SIGSTOP)", peers.freeze, peers.thaw),
            Trouble("its host loses the network", lab.down, lab.up),
            Trouble("its link to the first hop is cut", lambda host: lab.cut("a", host), lambda _: lab.heal()),
        )

    def answer(self) -> torch.Tensor:
        """Undisturbed."""
        with Swarm(ModelFacts.of(self._checkpoint), [self._address]) as swarm:
            return generate(attach(self._checkpoint, swarm, codec="none"), self._prompt, TOKENS, Clock())

    def disturb(self, trouble: Trouble, expected: torch.Tensor) -> Seen:
        """Generates with a trouble after some tokens, then ends it."""
        victims: list[str] = []
        with Swarm(ModelFacts.of(self._checkpoint), [self._address]) as swarm:
            model = attach(self._checkpoint, swarm, codec="none")
            with model.session(max_length=self._prompt.shape[1] + TOKENS) as cache:

                def look(count: int) -> None:
                    if count == AFTER:
                        assert cache.session is not None
                        victims.append(self._peers.host_of(cache.session.hops[1].planned.record))
                        trouble.begin(victims[0])

                clock = Clock(look)
                tokens = generate(model, self._prompt, TOKENS, clock)
                assert cache.session is not None
                pause_ms = max(clock.gaps_ms[AFTER - 1 :]) - statistics.median(clock.gaps_ms)
                carried = any(hop.carried for hop in cache.session.hops)
                seen = Seen(pause_ms, len(cache.session.recoveries), carried, torch.equal(tokens, expected))
        trouble.end(victims[0])
        return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--delay", type=float, default=10.0, help="ms one way between any two hosts")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    half = checkpoint.num_blocks // 2
    spans = {"a": (0, half), "b": (half, checkpoint.num_blocks), "c": (half, checkpoint.num_blocks)}
    try:
        with (
            Lab(["client", *spans], delay_ms=arguments.delay) as lab,
            lab.inside("client"),
            Directory.start(listen=[f"/ip4/{lab.address('client')}/tcp/0"]) as directory,
            LabPeers(lab, arguments.checkpoint, spans, join=directory.addresses[0]) as peers,
        ):
            bench = Bench(lab, peers, checkpoint, directory.addresses[0])
            expected = bench.answer()
            print(
                "| what happens to a hop | pause ms, median (range) | repairs | carried by the client | same tokens |"
            )
            print("|---|---|---|---|---|", flush=True)
            for trouble in bench.troubles:
                report(trouble.name, [bench.disturb(trouble, expected) for _ in range(arguments.repeats)])
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def report(name: str, runs: list[Seen]) -> None:
    pauses = [run.pause_ms for run in runs]
    print(
        f"| {name} | {statistics.median(pauses):.0f} ({min(pauses):.0f}-{max(pauses):.0f}) "
        f"| {statistics.median(run.repairs for run in runs):g} | {sum(run.carried for run in runs)} of {len(runs)} "
        f"| {sum(run.same for run in runs)} of {len(runs)} |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
