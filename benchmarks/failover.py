"""How long a text pauses when a hop is lost, and whether it continues with the same tokens.

Two daemons serve each third of the model, each in a host of an emulated network (docs/netlab.md; needs root on
Linux). An answer is generated undisturbed, then again with trouble at the first, middle or last hop after some tokens:

    kill    the hop's program dies (kill -9)
    hang    the hop's program stops (SIGSTOP)
    cut     the hop's host loses the network, without notice to others
    link    only the link from the previous hop is lost
    slow    the hop's program runs only one hundredth of the time
    leave   the hop's program gets SIGTERM

    sudo .venv/bin/python -m benchmarks.failover CHECKPOINT [--context 100 1000] [--trouble kill hang ...] [--delay MS]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.generation import generate
from benchmarks.netlab.peers import LabPeers
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.cache import RemoteCache
from splitnet.hf.causal_lm import attach
from splitnet.session.events import Recovered
from splitnet.swarm.swarm import ModelFacts, Swarm
from splitnet.tools.bench.backends import Clock, gaps_s

TEXT = Path(__file__).parent / "data" / "varied_text.txt"
HOPS = ("first", "middle", "last")
NEW_TOKENS = 40
AFTER = 16
"""The number of tokens before the trouble: enough for the client to know the usual time of a step."""
SLOW_CYCLE_S = 0.1
SLOW_SHARE = 0.01


@dataclass(frozen=True)
class Run:
    """Measurements of one answer with trouble."""

    to_next_ms: float
    """Ms from the trouble until the next token."""
    usual_ms: float
    lost_ms: float
    """Additional ms of all tokens after the trouble, compared with the undisturbed answer."""
    repairs: list[Recovered]
    same: bool

    @property
    def found_ms(self) -> float:
        """Ms from the trouble until the repair began; valid only if one step contains the whole repair."""
        return self.to_next_ms - sum(repair.total_ms for repair in self.repairs) - self.usual_ms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="hub id or folder of a checkpoint")
    parser.add_argument("--context", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--trouble", nargs="+", choices=TROUBLES, default=list(TROUBLES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--codec", default="auto")
    parser.add_argument("--delay", type=float, default=0.0, help="ms one way between any two hosts")
    parser.add_argument("--weights", default="float32", help="weight format of the peers; stored: as in the checkpoint")
    parser.add_argument("--random", action="store_true", help="random prompts, for models without a tokenizer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    codec = arguments.codec
    options = ["--threads", "1"] + ([] if arguments.weights == "stored" else ["--weights", arguments.weights])
    checkpoint = Checkpoint.open(arguments.checkpoint)
    if arguments.random:
        ids = torch.randint(checkpoint.config.vocab_size, (1, max(arguments.context)))
    else:
        ids = checkpoint.tokenizer()(TEXT.read_text(), return_tensors="pt").input_ids
    edges = [round(index * checkpoint.num_blocks / len(HOPS)) for index in range(len(HOPS) + 1)]
    spans = {f"{name}{twin}": (edges[index], edges[index + 1]) for twin in "ab" for index, name in enumerate(HOPS)}
    try:
        with Lab(["client", *spans], delay_ms=arguments.delay) as lab, lab.inside("client"):
            # The DHT gets a node on the client's host, because any of the daemons may die.
            directory = DhtDirectory.start(listen=[f"/ip4/{lab.address('client')}/tcp/0"])
            with LabPeers(lab, arguments.checkpoint, spans, options, join=directory.addresses[0]) as peers:
                print_header()
                for trouble in arguments.trouble:
                    for context in arguments.context:
                        for index, name in enumerate(HOPS):
                            runs = [
                                disturbed(lab, peers, checkpoint, directory, ids[:, :context], trouble, index, codec)
                                for _ in range(arguments.repeats)
                            ]
                            report(trouble, context, name, runs)
            directory.close()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def disturbed(
    lab: Lab,
    peers: LabPeers,
    checkpoint: Checkpoint,
    directory: DhtDirectory,
    prompt: torch.Tensor,
    trouble: str,
    index: int,
    codec: str,
) -> Run:
    """Generates an undisturbed answer and one with trouble at the hop `index`; at the end the trouble is undone."""
    began: list[float] = []
    with Swarm(ModelFacts.of(checkpoint), directory.addresses) as swarm:
        model = attach(checkpoint, swarm, codec=codec)
        undisturbed = Clock()
        expected = generate(model, prompt, NEW_TOKENS, undisturbed)
        with model.session() as cache, ending() as at_end:

            def happen(tokens: int, cache: RemoteCache = cache) -> None:
                if tokens != AFTER:
                    return
                assert cache.session is not None
                hosts = ["client", *(peers.host_of(hop.planned.record) for hop in cache.session.hops)]
                began.append(time.perf_counter())
                at_end.append(TROUBLES[trouble](lab, peers, hosts[index + 1], hosts[index]))

            clock = Clock(happen)
            got = generate(model, prompt, NEW_TOKENS, clock)
            assert cache.session is not None
            repairs = list(cache.session.recoveries)
    usual = 1000 * statistics.median(gaps_s(undisturbed.times))
    after = [late for late in clock.times if late > began[0]]
    return Run(
        to_next_ms=(after[0] - began[0]) * 1000,
        usual_ms=usual,
        lost_ms=(after[-1] - began[0]) * 1000 - usual * len(after),
        repairs=repairs,
        same=torch.equal(got, expected),
    )


@contextmanager
def ending() -> Iterator[list[Callable[[], None]]]:
    """Yields a list for actions, and runs them at the end."""
    actions: list[Callable[[], None]] = []
    try:
        yield actions
    finally:
        for action in actions:
            action()


def kill(lab: Lab, peers: LabPeers, host: str, before: str) -> Callable[[], None]:
    peers.kill(host)
    return lambda: peers.start(host)


def hang(lab: Lab, peers: LabPeers, host: str, before: str) -> Callable[[], None]:
    peers.freeze(host)
    return lambda: peers.thaw(host)


def cut(lab: Lab, peers: LabPeers, host: str, before: str) -> Callable[[], None]:
    lab.down(host)
    return lambda: lab.up(host)


def link(lab: Lab, peers: LabPeers, host: str, before: str) -> Callable[[], None]:
    lab.cut(before, host)
    return lab.heal


def leave(lab: Lab, peers: LabPeers, host: str, before: str) -> Callable[[], None]:
    leaving = threading.Thread(target=peers.stop, args=(host,))
    leaving.start()

    def end() -> None:
        leaving.join()
        peers.start(host)

    return end


def slow(lab: Lab, peers: LabPeers, host: str, before: str) -> Callable[[], None]:
    ends = threading.Event()

    def turns() -> None:
        while not ends.is_set():
            peers.freeze(host)
            ends.wait(SLOW_CYCLE_S * (1 - SLOW_SHARE))
            peers.thaw(host)
            time.sleep(SLOW_CYCLE_S * SLOW_SHARE)

    thread = threading.Thread(target=turns)
    thread.start()

    def end() -> None:
        ends.set()
        thread.join()

    return end


TROUBLES: dict[str, Callable[[Lab, LabPeers, str, str], Callable[[], None]]] = {
    "kill": kill,
    "hang": hang,
    "cut": cut,
    "link": link,
    "slow": slow,
    "leave": leave,
}


def print_header() -> None:
    columns = ["trouble", "context", "hop", "ms to the next token, median (min-max)", "found", "planned and opened"]
    columns += ["replayed", "ms lost until the end", "same tokens"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)


def report(trouble: str, context: int, name: str, runs: list[Run]) -> None:
    to_next = [run.to_next_ms for run in runs]
    opened = statistics.median(sum(repair.opened_ms for repair in run.repairs) for run in runs)
    replayed = statistics.median(sum(repair.total_ms - repair.opened_ms for repair in run.repairs) for run in runs)
    found = statistics.median(run.found_ms for run in runs)
    same = sum(run.same for run in runs)
    print(
        f"| {trouble} | {context} | {name} | {statistics.median(to_next):.0f} ({min(to_next):.0f}-{max(to_next):.0f}) "
        f"| {f'{found:.0f}' if trouble not in ('slow', 'leave') else '-'} | {opened:.0f} | {replayed:.0f} "
        f"| {statistics.median(run.lost_ms for run in runs):.0f} | {same} of {len(runs)} |",
        flush=True,
    )
    if same < len(runs) or not all(run.repairs for run in runs):
        for run in runs:
            print(f"  {run}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
