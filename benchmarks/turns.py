"""The speed of another checkout of splitnet compared with this one, in turns; prints Markdown.

    git worktree add /tmp/before COMMIT && (cd /tmp/before && python setup.py build_ext --inplace)
    python -m benchmarks.turns CHECKPOINT /tmp/before [--weights float32 int8 int4] [--rounds 5]

Three daemons of each checkout serve a third of the model each, one thread each, and one client of each
checkout measures: a decode step, the prefill of a prompt, eight concurrent answers, a step of LoRA. Then the benchmark
times the start of a peer until it serves, and `splitnet generate` until its first word. It prints medians; a ratio
above 1 means that this checkout takes longer. It uses only features that both checkouts have: the commands and the
public API.
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
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

HERE = Path(__file__).resolve().parents[1]
PROMPT, TOKENS, AT_ONCE, ROWS, COLUMNS = 512, 24, 8, 4, 48
WORDS = "Once upon a time there was a"


def environment(root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "SPLITNET_LAN": "false"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "splitnet", *words]


class Daemon:
    """A process of `splitnet peer`. start_s: seconds until it served."""

    def __init__(self, root: Path, work: str, checkpoint: str, blocks: str, weights: str, join: str | None) -> None:
        words = ["peer", checkpoint, "--blocks", blocks, "--weights", weights, "--listen", "tcp://127.0.0.1:0"]
        words += ["--join", join] if join else ["--dht-listen", "/ip4/127.0.0.1/tcp/0"]
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command(*words),
            cwd=work,
            env=environment(root),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.address, self.start_s, said = join, 0.0, list[str]()
        while not (self.start_s and self.address):
            said.append(self.process.stdout.readline() if self.process.stdout else "")
            if not said[-1]:
                raise SystemExit("".join(said))
            if said[-1].startswith("serving blocks"):
                self.start_s = time.perf_counter() - began
            elif found := re.search(r"--join (/ip4/127\S+)", said[-1]):
                self.address = found[1]
        Thread(target=lambda: list(self.process.stdout or ()), daemon=True).start()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Client:
    """A process that measures on request."""

    def __init__(self, root: Path, work: str, checkpoint: str, address: str) -> None:
        words = [sys.executable, __file__, "--client", checkpoint, address]
        self._process = subprocess.Popen(
            words, cwd=work, env=environment(root), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def measure(self, what: str) -> float:
        """Requests a measurement; returns its result in ms."""
        assert self._process.stdin and self._process.stdout
        print(what, file=self._process.stdin, flush=True)
        return float(json.loads(self._process.stdout.readline()))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def serve_measurements(checkpoint: str, address: str) -> None:
    """Runs in the client's process: serves one request per line of standard input."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    from splitnet import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, initial_peers=[address], codec="none")
    ids = torch.randint(100, 5000, (AT_ONCE, PROMPT), generator=torch.Generator().manual_seed(0))

    def generate(tokens: int, row: int = 0, positions: int = 8) -> None:
        kept = ids[row : row + 1, :positions]
        model.generate(
            kept,
            attention_mask=torch.ones_like(kept),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            speculate=None,
        )

    def eight() -> None:
        threads = [Thread(target=generate, args=(TOKENS, row)) for row in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    tuned: Any = None

    def tune() -> None:
        nonlocal tuned
        if tuned is None:
            tuned = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=4))
        tuned.zero_grad()
        tuned(input_ids=ids[:ROWS, :COLUMNS], labels=ids[:ROWS, :COLUMNS]).loss.backward()

    asked = {
        "decode": lambda: generate(TOKENS),
        "prefill": lambda: generate(1, 0, PROMPT),
        "eight": eight,
        "tune": tune,
    }
    for line in sys.stdin:
        began = time.perf_counter()
        asked[line.strip()]()
        print(json.dumps((time.perf_counter() - began) * 1000), flush=True)


def first_word_s(root: Path, work: str, checkpoint: str, address: str) -> float:
    words = command("generate", checkpoint, WORDS, "--join", address, "--max-new-tokens", "1")
    began = time.perf_counter()
    subprocess.run(words, cwd=work, env=environment(root), check=True, capture_output=True)
    return time.perf_counter() - began


def print_row(what: str, before: Sequence[float], now: Sequence[float]) -> None:
    ratio = median(one / other for one, other in zip(now, before, strict=True))
    print(f"| {what} | {median(before):.1f} | {median(now):.1f} | {ratio:.3f} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        return serve_measurements(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="GGUF file or folder of a model with 30 blocks, as SmolLM2-135M-Instruct")
    parser.add_argument("before", type=Path, help="another checkout, with its kernels compiled")
    parser.add_argument("--weights", nargs="+", default=["float32", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    roots, checkpoint = [arguments.before.resolve(), HERE], str(Path(arguments.checkpoint).resolve())
    print("| weights, what | before, ms | now, ms | now / before, median |\n|---|--:|--:|--:|")
    for weights in arguments.weights:
        with ExitStack() as stack:
            work = stack.enter_context(tempfile.TemporaryDirectory())
            addresses, clients = list[str](), list[Client]()
            for root in roots:
                address = None
                for blocks in ("0:10", "10:20", "20:30"):
                    daemon = Daemon(root, work, checkpoint, blocks, weights, address)
                    stack.callback(daemon.stop)
                    address = daemon.address
                assert address
                addresses.append(address)
                clients.append(Client(root, work, checkpoint, address))
                stack.callback(clients[-1].stop)
            for what in ("decode", "prefill", "eight", "tune"):
                times: list[list[float]] = [[], []]
                for turn in range(arguments.rounds + 1):
                    for index in (0, 1) if turn % 2 else (1, 0):
                        times[index].append(clients[index].measure(what))
                print_row(f"{weights}, {what}", times[0][1:], times[1][1:])  # without the warm-up rounds
            if weights == arguments.weights[0]:
                starts: list[list[float]] = [[], []]
                words: list[list[float]] = [[], []]
                for turn in range(arguments.rounds):
                    for index in (0, 1) if turn % 2 else (1, 0):
                        daemon = Daemon(roots[index], work, checkpoint, "0:10", weights, addresses[index])
                        daemon.stop()
                        starts[index].append(daemon.start_s * 1000)
                        words[index].append(first_word_s(roots[index], work, checkpoint, addresses[index]) * 1000)
                print_row(f"{weights}, a peer until it serves", *starts)
                print_row(f"{weights}, `generate` until its first word", *words)


if __name__ == "__main__":
    main()
