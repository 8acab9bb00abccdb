"""How long text stands still when a hop is killed, and whether it goes on with the same tokens.

Two daemons serve each third of the model. One answer is generated undisturbed, then again with kill -9 of the first,
middle or last hop after some tokens; the killed daemon is started again before the next run.

    python benchmarks/failover.py CHECKPOINT [--context 100 1000] [--repeats 5] [--codec int8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from transformers.generation.streamers import BaseStreamer

from splitnet.cli.local_swarm import LocalSwarm
from splitnet.client.cache import RemoteCache
from splitnet.client.causal_lm import RemoteCausalLM, attach
from splitnet.client.recovery import Recovered
from splitnet.client.swarm import ModelFacts, Swarm
from splitnet.model.checkpoint import Checkpoint
from splitnet.net.directory import Directory

TEXT = Path(__file__).parent / "data" / "varied_text.txt"
NEW_TOKENS = 32
KILL_AFTER = 12


class Clock(BaseStreamer):
    """When each token came; does something after `KILL_AFTER` tokens."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._action = action

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == KILL_AFTER + 1:  # the prompt comes first
            self._action()

    def end(self) -> None:
        pass

    def gap_ms(self) -> float:
        """How much longer the token after the kill took than the others."""
        steps = [(late - early) * 1000 for early, late in zip(self.times[1:], self.times[2:], strict=False)]
        return steps[KILL_AFTER - 1] - statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--context", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--codec", default="int8")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    ids = checkpoint.tokenizer()(TEXT.read_text(), return_tensors="pt").input_ids
    print("| context | killed hop | pause ms, median (min-max) | of it plan and open | replay | same tokens |")
    print("|---|---|---|---|---|---|")
    with ExitStack() as stack:
        # The DHT has a node of its own here, since any of the daemons may be killed.
        directory = stack.enter_context(Directory.start(listen=["/ip4/127.0.0.1/tcp/0"]))
        address = directory.addresses[0]
        twins = [stack.enter_context(LocalSwarm(arguments.checkpoint, 3, join=address)) for _ in range(2)]
        for swarm in twins:
            swarm.wait()
        for context in arguments.context:
            prompt = ids[:, :context]
            for index, name in enumerate(("first", "middle", "last")):
                runs: list[tuple[float, Recovered]] = []
                same = 0
                for _ in range(arguments.repeats):
                    with Swarm(ModelFacts.of(checkpoint), [address]) as swarm:
                        model = attach(checkpoint, swarm, codec=arguments.codec)
                        expected, _ = generate(model, prompt, lambda: None)
                        with model.session() as cache:

                            def kill(index: int = index, cache: RemoteCache = cache) -> None:
                                assert cache.session is not None
                                kill_listener(cache.session.hops[index].endpoint.address, twins)

                            got, clock = generate(model, prompt, kill)
                            assert cache.session is not None
                            runs.append((clock.gap_ms(), cache.session.recoveries[0]))
                            same += torch.equal(got, expected)
                    for dead in twins:
                        dead.restart_dead()
                report(context, name, runs, same)


def generate(model: RemoteCausalLM, prompt: torch.Tensor, action: Callable[[], None]) -> tuple[torch.Tensor, Clock]:
    clock = Clock(action)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        streamer=clock,
    )
    return output, clock


def kill_listener(address: str, swarms: list[LocalSwarm]) -> None:
    """kill -9 of the daemon that listens on `address`."""
    port = int(address.rpartition(":")[2])
    for daemon in (process for swarm in swarms for process in swarm.processes):
        if daemon.poll() is None and any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in psutil.Process(daemon.pid).net_connections("tcp")
        ):
            daemon.kill()
            daemon.wait()
            return
    raise RuntimeError(f"no daemon listens on {address}")


def report(context: int, name: str, runs: list[tuple[float, Recovered]], same: int) -> None:
    gaps = [gap for gap, _ in runs]
    opened = statistics.median(recovered.opened_ms for _, recovered in runs)
    replay = statistics.median(recovered.total_ms - recovered.opened_ms for _, recovered in runs)
    print(
        f"| {context} | {name} | {statistics.median(gaps):.0f} ({min(gaps):.0f}-{max(gaps):.0f}) "
        f"| {opened:.0f} | {replay:.0f} | {same} of {len(runs)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
