"""Time to the first word of `splitnet generate`, joined through a node of the DHT and through a peer's own port.

    python -m benchmarks.joining CHECKPOINT [--rounds 5]

One daemon serves the whole model; commands that join with either of its addresses run in turns, each as a separate
process that generates one token. Prints Markdown: seconds from the start of the process until the first byte of text
and until the end of the process, and seconds of processor time of the process and its children.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPLITNET = (sys.executable, "-m", "splitnet")
START_S = 120.0


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        address_file, log = folder / "address", folder / "log"
        command = [*SPLITNET, "peer", arguments.checkpoint, "--listen", "tcp://127.0.0.1:0", "--threads", "1"]
        with log.open("wb") as output:
            peer = subprocess.Popen(
                [*command, "--address-file", str(address_file)], stdout=output, stderr=subprocess.STDOUT
            )
        try:
            deadline = time.monotonic() + START_S
            while not address_file.exists():
                assert peer.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            addresses = re.findall(r'--join "?([^\s"]+)', log.read_text())
            ways = {"node of the DHT": addresses[-1], "peer's own port": addresses[0]}
            took: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
            for turn in range(arguments.rounds + 1):
                for way, address in ways.items():
                    times = first_word(arguments.checkpoint, address, folder)
                    if turn:  # the first turn fills the cache of files
                        took[way].append(times)
        finally:
            peer.send_signal(signal.SIGTERM)
            peer.wait()
    print("| joined through | first word, s: median | least | end, s: median | processor, s: median |")
    print("|---|---|---|---|---|")
    for way, times in took.items():
        first, ended, processor = zip(*times, strict=True)
        middle = [statistics.median(column) for column in (first, ended, processor)]
        print(f"| {way} | {middle[0]:.2f} | {min(first):.2f} | {middle[1]:.2f} | {middle[2]:.2f} |")


def first_word(checkpoint: str, address: str, folder: Path) -> tuple[float, float, float]:
    """Runs one command. Returns the seconds until the first byte of text, until the end, and of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    command = [*SPLITNET, "generate", checkpoint, "Hello", "--max-new-tokens", "1", "--join", address]
    environment = {**os.environ, "SPLITNET_KEY_FILE": str(folder / "key"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout is not None
    byte = process.stdout.read(1)
    first_s = time.monotonic() - began
    process.stdout.read()
    process.wait()
    assert byte and process.returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return first_s, time.monotonic() - began, cpu_s


if __name__ == "__main__":
    main()
