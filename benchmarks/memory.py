"""Memory of daemons with spans of different length, and of a client, compared with the whole model; prints Markdown.

    python -m benchmarks.memory CHECKPOINT [--blocks 1 5 10 20 30] [--dtype bfloat16] [--weights int8]

One daemon runs at a time, started by `splitnet peer`, and is measured when it serves; by then it has computed, because
it times its blocks at the start. The columns, in MiB: bytes of the weights; resident memory (RSS); the resident memory
above that of a process that has only imported the libraries; the unshared part (USS, which depends on other processes
with the same libraries); the peak of the process's own allocations (anonymous memory, sampled every 5 ms); and the peak
of resident memory, which includes mapped pages of checkpoint files. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from splitnet.blocks.span import block_bytes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.quant.choose import name_of
from splitnet.quant.packed_tensor import as_dtype

MIB = 2**20
LIBRARIES = """
import splitnet.cli.text_generator, peers.running_peer
from splitnet.directory.hivemind_node import import_hivemind
import_hivemind()
"""
GENERATE = """
ids = torch.arange(100, 164)[None]
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None)
"""
CLIENT = """
import sys, torch, splitnet
from splitnet.security.identity import Identity
torch.set_num_threads(1)
model = splitnet.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], initial_peers=[sys.argv[2]], identity=Identity.generate(), dtype=sys.argv[3] or None
)
"""
WHOLE = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[3] or "auto")
"""
THEN_WAIT = """
print("ready", flush=True)
sys.stdin.read()
"""


COLUMNS = "weights | resident | above libraries | unique | peak allocated | peak resident |"


@dataclass(frozen=True)
class Memory:
    """Memory of one process, in bytes."""

    resident: int
    unique: int
    peak_allocated: int
    peak_resident: int

    def row(self, name: str, weights: int, base: Memory) -> str:
        above = self.resident - base.resident
        values = (weights, self.resident, above, self.unique, self.peak_allocated, self.peak_resident)
        cells = [name, *(f"{value / MIB:.0f}" for value in values)]
        return f"| {' | '.join(cells)} |"


class Watch:
    """Samples the memory of a process until the result is requested."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def memory(self) -> Memory:
        self._done.set()
        self._thread.join()
        info = psutil.Process(self._pid).memory_full_info()
        return Memory(info.rss, info.uss, self._peak, self._status("VmHWM:"))

    def _look(self) -> None:
        while not self._done.wait(0.005):
            try:
                self._peak = max(self._peak, self._status("RssAnon:"))
            except (OSError, StopIteration):
                return  # the process has ended, which the caller will notice

    def _status(self, field: str) -> int:
        lines = Path(f"/proc/{self._pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@contextmanager
def daemon(checkpoint: str, blocks: int, dtype: str, weights: str) -> Iterator[tuple[Watch, str]]:
    """A daemon that serves the first blocks, and the address to join its swarm."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "address"
        command = [sys.executable, "-m", "splitnet", "peer", checkpoint, "--blocks", f"0:{blocks}", "--threads", "1"]
        command += ["--listen", "tcp://127.0.0.1:0", "--address-file", str(file)]
        command += ["--dtype", dtype] if dtype else []
        command += ["--weights", weights]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            watch = Watch(process.pid)
            try:
                while not file.exists():
                    if process.poll() is not None:
                        raise SystemExit(f"the daemon with {blocks} blocks ended: start the daemon by hand to see why")
                    time.sleep(0.05)
                yield watch, file.read_text().strip()
            finally:
                process.terminate()


def memory_of(script: str, *arguments: str) -> Memory:
    """Memory of a Python process that has run `script`."""
    command = [sys.executable, "-c", f"import sys\n{script}{THEN_WAIT}", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        watch = Watch(process.pid)
        if process.stdout.readline() != b"ready\n":
            raise SystemExit("a process to be measured failed")
        found = watch.memory()
        process.stdin.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub id of a checkpoint")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 5, 10, 20, 30])
    parser.add_argument("--dtype", default="", help="type of the weights; default: the checkpoint's own")
    parser.add_argument("--weights", help="weight format of the daemons; default: the type of computation")
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.checkpoint)
    dtype = as_dtype(arguments.dtype or None) or checkpoint.dtype
    weights = arguments.weights or name_of(dtype)
    block = block_bytes(checkpoint, dtype, weights)

    base = memory_of(LIBRARIES)
    print(f"{checkpoint.name}, {name_of(dtype)}, weights of the daemons {weights}, MiB:")
    print()
    print(f"| daemon | {COLUMNS}\n|---|---|---|---|---|---|---|")
    print(base.row("libraries only", 0, base))
    for blocks in arguments.blocks:
        with daemon(arguments.checkpoint, blocks, arguments.dtype, weights) as (watch, _):
            row = watch.memory().row(f"blocks 0:{blocks}", blocks * block, base)
            print(row, flush=True)

    print()
    print(f"| client, after 16 tokens | {COLUMNS}\n|---|---|---|---|---|---|---|")
    with daemon(arguments.checkpoint, checkpoint.num_blocks, arguments.dtype, weights) as (watch, address):
        words = (arguments.checkpoint, address, arguments.dtype)
        client = memory_of(CLIENT + GENERATE, *words)
        watch.memory()
    whole = memory_of(WHOLE + GENERATE, *words)
    print(client.row("splitnet", checkpoint.bytes_of(checkpoint.client_part_names_of, dtype), base))
    print(whole.row("plain transformers", checkpoint.bytes_of(checkpoint.store.tensor_names, dtype), base))


if __name__ == "__main__":
    main()
