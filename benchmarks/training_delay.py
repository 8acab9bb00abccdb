"""How long a token waits at the peers for another client's training.

A client decodes through three daemons of one thread each, in turns: alone, and while another client trains LoRA through
them. For every token each hop reports its wait for the device. docs/tuning.md promises that this wait is at most the
time of one block over one micro-batch, forward or backward; the benchmark measures this time, too.

    python -m benchmarks.training_delay CHECKPOINT [--tokens 200] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks import tuning
from splitnet.blocks.passes import SpanPasses
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import EXACT, LocalSwarm
from splitnet.hf.causal_lm import attach
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.messages import Chunk

MICRO_BATCH = tuning.ROWS * tuning.COLUMNS // (2 * tuning.PEERS) // tuning.COLUMNS * tuning.COLUMNS
"""Positions of one micro-batch of the concurrent training."""


@dataclass
class Seen:
    """Times of all tokens, in ms."""

    waits: list[float] = field(default_factory=list)
    """At each hop."""
    totals: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("--tokens", type=int, default=200, help="decode tokens per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", metavar="ADDR", help="only train through this address, until stopped")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.train:
        train(arguments.checkpoint, arguments.train)
        return
    facts = ModelFacts.of(Checkpoint.open(arguments.checkpoint))
    alone, beside = Seen(), Seen()
    with LocalSwarm(arguments.checkpoint, tuning.PEERS, EXACT) as peers:
        address = peers.wait()
        with Swarm(facts, [address]) as swarm:
            session = Session(swarm, ConnectionOptions(), reservation=4096)
            decode(session, facts.hidden_size, 30, Seen())
            for _ in range(arguments.rounds):
                decode(session, facts.hidden_size, arguments.tokens, alone)
                with training(arguments.checkpoint, address):
                    decode(session, facts.hidden_size, arguments.tokens, beside)
            session.close()
    print("| | wait at a hop, ms: median | 95 % | maximum | time per token, ms: median | 95 % | maximum |")
    print("|---|---|---|---|---|---|---|")
    for name, seen in (("alone", alone), ("while another client trains", beside)):
        cells = (*spread(seen.waits), *spread(seen.totals))
        print(f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    forward, backward = block_ms(arguments.checkpoint)
    print(
        f"\nOne block over {MICRO_BATCH} positions on its own core: {forward:.1f} ms forward, {backward:.1f} backward."
    )


def decode(session: Session, hidden: int, tokens: int, seen: Seen) -> None:
    """Decodes `tokens` tokens after an empty context."""
    given = torch.randn(1, hidden)
    for position in range(tokens):
        began = time.perf_counter()
        session.step(given, [Chunk(1, position, 1, 1)])
        seen.totals.append((time.perf_counter() - began) * 1000)
        seen.waits += [timing.wait_us / 1000 for timing in session.timings]


def spread(values: list[float]) -> tuple[float, float, float]:
    """The median, the 95th percentile and the maximum."""
    return statistics.median(values), statistics.quantiles(values, n=20)[-1], max(values)


@contextmanager
def training(checkpoint: str, address: str) -> Iterator[None]:
    """Trains in another process; yields after the first step."""
    command = [sys.executable, "-m", "benchmarks.training_delay", checkpoint, "--train", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline(), "the training has ended"
            yield
            assert process.poll() is None, "the training has ended"
        finally:
            process.kill()


def train(folder: str, address: str) -> None:
    """Trains LoRA until the process is stopped; prints a line per step."""
    checkpoint = Checkpoint.open(folder)
    model = attach(checkpoint, Swarm(ModelFacts.of(checkpoint), [address]))
    adapted = tuning.adapted(model, "LoRA")
    batches = tuning.batches_of(folder)
    while True:
        (loss,) = tuning.curve(adapted, batches, 1)
        print(loss, flush=True)


def block_ms(folder: str) -> tuple[float, float]:
    """Ms of a block over a micro-batch, forward and backward."""
    span = Span.load(Checkpoint.open(folder), 0, 1)
    passes = SpanPasses(span)
    hidden = torch.randn(MICRO_BATCH, span.hidden_size)
    lengths = [tuning.COLUMNS] * (MICRO_BATCH // tuning.COLUMNS)
    forward, backward = [], []
    for _ in range(20):
        began = time.perf_counter()
        passes.forward(hidden, lengths, None, 0, 1)
        ended = time.perf_counter()
        passes.backward(hidden, lengths, hidden, None, 0, 1)
        forward.append((ended - began) * 1000)
        backward.append((time.perf_counter() - ended) * 1000)
    # The backward pass first computes the block again, and other work may run between this and the gradient.
    return statistics.median(forward), statistics.median(backward) - statistics.median(forward)


if __name__ == "__main__":
    main()
