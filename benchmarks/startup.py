"""Start-up times of a peer, a client and a swarm of both, and a peer's memory besides its blocks; prints Markdown.

    python -m benchmarks.startup [CHECKPOINT] [--blocks 0:10] [--rounds 3]
    python -m benchmarks.startup [CHECKPOINT] --lean PYTHON [--rounds 5]
    sudo python -m benchmarks.startup [CHECKPOINT] --machines 2 60MiB [--rounds 3]

Reports the smallest value of several rounds, because other users of the machine can only increase the values. All times
count from the start of the Python process. The first table shows one process that does the same as `splitnet peer`: the
end of each stage in seconds, and the resident memory at that time, in MiB. Overlapping stages are listed by their ends.
The second table shows the commands themselves: `peer` until it serves, `generate` through three peers until its first
word, and `demo` (three peers and a client, started together) until its first word. The page cache is warm from the
second round on. Linux only.

With `--lean` the benchmark prints only another table: the time of `generate`, through three peers, until its first
word, for each kind of address to join with, and for the Python of an environment without hivemind. The values are
medians of rounds in turns, after a warm-up round.

With `--machines COUNT MEMORY` it prints only the times of `splitnet run --serve --memory MEMORY`, which is started on
one machine of an emulated home network after the other, as soon as the one before waits for other peers: until each one
waits, and from the start of the last one until the first word of each answer. All share the processor of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import psutil

from benchmarks.netlab import NAMED, Lab
from splitnet.blocks.span import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.arguments import resolve_model
from splitnet.cli.demo import ONE_THREAD, LocalSwarm

SPLITNET = [sys.executable, "-m", "splitnet"]
MIB = 2**20

PEER = """
import json, os, sys, time
import psutil
process = psutil.Process()
marks = []

def mark(name):
    if marks and marks[-1][0] == name:
        marks.pop()
    marks.append((name, time.time() - process.create_time(), process.memory_info().rss))

mark("Python")
import torch
mark("import torch")
try:
    from splitnet.import_shims import claim_process, import_models
    claim_process()
    import_models()
except ImportError:
    pass
import transformers.modeling_utils
mark("import transformers' models")
from peers.running_peer import RunningPeer
from peers.peer_options import PeerOptions
from peers.peer_options import SpanWish
mark("import peers")
torch.set_num_threads(1)
start, end = map(int, sys.argv[2].split(":"))
options = PeerOptions(wish=SpanWish((start, end)), listen="tcp://127.0.0.1:0", device="cpu")
stages = []

def progress(stage, done, total):
    if stages and stages[-1] != stage:
        mark(stages[-1])
    stages.append(stage)

