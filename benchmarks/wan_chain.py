"""The cost of distance: a chain of distant peers, compared with a star, in which the client relays between all hops.

Three daemons with a third of the blocks each and a client are four hosts of an emulated network (see docs/netlab.md),
with the same delay between any two. In the chain a token crosses one link more than there are peers. If two peers
cannot reach each other, the client relays; so after the links between peers are cut, the peers form a star, in which a
token crosses two links per peer. Both shapes are compared with the lower bound: the delay of these links and the
compute time of the devices. Opening a session in a star takes up to 3 s longer, in which peers try to reach each other;
the time to the first token includes these seconds.

    sudo .venv/bin/python -m benchmarks.wan_chain CHECKPOINT [--delay 20] [--rate 100] [--codecs none int8]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.generation import generate
from benchmarks.netlab.peers import GuidedSwarm, LabPeers, StepTimes, even_spans, measure_steps
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.hf.causal_lm import attach
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.plan import PlannedHop
from splitnet.swarm.swarm import ModelFacts
from splitnet.tools.bench.backends import Clock, gaps_s

PEERS = ("first", "middle", "last")
TEXT = Path(__file__).parent / "data" / "varied_text.txt"
CONTEXT = 128
ROOM = 1024
GENERATED = 20
SETTLE_S = 60.0
"""Seconds to wait until peers know which links work: an open link counts as lost after missed heartbeats (at most 15
s), and a healed link has to be opened again."""


@dataclass
class Seen:
    """Measurements of one shape, chain or star, in ms."""

    rounds: list[StepTimes] = field(default_factory=list[StepTimes])
    open_ms: list[float] = field(default_factory=list[float])
    first_token_ms: list[float] = field(default_factory=list[float])
    generated_ms: list[float] = field(default_factory=list[float])
    """Times between tokens of `generate()`, including the client's embedding, head and choice of the token."""


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
    spans = even_spans(checkpoint.num_blocks, PEERS)
    try:
        with (
            Lab(["client", *PEERS], delay_ms=arguments.delay, rate_mbit=arguments.rate) as lab,
            LabPeers(lab, arguments.checkpoint, spans) as peers,
            lab.inside("client"),
            GuidedSwarm(ModelFacts.of(checkpoint), list(peers.addresses.values())) as swarm,
        ):
            records = sorted(swarm.peers(), key=lambda record: record.start)
            assert [peers.host_of(record) for record in records] == list(PEERS)
            # While links are cut, the DHT is incomplete, so the route is given instead of planned.
            swarm.route = [PlannedHop(record, record.start, record.end) for record in records]
            print_header()
            measure("chain", swarm, checkpoint, arguments)
            for a, b in itertools.combinations(PEERS, 2):
                lab.cut(a, b)
            measure("star", swarm, checkpoint, arguments)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(shape: str, swarm: GuidedSwarm, checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """Measures the codecs in turns, so that disturbances of this machine affect all codecs."""
    await_shape(shape, swarm)
    ids = checkpoint.tokenizer()(TEXT.read_text(), return_tensors="pt").input_ids[:, :CONTEXT]
    hidden = torch.randn(CONTEXT, swarm.facts.hidden_size)
    models = {codec: attach(checkpoint, swarm, codec=codec) for codec in arguments.codecs}
    seen = {codec: Seen() for codec in arguments.codecs}
    for _ in range(arguments.rounds):
        for codec, model in models.items():
            began = time.perf_counter()
            session = Session(swarm, ConnectionOptions(codec=codec), reservation=ROOM)
            session.open()
            seen[codec].open_ms.append((time.perf_counter() - began) * 1000)
            seen[codec].rounds.append(measure_steps(session, hidden, arguments.tokens))
            assert is_shape(shape, session)
            session.close()
            clock = Clock()
            began = time.perf_counter()
            generate(model, ids, GENERATED, clock)
            seen[codec].first_token_ms.append((clock.times[0] - began) * 1000)
            seen[codec].generated_ms += [1000 * gap for gap in gaps_s(clock.times)]
    links = 2 * len(PEERS) if shape == "star" else len(PEERS) + 1
    for codec in arguments.codecs:
        report(shape, codec, links, seen[codec], arguments.delay)


def await_shape(shape: str, swarm: GuidedSwarm) -> None:
    """Waits until peers know which of them they can reach."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        session = Session(swarm, ConnectionOptions(), reservation=ROOM)
        session.open()
        settled = is_shape(shape, session)
        session.close()
        if settled:
            return
        if time.monotonic() > deadline:
            raise LabError(f"the peers did not become a {shape} in {SETTLE_S:.0f} s")
        time.sleep(2.0)


def is_shape(shape: str, session: Session) -> bool:
    """Whether the client relays between all hops, or between none."""
    return [hop.relayed for hop in session.hops] == [shape == "star"] * (len(PEERS) - 1) + [False]


def print_header() -> None:
    columns = ["shape", "codec", "ms per token", "least: links + devices", "times the least (range)"]
    columns += ["ms per token of generate()", "to open, ms", f"prompt of {CONTEXT}, ms", "to the first token, ms"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)


def report(shape: str, codec: str, links: int, seen: Seen, delay_ms: float) -> None:
    ratios = [steps.total_ms / (links * delay_ms + steps.compute_ms) for steps in seen.rounds]
    total = statistics.median(steps.total_ms for steps in seen.rounds)
    compute = statistics.median(steps.compute_ms for steps in seen.rounds)
    prompt = statistics.median(steps.prompt_ms for steps in seen.rounds)
    print(
        f"| {shape} | {codec} | {total:.1f} | {links} x {delay_ms:g} + {compute:.1f} "
        f"| {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) "
        f"| {statistics.median(seen.generated_ms):.1f} | {statistics.median(seen.open_ms):.0f} | {prompt:.0f} "
        f"| {statistics.median(seen.first_token_ms):.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
