"""A long prompt over long links, against the least that these hops could take.

Three daemons with a third of the blocks each and a client are four hosts of an emulated network (see docs/netlab.md).
The prompt is cut into steps that flow through the hops one after the other. The bound is the first step's way through
all links and hops, and then the remaining steps at the hop that takes longest for them; what a step takes at a hop is
what the daemon measured in the same prefill.

    sudo .venv/bin/python -m benchmarks.long_prefill CHECKPOINT [--tokens 4096] [--delay 20] [--rate 100]
                                                     [--weights float32] [--codec auto] [--sizes 0 128 256 512]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.peers import LabPeers, even_spans
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.codecs import CODECS
from splitnet.wire.messages import Chunk, Timing

PEERS = ("first", "middle", "last")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--delay", type=float, default=20.0, help="ms one way between any two hosts")
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s of every host's link, 0: no limit")
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0], help="of steps; 0: as the client chooses")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    spans = even_spans(checkpoint.num_blocks, PEERS)
    options = ("--threads", "1", "--weights", arguments.weights)
    try:
        with (
            Lab(["client", *PEERS], delay_ms=arguments.delay, rate_mbit=arguments.rate) as lab,
            LabPeers(lab, arguments.checkpoint, spans, options) as peers,
            lab.inside("client"),
            Swarm(ModelFacts.of(checkpoint), list(peers.addresses.values())) as swarm,
        ):
            measure(swarm, arguments)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(swarm: Swarm, arguments: argparse.Namespace) -> None:
    """Sends the prompt with each size of steps in turns."""
    hidden = torch.randn(arguments.tokens, swarm.facts.hidden_size)
    seen: dict[int, list[tuple[int, str, float, float]]] = {size: [] for size in arguments.sizes}
    for index in range(arguments.rounds + 1):
        for size in arguments.sizes:
            result = prefill(swarm, hidden, size, arguments)
            if index:  # the first warms up
                seen[size].append(result)
    print("| size of steps | codecs | s to the output | least, s | times the least (range) | tokens/s |")
    print("|---|---|---|---|---|---|")
    for size, rounds in seen.items():
        ratios = [took / least for _, _, took, least in rounds]
        took, least = (statistics.median(values) for values in zip(*[r[2:] for r in rounds], strict=True))
        sizes = ", ".join(sorted({str(chosen) for chosen, *_ in rounds}))
        print(
            f"| {size or f'auto: {sizes}'} | {rounds[-1][1]} | {took:.2f} | {least:.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {len(hidden) / took:.0f} |",
            flush=True,
        )


def prefill(
    swarm: Swarm, hidden: torch.Tensor, size: int, arguments: argparse.Namespace
) -> tuple[int, str, float, float]:
    """Size of the steps, codecs of the links, seconds until the output is there, and the least that they could be."""
    session = Session(swarm, ConnectionOptions(codec=arguments.codec), reservation=len(hidden))
    chosen: Any = mock.patch.object(Session, "step_positions", lambda *_: size) if size else nullcontext()
    try:
        session.open(len(hidden))
        with chosen:
            began = time.perf_counter()
            sent = session.begin(hidden, [Chunk(1, 0, len(hidden), 1)])
            session.finish(sent)
            took = time.perf_counter() - began
        timings = [request.result.timings for request in sent.requests if request.result is not None]
        codecs = [session.state.first_codec.name, *(hop.codec.name for hop in session.hops)]
        sizes = [request.message.positions for request in sent.requests]
        least = bound_s(sizes[0], timings, codecs[:-1], swarm.facts.hidden_size, arguments)
        return sizes[0], ", ".join(codecs), took, least
    finally:
        session.close()


def bound_s(
    first: int, timings: Sequence[Sequence[Timing]], codecs: Sequence[str], hidden: int, arguments: argparse.Namespace
) -> float:
    """The first step through all links and hops, and the others at the hop that takes longest for them, in seconds."""
    bytes_per_s = arguments.rate * 1e6 / 8
    links_s = (len(codecs) + 1) * arguments.delay / 1000
    if bytes_per_s:
        links_s += sum(first * CODECS[name].bytes_per_position(hidden) for name in codecs) / bytes_per_s
    first_s = sum(timing.compute_us for timing in timings[0]) / 1e6
    others_s = max(sum(step[hop].compute_us for step in timings[1:]) for hop in range(len(timings[0]))) / 1e6
    return links_s + first_s + others_s


if __name__ == "__main__":
    sys.exit(main())
