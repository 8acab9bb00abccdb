"""The effect of one client's load on another client's tokens: one daemon of one thread, clients in separate processes.

The measured client has one session, which decodes one token after the other. It runs in turns alone, next to an equal
client, next to a client with 64 sessions, next to one with long prompts, and next to one that trains. The last column
is the time per token as a multiple of the time next to an equal client.

    python -m benchmarks.fairness CHECKPOINT [--seconds 10] [--think 0 10] [--rounds 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import EXACT, LocalSwarm
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.wire.endpoints import Endpoint
from splitnet.wire.messages import Opened
from tests.attacks import fairness

LOADS: dict[str, tuple[Callable[..., int], dict[str, Any]] | None] = {
    "nobody": None,
    "one session": (fairness.decodes, {"sessions": 1, "reservation": 4096}),
    "64 sessions": (fairness.decodes, {"sessions": 64, "reservation": 1024}),
    "8 prompts of 1,024": (fairness.prefills, {"sessions": 8, "length": 1024}),
    "training, 8 x 512": (fairness.trains, {"lengths": (512,) * 8, "waiting": 2}),
    "passes of one sequence of 4,096": (fairness.trains, {"lengths": (4096,), "waiting": 6, "backward": False}),
}
EQUAL = "one session"
WARM_UP_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--think", type=float, nargs="*", default=[0.0, 10.0], help="ms before the next step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", nargs="*", default=list(LOADS), choices=list(LOADS))
    arguments = parser.parse_args()
    facts = ModelFacts.of(Checkpoint.open(arguments.checkpoint))
    options = (*EXACT, "--kv-memory", "5GiB", "--training-memory", "512MiB")
    with LocalSwarm(arguments.checkpoint, 1, options) as peers:
        with Swarm(facts, [peers.wait()]) as swarm:
            [record] = swarm.peers(fresh=True)
        endpoint = Endpoint(record.address, record.key)
        print(f"{facts.name}; ms of a pass per block: {[round(value, 2) for value in record.block_ms]}")
        print("| think, ms | beside | ms per token: mean | median | 95 % | most | other's work per s | times equal |")
        print("|---|---|---|---|---|---|---|---|")
        for think_ms in arguments.think:
            seen: dict[str, list[float]] = {load: [] for load in arguments.loads}
            others = dict.fromkeys(arguments.loads, 0.0)
            for _ in range(arguments.rounds):
                for load in arguments.loads:
                    took, other = measure(endpoint, facts, load, arguments.seconds, think_ms / 1000)
                    seen[load] += took
                    others[load] += other / arguments.rounds
            for load, took in seen.items():
                mean = statistics.fmean(took)
                equal = f"{mean / statistics.fmean(seen[EQUAL]):.2f}" if EQUAL in seen else "-"
                cells = (mean, statistics.median(took), statistics.quantiles((*took, *took), n=20)[-1], max(took))
                texts = " | ".join(f"{cell:.1f}" for cell in cells)
                print(f"| {think_ms:.0f} | {load} | {texts} | {others[load]:.1f} | {equal} |", flush=True)


def measure(
    endpoint: Endpoint, facts: ModelFacts, load: str, seconds: float, think_s: float
) -> tuple[list[float], float]:
    """Ms of each token of a client next to a load, including thinking, and the load's work per second."""
    with beside(endpoint, facts, load, seconds + WARM_UP_S) as done, fairness.Client(endpoint, facts) as client:
        session, answer = client.open(4096)
        assert isinstance(answer, Opened), answer
        began = time.monotonic()
        took: list[float] = []
        while (now := time.monotonic()) - began < seconds + WARM_UP_S:
            ms = client.decode(session, steps=1)
            time.sleep(think_s)
            if now - began >= WARM_UP_S:
                took += [ms[0] + think_s * 1000]
    return took, (done.value if done is not None else 0) / (seconds + WARM_UP_S)


@contextmanager
def beside(endpoint: Endpoint, facts: ModelFacts, load: str, seconds: float) -> Iterator[Any]:
    """Runs a load in another process. Yields its amount of work, which is set when the load has ended."""
    chosen = LOADS[load]
    if chosen is None:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    began, done = context.Event(), context.Value("l", 0)
    process = context.Process(target=_run, args=(load, endpoint, facts, seconds, began, done))
    process.start()
    try:
        assert began.wait(60), "the load did not begin"
        yield done
        process.join(60)
    finally:
        process.kill()
        process.join()


def _run(load: str, endpoint: Endpoint, facts: ModelFacts, seconds: float, began: Event, done: Any) -> None:
    chosen = LOADS[load]
    assert chosen is not None
    attack, options = chosen
    done.value = attack(endpoint, facts, seconds=seconds, began=began.set, **options)


if __name__ == "__main__":
    main()
