"""The time of a long prompt over links with long delays, compared with a lower bound for these hops.

Three daemons with a third of the blocks each and a client are four hosts of an emulated network (see docs/netlab.md).
The prompt is cut into steps that flow through the hops one after the other. The bound is the time of the first step
through all links and hops, plus the time of the remaining steps at the slowest hop. The time of a step at a hop is the
one that the daemon measured in the same prefill.

    sudo .venv/bin/python -m benchmarks.long_prefill CHECKPOINT [--tokens 4096] [--delay 20] [--rate 100]
                                                     [--weights float32] [--codec auto] [--sizes 0 128 256 512]
    .venv/bin/python -m benchmarks.long_prefill FILE.gguf --here 3 [--tokens 8192] [--decode 16] [--llama FOLDER]

With `--here PEERS`, as many daemons of one thread run on this machine, without a lab. With `--llama`, the same prompt
also runs through llama.cpp, whose programs `llama-bench` and `ggml-rpc-server` are in FOLDER: in one thread if PEERS is
1, otherwise through PEERS RPC servers of one thread; with flash attention and float16 keys and values. If a GGUF file
allows too few positions, a copy with a higher limit in its header is used: the text of this copy would be bad, but its
times are the same. CPU seconds are those of all daemons or of llama.cpp; other programs on the machine change CPU
seconds less than the elapsed time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from gguf import GGUFReader

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.peers import LabPeers, even_spans
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import LocalSwarm
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
    parser.add_argument("--sizes", type=int, nargs="+", default=[0], help="positions of a step; 0: the client chooses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", type=int, metavar="PEERS", help="daemons on this machine instead of a lab")
    parser.add_argument("--decode", type=int, default=0, metavar="STEPS", help="after each prompt, one position each")
    parser.add_argument("--llama", metavar="FOLDER", help="folder of llama.cpp; with --here and a GGUF file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = ("--threads", "1", "--weights", arguments.weights)
    arguments.processes = []
    if arguments.here:
        arguments.rate = arguments.delay = 0.0
        with tempfile.TemporaryDirectory() as folder:
            path = with_room(arguments.checkpoint, arguments.tokens + arguments.decode + 1, Path(folder))
            with (
                LocalSwarm(path, arguments.here, options) as peers,
                Swarm(ModelFacts.of(Checkpoint.open(path)), [peers.wait()]) as swarm,
            ):
                arguments.processes = [psutil.Process(process.pid) for process in peers.processes]
                measure(swarm, arguments)
            if arguments.llama:
                measure_llama(path, arguments)
        return 0
    checkpoint = Checkpoint.open(arguments.checkpoint)
    spans = even_spans(checkpoint.num_blocks, PEERS)
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


def with_room(path: str, positions: int, folder: Path) -> str:
    """A checkpoint, or a copy of a GGUF file that allows this many positions."""
    if not path.endswith(".gguf") or Checkpoint.open(path).config.max_position_embeddings >= positions:
        return path
    copy = shutil.copy(path, folder)
    reader = GGUFReader(copy, "r+")
    field = next(each for name, each in reader.fields.items() if name.endswith(".context_length"))
    field.parts[field.data[0]][0] = positions
    reader.data.flush()
    return str(copy)


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def measure_llama(path: str, arguments: argparse.Namespace) -> None:
    """Measures the prompt, and decode steps after it, with llama-bench."""
    command = [f"{arguments.llama}/llama-bench", "-m", path, "-t", "1", "-fa", "1"]
    command += ["-r", "1", "-o", "json", "--no-warmup"]
    with ExitStack() as stack:
        addresses: list[str] = []
        servers: list[psutil.Process] = []
        for _ in range(arguments.here if arguments.here > 1 else 0):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            server = [f"{arguments.llama}/ggml-rpc-server", "-p", str(port), "-t", "1"]
            process = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            servers.append(psutil.Process(process.pid))
            stack.callback(process.wait)
            stack.callback(process.terminate)
            addresses.append(f"127.0.0.1:{port}")
        if addresses:
            time.sleep(1)  # RPC servers do not report that they listen
            command += ["--rpc", ",".join(addresses), "-ngl", "99"]
        runs = (
            ["-p", str(arguments.tokens), "-n", "0"],
            ["-p", "0", "-n", str(arguments.decode), "-d", str(arguments.tokens)],
        )
        own = psutil.Process()
        for run in runs[: 2 if arguments.decode else 1]:
            began = cpu_s([own, *servers])
            found = json.loads(subprocess.run([*command, *run], check=True, capture_output=True).stdout)[0]
            computed = cpu_s([own, *servers]) - began
            took = f"{found['avg_ns'] / 1e9:.2f} s, {found['avg_ts']:.1f} tokens/s, {computed:.1f} CPU s"
            print(f"llama.cpp {found['build_commit']} {' '.join(run)}: {took}", flush=True)


def measure(swarm: Swarm, arguments: argparse.Namespace) -> None:
    """Sends the prompt with each size of steps in turns."""
    seen: dict[int, list[tuple[int, str, float, float, float, float]]] = {size: [] for size in arguments.sizes}
    prefill(swarm, 1024, 0, arguments)  # a prompt to warm up
    for _ in range(arguments.rounds):
        for size in arguments.sizes:
            seen[size].append(prefill(swarm, arguments.tokens, size, arguments))
    columns = (
        "size of steps",
        "codecs",
        "s to the output",
        "least, s",
        "times the lower bound (range)",
        "tokens/s",
        "ms a step",
        "CPU s of the peers",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for size, rounds in seen.items():
        ratios = [took / least for _, _, took, least, *_ in rounds]
        took, least, step, cpu = (statistics.median(values) for values in zip(*[r[2:] for r in rounds], strict=True))
        sizes = ", ".join(sorted({str(chosen) for chosen, *_ in rounds}))
        print(
            f"| {size or f'auto: {sizes}'} | {rounds[-1][1]} | {took:.2f} | {least:.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {arguments.tokens / took:.0f} "
            f"| {step * 1000:.1f} | {cpu:.1f} |",
            flush=True,
        )


def prefill(
    swarm: Swarm, positions: int, size: int, arguments: argparse.Namespace
) -> tuple[int, str, float, float, float, float]:
    """Size of the steps, codecs of the links, seconds until the output arrives, the lower bound, the median seconds of
    decode steps, and the CPU seconds of the daemons for the prompt.
    """
    hidden = torch.randn(positions, swarm.facts.hidden_size)  # new values each time, so that no stored prefix matches
    session = Session(swarm, ConnectionOptions(codec=arguments.codec), reservation=len(hidden) + arguments.decode)
    chosen: Any = mock.patch.object(Session, "step_positions", lambda *_: size) if size else nullcontext()
    try:
        session.open(len(hidden))
        with chosen:
            before, began = cpu_s(arguments.processes), time.perf_counter()
            sent = session.begin(hidden, [Chunk(1, 0, len(hidden), 1)])
            session.finish(sent)
            took, computed = time.perf_counter() - began, cpu_s(arguments.processes) - before
        timings = [request.result.timings for request in sent.requests if request.result is not None]
        codecs = [session.state.first_codec.name, *(hop.codec.name for hop in session.hops)]
        sizes = [request.message.positions for request in sent.requests]
        least = bound_s(sizes[0], timings, codecs[:-1], swarm.facts.hidden_size, arguments)
        steps = [0.0] if not arguments.decode else []
        for position in range(len(hidden), len(hidden) + arguments.decode):
            began = time.perf_counter()
            session.step(hidden[-1:], [Chunk(1, position, 1, 1)])
            steps.append(time.perf_counter() - began)
        return sizes[0], ", ".join(codecs), took, least, statistics.median(steps), computed
    finally:
        session.close()


def bound_s(
    first: int, timings: Sequence[Sequence[Timing]], codecs: Sequence[str], hidden: int, arguments: argparse.Namespace
) -> float:
    """Seconds of the first step through all links and hops, plus the other steps at the slowest hop."""
    bytes_per_s = arguments.rate * 1e6 / 8
    links_s = (len(codecs) + 1) * arguments.delay / 1000
    if bytes_per_s:
        links_s += sum(first * CODECS[name].bytes_per_position(hidden) for name in codecs) / bytes_per_s
    first_s = sum(timing.compute_us for timing in timings[0]) / 1e6
    others_s = max(sum(step[hop].compute_us for step in timings[1:]) for hop in range(len(timings[0]))) / 1e6
    return links_s + first_s + others_s


if __name__ == "__main__":
    sys.exit(main())