peer = RunningPeer.start(sys.argv[1], options, progress=progress)
mark(stages[-1])
print(json.dumps(marks), flush=True)
peer.close()
"""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--blocks", default="0:10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lean", metavar="PYTHON", help="the Python of an environment without hivemind")
    parser.add_argument("--machines", nargs=2, metavar=("COUNT", "MEMORY"))
    options = parser.parse_args()
    checkpoint = resolve_model(options.checkpoint)
    if options.machines:
        count, size = options.machines
        rounds = [first_words_of_run(checkpoint, int(count), size) for _ in range(options.rounds)]
        print("| `run` on machine | waits after, s (median; all) | first word after, s |\n|---|---|---|")
        for number, times in enumerate(zip(*rounds, strict=True), 1):
            waits, words = (
                "" if None in each else f"{median(each):.1f}; {', '.join(f'{one:.1f}' for one in sorted(each))}"
                for each in zip(*times, strict=True)
            )
            print(f"| {number} | {waits} | {words} |")
        return
    if options.lean:
        print("| `generate`, first word | median, s | all, s |\n|---|---:|---|")
        for name, times in ways_to_join(checkpoint, options.lean, options.rounds).items():
            print(f"| {name} | {median(times):.2f} | {', '.join(f'{one:.2f}' for one in sorted(times))} |")
        return
    ends: dict[str, list[tuple[float, float]]] = {}
    commands: dict[str, list[float]] = {}
    memory: list[dict[str, float]] = []
    for _ in range(options.rounds):
        for name, seconds, resident in stages_of_peer(checkpoint, options.blocks):
            ends.setdefault(name, []).append((seconds, resident))
        seconds, kinds = peer_command(checkpoint, options.blocks)
        memory.append(kinds)
        commands.setdefault(f"`peer --blocks {options.blocks}` serves", []).append(seconds)
        commands.setdefault("`generate`, first word", []).append(first_word_of_generate(checkpoint))
        commands.setdefault("`demo`, first word", []).append(first_word_of_demo(checkpoint))
    print("| a peer | ends after, s | resident, MiB |\n|---|---:|---:|")
    for name, values in ends.items():
        print(f"| {name} | {min(v[0] for v in values):.2f} | {min(v[1] for v in values) / MIB:.0f} |")
    print("\n| command | s |\n|---|---:|")
    for name, times in commands.items():
        print(f"| {name} | {min(times):.2f} |")
    print("\n| memory of `peer` | MiB |\n|---|---:|")
    start, end = map(int, options.blocks.split(":"))
    print(f"| its blocks | {(end - start) * block_bytes(Checkpoint.open(checkpoint), None) / MIB:.0f} |")
    for kind in memory[0]:
        print(f"| {kind} | {min(one[kind] for one in memory) / MIB:.0f} |")


def stages_of_peer(checkpoint: str, blocks: str) -> list[tuple[str, float, float]]:
    """The stages of the start of a peer: name, seconds at the end, resident bytes."""
    ended = subprocess.run(
        [sys.executable, "-c", PEER, checkpoint, blocks], stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    return json.loads(ended.stdout)


def peer_command(checkpoint: str, blocks: str) -> tuple[float, dict[str, float]]:
    """Seconds until a peer serves, and its memory at that time, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "address"
        command = [*SPLITNET, "peer", checkpoint, "--blocks", blocks, "--listen", "tcp://127.0.0.1:0", *ONE_THREAD]
        began = time.monotonic()
        with subprocess.Popen(
            [*command, "--device", "cpu", "--address-file", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while not file.exists():
                if process.poll() is not None:
                    raise SystemExit("the peer ended")
                time.sleep(0.01)
            seconds = time.monotonic() - began
            kinds = resident_of(process.pid, os.path.basename(checkpoint))
            process.terminate()
    return seconds, kinds


def resident_of(pid: int, checkpoint: str) -> dict[str, float]:
    """Resident bytes of a process, and the mapped bytes by their origin."""
    mapped: Counter[str] = Counter()
    for region in psutil.Process(pid).memory_maps():
        if not region.path.startswith("/"):
            kind = "its own"
        else:
            kind = "of the checkpoint's files" if checkpoint in region.path else "of the libraries' files"
        mapped[kind] += region.rss
    return {"all": float(mapped.total()), **{kind: float(mapped[kind]) for kind in sorted(mapped)}}


def first_word_of_generate(checkpoint: str) -> float:
    """Seconds until `splitnet generate` prints, through three running peers."""
    with LocalSwarm(checkpoint, 3, (*ONE_THREAD, "--device", "cpu")) as swarm:
        address = swarm.wait()
        return first_output(["generate", checkpoint, "What do bees eat?", "--join", address, "--device", "cpu"], "")


def ways_to_join(checkpoint: str, lean: str, rounds: int) -> dict[str, list[float]]:
    """Seconds until the first word, by the method of joining."""
    has = subprocess.run([lean, "-c", "import hivemind"], stderr=subprocess.DEVNULL).returncode == 0
    if has:
        raise SystemExit(f"{lean} has hivemind: name the Python of an environment without hivemind")
    times: dict[str, list[float]] = {}
    with LocalSwarm(checkpoint, 3, (*ONE_THREAD, "--device", "cpu")) as swarm:
        swarm.wait()
        peer, node = re.findall(r'--join "?([^\s"]+)', swarm.daemons[0].log())
        for number in range(rounds + 1):
            for name, python, address in (
                ("hivemind, `/ip4/...`", sys.executable, node),
                ("with hivemind, `tcp://...`", sys.executable, peer),
                ("no hivemind, `tcp://...`", lean, peer),
            ):
                words = ["generate", checkpoint, "What do bees eat?", "--join", address, "--device", "cpu"]
                seconds = first_output(words, "", python)
                if number:
                    times.setdefault(name, []).append(seconds)
    return times


def first_word_of_demo(checkpoint: str) -> float:
    """Seconds until `splitnet demo` prints the first word of the answer, which follows the question."""
    return first_output(["demo", checkpoint, "--prompt", "What do bees eat?", "--device", "cpu"], r"eat\?\s+")


def first_words_of_run(checkpoint: str, count: int, memory: str) -> list[tuple[float | None, float]]:
    """Seconds of `splitnet run` on each machine until it waits for others, and from the start of the last machine
    until the first word of the answer. The last machine completes the model, and waits for nobody."""
    hosts = [str(number) for number in range(count)]
    home = {"home": NAMED["port-restricted"]}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lab = stack.enter_context(Lab([*hosts, "outside"], routers=home, behind=dict.fromkeys(hosts, "home")))
        command = [*SPLITNET, "run", checkpoint, "--serve", "--memory", memory, "--max-new-tokens", "8"]
        processes: list[subprocess.Popen[bytes]] = []
        waits: list[float | None] = []
        words: dict[str, float] = {}
        began = 0.0
        for host in hosts:
            began = time.monotonic()
            own = {
                "SPLITNET_CACHE": str(folder / f"{host}.cache"),
                "SPLITNET_KEY_FILE": str(folder / f"{host}.key"),
                "PYTHONUNBUFFERED": "1",
            }
            with (folder / f"{host}.out").open("w") as out, (folder / f"{host}.err").open("w") as errors:
                process = lab.run(host, command, stdin=subprocess.PIPE, stdout=out, stderr=errors, env=os.environ | own)
            processes.append(process)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            assert process.stdin is not None
            process.stdin.write(b"What do bees eat?\n")
            process.stdin.flush()
            while host != hosts[-1] and "waiting for peers" not in (folder / f"{host}.err").read_text():
                if process.poll() is not None or re.search(r"\w", (folder / f"{host}.out").read_text()):
                    raise SystemExit(f"{memory} are too much or too little: {(folder / f'{host}.err').read_text()}")
                time.sleep(0.02)
            waits.append(time.monotonic() - began if host != hosts[-1] else None)
        while len(words) < count:
            for host, process in zip(hosts, processes, strict=True):
                if host not in words and re.search(r"\w", (folder / f"{host}.out").read_text()):
                    words[host] = time.monotonic() - began
                if process.poll() is not None:
                    raise SystemExit((folder / f"{host}.err").read_text())
            time.sleep(0.02)
        return [(wait, words[host]) for host, wait in zip(hosts, waits, strict=True)]


def first_output(arguments: list[str], after: str, python: str = sys.executable) -> float:
    """Seconds until a command prints a letter after text that matches `after`."""
    began = time.monotonic()
    with subprocess.Popen(
        [python, *SPLITNET[1:], *arguments, "--max-new-tokens", "8"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        text = ""
        while data := os.read(process.stdout.fileno(), 4096):
            text += data.decode(errors="replace")
            if re.search(after + r"\w", text):
                seconds = time.monotonic() - began
                process.stdout.read()
                return seconds
    raise SystemExit(f"splitnet {arguments[0]} printed no word: {text}")


if __name__ == "__main__":
    main()
