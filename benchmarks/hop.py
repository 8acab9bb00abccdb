"""What one hop adds to a decode token beyond the compute of its blocks, on loopback with CURVE on.

Two routes through the same blocks take turns: one peer with all of them, and several peers with a part each. Each peer
is a process of its own. Of every token the client knows the time that it took and the time that the devices spent on it
(steps and results carry it); the rest is what the hops and the client add: codecs, messages, sockets, encryption,
threads and dispatch. The difference between the routes, per additional peer, is what one hop adds.

    python benchmarks/hop.py CHECKPOINT [--hops 3] [--tokens 200] [--rounds 5] [--codec auto]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch

from splitnet.cli.local_swarm import EXACT, LocalSwarm
from splitnet.client.session import Session
from splitnet.client.swarm import ModelFacts, Swarm
from splitnet.model.checkpoint import Checkpoint
from splitnet.net import messages
from splitnet.net.codecs import codec_by_name
from splitnet.net.messages import Part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--hops", type=int, default=3, help="peers of the longer route")
    parser.add_argument("--tokens", type=int, default=200, help="decode tokens per round and route")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codec", default="auto", help="of every link; auto chooses by cost, as clients do")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = ModelFacts.of(Checkpoint.open(arguments.checkpoint))
    hidden = torch.randn(1, facts.hidden_size)
    checkpoint, hops = arguments.checkpoint, arguments.hops
    with LocalSwarm(checkpoint, 1, EXACT) as short, LocalSwarm(checkpoint, hops, EXACT) as long:
        addresses = {1: short.wait(), arguments.hops: long.wait()}
        with Swarm(facts, [addresses[1]]) as one, Swarm(facts, [addresses[arguments.hops]]) as many:
            routes = {
                1: Session(one, budget=4096, codec=arguments.codec),
                arguments.hops: Session(many, budget=4096, codec=arguments.codec),
            }
            for session in routes.values():
                decode(session, hidden, 50)
            rounds: dict[int, list[Token]] = {hops: [] for hops in routes}
            for _ in range(arguments.rounds):
                for hops, session in routes.items():
                    rounds[hops].append(decode(session, hidden, arguments.tokens))
            report(rounds)
            used = Counter(link.codec for link in routes[arguments.hops].links())
            print(f"Codecs of the longer route's links: {', '.join(f'{name} ({n})' for name, n in used.items())}.\n")
            for name in used:
                report_parts(name, facts.hidden_size)


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
        session.step(hidden, [Part(1, position, 1, 1)])
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
    print("| route | ms per token | of it on the devices | rest |")
    print("|---|---|---|---|")
    for hops, tokens in rounds.items():
        medians = [statistics.median(getattr(token, name) for token in tokens) for name in Token.__dataclass_fields__]
        print(f"| {hops} peer(s) | {' | '.join(f'{value:.2f}' for value in medians)} |")
    print()
    print(
        f"One hop adds {statistics.median(added):.2f} ms (of {len(added)} rounds {min(added):.2f} to {max(added):.2f})."
    )


def report_parts(codec: str, hidden: int) -> None:
    print(f"Of which, measured alone in one thread (codec {codec}, hidden {hidden}):")
    print()
    print("| part | us |")
    print("|---|---|")
    for name, microseconds in parts(codec, hidden).items():
        print(f"| {name} | {microseconds:.0f} |")
    print()


def parts(codec_name: str, hidden: int) -> dict[str, float]:
    """Median microseconds of what a hop does in Python for one decode token."""
    codec = codec_by_name(codec_name)
    activation = torch.randn(1, hidden)
    payload = codec.encode(activation)
    step = messages.Step(bytes(16), 1, 1000, (Part(1, 1000, 1, 1),), None, 0, codec.code, payload)
    frames = messages.encode(step)
    return {
        "decode the activation": median_us(lambda: codec.decode(payload, 1, hidden)),
        "encode the activation": median_us(lambda: codec.encode(activation)),
        "read the message": median_us(lambda: messages.decode(frames)),
        "write the message": median_us(lambda: messages.encode(step)),
    }


def median_us(action: object, repeats: int = 2000) -> float:
    assert callable(action)
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
