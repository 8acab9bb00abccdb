"""What distance costs: a chain of peers far from each other, beside a star with the client in the middle of every hop.

Three daemons with a third of the blocks each and a client are four hosts of an emulated network (see docs/netlab.md),
with the same delay between any two. In the chain a token crosses one link more than there are peers. Where two peers
cannot reach each other the client carries, so cutting the links between peers makes a star, which crosses two links per
peer. Both are compared with the least that is possible: the delay of these links and what the devices compute. To open
a star takes 3 s more, for which peers try to reach each other; the time to the first token has that in it.

    sudo .venv/bin/python benchmarks/wan_chain.py CHECKPOINT [--delay 20] [--rate 100] [--codecs none int8]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from netlab import Lab, LabError
from netlab.peers import GuidedSwarm, LabPeers, StepTimes, measure_steps
from transformers.generation.streamers import BaseStreamer

from splitnet.client.causal_lm import RemoteCausalLM, attach
from splitnet.client.session import Session
from splitnet.client.swarm import ModelFacts, PlannedHop
from splitnet.model.checkpoint import Checkpoint

PEERS = ("first", "middle", "last")
TEXT = Path(__file__).parent / "data" / "varied_text.txt"
CONTEXT = 128
ROOM = 1024


@dataclass(frozen=True)
class Seen:
    """What was measured of one way to connect the hosts, in ms."""

    shape: str
    codec: str
    links: int
    rounds: list[StepTimes]
    open_ms: list[float]
    first_token_ms: list[float]
    generated_ms: float
    """Per token of `generate()`: the client's own embedding, head and choice included."""


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--delay", type=float, default=20.0, help="ms one way between any two hosts")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s of every host's link, 0: no limit")
    parser.add_argument("--codecs", nargs="+", default=["none", "int8"])
    parser.add_argument("--tokens", type=int, default=100, help="decode tokens per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    edges = [round(index * checkpoint.num_blocks / len(PEERS)) for index in range(len(PEERS) + 1)]
    spans = dict(zip(PEERS, itertools.pairwise(edges), strict=True))
    try:
        with (
            Lab(["client", *PEERS], delay_ms=arguments.delay, rate_mbit=arguments.rate) as lab,
            LabPeers(lab, arguments.checkpoint, spans) as peers,
            lab.inside("client"),
            GuidedSwarm(ModelFacts.of(checkpoint), list(peers.addresses.values())) as swarm,
        ):
            records = sorted(swarm.peers(), key=lambda record: record.start)
            # While links are cut the DHT is not whole, so the route is given instead of planned.
            swarm.route = [PlannedHop(record, record.start, record.end) for record in records]
            assert [peers.host_of(record) for record in records] == list(PEERS)
            print_header()
            # The star comes first: a link that has been open would have to be found dead before the client carries.
            for a, b in itertools.combinations(PEERS, 2):
                lab.cut(a, b)
            for codec in arguments.codecs:
                report(measure("star", swarm, checkpoint, codec, arguments), arguments.delay)
            lab.heal()
            for codec in arguments.codecs:
                report(measure("chain", swarm, checkpoint, codec, arguments), arguments.delay)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(shape: str, swarm: GuidedSwarm, checkpoint: Checkpoint, codec: str, arguments: argparse.Namespace) -> Seen:
    ids = checkpoint.tokenizer()(TEXT.read_text(), return_tensors="pt").input_ids[:, :CONTEXT]
    hidden = torch.randn(CONTEXT, swarm.facts.hidden_size)
    rounds: list[StepTimes] = []
    opened: list[float] = []
    for _ in range(arguments.rounds):
        session = Session(swarm, budget=ROOM, codec=codec)
        began = time.perf_counter()
        session.open()
        opened.append((time.perf_counter() - began) * 1000)
        carried = [hop.carried for hop in session.hops]
        assert carried == [shape == "star"] * (len(PEERS) - 1) + [False], carried
        rounds.append(measure_steps(session, hidden, arguments.tokens))
        session.close()
    model = attach(checkpoint, swarm, codec=codec)
    firsts: list[float] = []
    gaps: list[float] = []
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        times = generate(model, ids, 20)
        firsts.append((times[0] - began) * 1000)
        gaps += [(late - early) * 1000 for early, late in itertools.pairwise(times)]
    links = 2 * len(PEERS) if shape == "star" else len(PEERS) + 1
    return Seen(shape, codec, links, rounds, opened, firsts, statistics.median(gaps))


def generate(model: RemoteCausalLM, prompt: torch.Tensor, tokens: int) -> list[float]:
    """When each of some new tokens came."""
    clock = Clock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
    )
    return clock.times[1:]  # the prompt comes first


def print_header() -> None:
    columns = ["shape", "codec", "ms per token", "least: links + devices", "times the least (range)"]
    columns += ["ms per token of generate()", "to open, ms", f"prompt of {CONTEXT}, ms", "to the first token, ms"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)


def report(seen: Seen, delay_ms: float) -> None:
    ratios = [steps.total_ms / (seen.links * delay_ms + steps.compute_ms) for steps in seen.rounds]
    total = statistics.median(steps.total_ms for steps in seen.rounds)
    compute = statistics.median(steps.compute_ms for steps in seen.rounds)
    prompt = statistics.median(steps.prompt_ms for steps in seen.rounds)
    print(
        f"| {seen.shape} | {seen.codec} | {total:.1f} | {seen.links} x {delay_ms:g} + {compute:.1f} "
        f"| {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) | {seen.generated_ms:.1f} "
        f"| {statistics.median(seen.open_ms):.0f} | {prompt:.0f} | {statistics.median(seen.first_token_ms):.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
