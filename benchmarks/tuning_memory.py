"""Memory of fine-tuning: in the client, in each peer, and in one process that trains the whole model with PEFT.

Each of these is a separate process. The training takes two steps; the result is the largest memory of the process,
minus its memory before the training.

    python -m benchmarks.tuning_memory CHECKPOINT [--rows 8] [--columns 256] [--vocabulary 152000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import tuning
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.demo import EXACT, LocalSwarm
from splitnet.hf.causal_lm import attach
from splitnet.swarm.swarm import ModelFacts, Swarm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--methods", nargs="+", choices=tuning.METHODS, default=list(tuning.METHODS))
    parser.add_argument("--vocabulary", type=int, help="measure a model with a new vocabulary of this size")
    parser.add_argument("--only", nargs=2, metavar=("METHOD", "ADDR"), help="only train here; ADDR -: no swarm")
    arguments = parser.parse_args()
    torch.set_num_threads(tuning.PEERS)
    if arguments.only:
        method, address = arguments.only
        train(arguments.checkpoint, method, address, arguments.rows, arguments.columns)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.vocabulary:
            enlarge(arguments.checkpoint, folder, arguments.vocabulary)
        measure(folder if arguments.vocabulary else arguments.checkpoint, arguments)


def measure(checkpoint: str, arguments: argparse.Namespace) -> None:
    """Prints a row for each method."""
    options = [checkpoint, "--rows", str(arguments.rows), "--columns", str(arguments.columns)]
    print(f"{arguments.rows} rows of {arguments.columns} tokens.\n")
    print("| method | PEFT, whole model: before, MiB | training adds | client: before | adds | a peer: before | adds |")
    print("|---|---|---|---|---|---|---|")
    for method in arguments.methods:
        with LocalSwarm(checkpoint, tuning.PEERS, EXACT) as peers:
            address = peers.wait()
            before = [reset(process.pid) for process in peers.processes]
            client = run(method, address, options)
            added = [peak(process.pid) - held for process, held in zip(peers.processes, before, strict=True)]
        alone = run(method, "-", options)
        cells = [*alone, *client, max(before), max(added)]
        print(f"| {method} | {' | '.join(f'{cell:.0f}' for cell in cells)} |", flush=True)


def enlarge(checkpoint: str, folder: str, vocabulary: int) -> None:
    """Saves a checkpoint with a larger vocabulary, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def run(method: str, address: str, arguments: Sequence[str]) -> tuple[float, float]:
    """The MiB of a new process before it trains, and the increase while it trains."""
    command = [sys.executable, "-m", "benchmarks.tuning_memory", *arguments, "--only", method, address]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, added = map(float, printed.split())
    return before, added


def train(folder: str, method: str, address: str, rows: int, columns: int) -> None:
    """Trains for two steps; prints the MiB before them, and the increase."""
    if address == "-":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        checkpoint = Checkpoint.open(folder)
        model = attach(checkpoint, Swarm(ModelFacts.of(checkpoint), [address]), codec="int8")
    adapted = tuning.adapted(model, method)
    ids = AutoTokenizer.from_pretrained(folder)(tuning.TEXT.read_text(), return_tensors="pt")["input_ids"][0]
    batch = torch.stack([ids[row * 7 : row * 7 + columns] for row in range(rows)])
    before = reset()
    tuning.curve(adapted, [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch}], 2)
    print(before, peak() - before)


def reset(pid: int | str = "self") -> float:
    """Returns the MiB that a process holds at present, and resets its peak (Linux)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak(pid)


def peak(pid: int | str = "self") -> float:
    """The peak memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
