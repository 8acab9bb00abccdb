"""The cost of a decode token beyond reading weights, by part: its blocks, the hops, the client and its head.

Two routes through the same blocks run in turns, on loopback with CURVE on: one peer with all blocks, and several peers
with a part each. Each peer is a separate process. For every token the client knows the total time and the time on the
devices, which steps and results carry. The rest is the time that the hops and the client add: codecs, messages,
sockets, encryption, threads and dispatch. The difference between the routes, per additional peer, is the cost of one
hop. Then whole answers are generated through the longer route; the time outside of their steps is the client's.

    python -m benchmarks.hop CHECKPOINT [--weights int8] [--hops 3] [--tokens 200] [--rounds 5] [--codec auto]
    python -m benchmarks.hop --random 0.5b [--weights int8] ...

Every token sends the same activations through the blocks. "Reading" is the time in which one thread reads as many bytes
as the weights of the blocks and the head have (a sum over a long vector, the fastest of several before and after the
rounds).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.experts import bandwidth
from benchmarks.random_shapes import SHAPES, random_model
from splitnet.blocks.client_part import ClientPart
from splitnet.blocks.span import Span
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import LocalSwarm
from splitnet.hf.causal_lm import RemoteCausalLM, attach
from splitnet.quant.linear import QuantizedLinear
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.bench.backends import Clock
from splitnet.wire.messages import Chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="hub id or folder of a checkpoint")
    parser.add_argument("--random", choices=SHAPES, help="random weights in the shape of a model, instead")
    parser.add_argument("--hops", type=int, default=3, help="peers of the longer route")
    parser.add_argument("--tokens", type=int, default=200, help="decode tokens per round and route")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", default="float32", help="weight format of peers and head; stored: as in the file")
    parser.add_argument("--threads", type=int, default=1, help="threads of each daemon; the client has one")
    parser.add_argument("--codec", default="auto", help="codec of every link; auto: by cost, as clients choose")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (arguments.random is None):
        parser.error("give a checkpoint or --random")
    with ExitStack() as stack:
        if arguments.random is not None:
            arguments.checkpoint = str(stack.enter_context(random_model(SHAPES[arguments.random])))
        run(arguments, stack)


def run(arguments: argparse.Namespace, stack: ExitStack) -> None:
    torch.set_num_threads(1)
    checkpoint, hops = arguments.checkpoint, arguments.hops
    facts = ModelFacts.of(Checkpoint.open(checkpoint))
    hidden = torch.randn(1, facts.hidden_size)
    held = None if arguments.weights == "stored" else arguments.weights
    options = ("--threads", str(arguments.threads), *(["--weights", held] if held else []))
    before = bandwidth(1)
    swarms: dict[int, Swarm] = {}
    for count in (1, hops):
        daemons = stack.enter_context(LocalSwarm(checkpoint, count, options))
        swarms[count] = stack.enter_context(Swarm(facts, [daemons.wait()]))
    routes = {
        count: Session(swarm, ConnectionOptions(codec=arguments.codec), reservation=4096)
        for count, swarm in swarms.items()
    }
    for session in routes.values():
        decode(session, hidden, 50)
    rounds: dict[int, list[Token]] = {count: [] for count in routes}
    for _ in range(arguments.rounds):
        for count, session in routes.items():
            rounds[count].append(decode(session, hidden, arguments.tokens))
    report(rounds)
    used = Counter(link.codec for link in routes[hops].links())
    print(f"Codecs of the longer route's links: {', '.join(f'{name} ({n})' for name, n in used.items())}.\n")
    model = attach(Checkpoint.open(checkpoint), swarms[hops], codec=arguments.codec, local_weights=held)
    report_whole(model, arguments.tokens, arguments.rounds)
    report_reading(model, Checkpoint.open(checkpoint), held, max(before, bandwidth(1)))


def report_reading(model: RemoteCausalLM, checkpoint: Checkpoint, weights: str | None, speed: float) -> None:
    """Prints the bytes of blocks and head, and the time to read them at this rate."""
    block = Span.load(checkpoint, 0, 1, weights=weights)
    head: Any = model.get_output_embeddings()
    held = head.held if isinstance(head, QuantizedLinear) else head
    sizes = {
        "blocks": checkpoint.num_blocks * block.weight_bytes,
        "head": sum(tensor.nbytes for tensor in (*held.parameters(), *held.buffers())),
    }
    print(f"\nOne thread reads {speed / 1e9:.1f} GB/s.")
    for name, size in sizes.items():
        print(f"Reading the {name}, {size / 2**20:.0f} MiB: {1000 * size / speed:.2f} ms.")


@dataclass(frozen=True)
class Token:
    """Medians over the tokens of a round, in ms."""

    total_ms: float
    compute_ms: float
    rest_ms: float


def decode(session: Session, hidden: torch.Tensor, tokens: int) -> Token:
    """Decodes `tokens` tokens after an empty context."""
    totals: list[float] = []
    computes: list[float] = []
    for position in range(tokens):
        began = time.perf_counter()
        session.step(hidden, [Chunk(1, position, 1, 1)])
        totals.append((time.perf_counter() - began) * 1000)
        computes.append(session.compute_ms)
    rests = [total - compute for total, compute in zip(totals, computes, strict=True)]
    return Token(statistics.median(totals), statistics.median(computes), statistics.median(rests))


def report(rounds: dict[int, list[Token]]) -> None:
    shorter, longer = sorted(rounds)
    added = [
        (long.rest_ms - short.rest_ms) / (longer - shorter)
        for short, long in zip(rounds[shorter], rounds[longer], strict=True)
    ]
    print("| route | ms per token | on the devices | rest |")
    print("|---|---|---|---|")
    for hops, tokens in rounds.items():
        medians = [statistics.median(getattr(token, name) for token in tokens) for name in Token.__dataclass_fields__]
        print(f"| {hops} peer(s) | {' | '.join(f'{value:.2f}' for value in medians)} |")
    print()
    print(
        f"One hop adds {statistics.median(added):.2f} ms (of {len(added)} rounds {min(added):.2f} to {max(added):.2f})."
    )


def report_whole(model: RemoteCausalLM, tokens: int, rounds: int) -> None:
    """Generates answers, and prints the ms of a token in steps through the hops, in norm and head, and in the rest."""
    timed = [Timed(Session, "begin"), Timed(Session, "finish"), Timed(ClientPart, "logits")]
    prompt = torch.randint(model.config.vocab_size, (1, 8))
    totals: list[float] = []
    for index in range(rounds + 1):
        if index == 1:  # the first answer warms up
            totals.clear()
            for part in timed:
                part.ms.clear()
        clock = Clock()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            eos_token_id=None,
            do_sample=False,
            speculate=None,
            streamer=clock,
        )
        totals += [1000 * (later - earlier) for earlier, later in pairwise(clock.times)]
    total = statistics.median(totals)
    begin, finish, head = (statistics.median(part.ms) for part in timed)
    print("| a whole token, ms | steps through the hops | norm and head | the rest of the client |")
    print("|---|---|---|---|")
    print(f"| {total:.2f} | {begin + finish:.2f} | {head:.2f} | {total - begin - finish - head:.2f} |")


class Timed:
    """Records the duration of each call of a method, in ms."""

    def __init__(self, owner: type, name: str) -> None:
        self.ms: list[float] = []
        call = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                self.ms.append((time.perf_counter() - began) * 1000)

        setattr(owner, name, timed)


if __name__ == "__main__":
    main()
