"""Ten owners with different labels tune one adapter together; two owners drop out, and one lies.

Three daemons, a coordinator and the owners are hosts of an emulated network (see docs/netlab.md). The labelled
examples of a file are sorted by label and cut into three pieces per owner; each owner gets three random pieces, and so
only some labels. After a quarter of the rounds two owners are killed. The liar sends its gradients times -20. For
comparison, one owner with all data, and some of the owners alone, take the same number of steps.

    sudo .venv/bin/python -m benchmarks.joint_tuning CHECKPOINT TRAIN.jsonl TEST.jsonl [--steps 100] [--delay 20]
        [--alone 3] [--output DIR] [--tune "--method side --lr 6e-4"] [--round "--liars 1"]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.netlab import Lab, LabError
from benchmarks.netlab.peers import LabPeers, even_spans
from splitnet.checkpoint.checkpoint import Checkpoint

PEERS = ("first", "middle", "last")
OWNERS = 10
DROPPED = (8, 9)
LIAR = 5
PIECES = 3  # pieces of the sorted examples per owner
LIE = (
    "import splitnet.tools.tune.owner as o; honest = o.sendable; "
    "o.sendable = lambda update, *rest: honest(-20 * update, *rest)"
)
MAIN = "import sys; from splitnet.__main__ import main; sys.argv[0] = 'splitnet'; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="GGUF file or folder of a checkpoint")
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="of an owner")
    parser.add_argument("--all-batch-size", type=int, default=32, help="batch size of one owner with all data")
    parser.add_argument("--delay", type=float, default=20.0, help="ms one way between any two hosts")
    parser.add_argument("--alone", type=int, default=3, help="how many owners also train alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", default="", help="more options of `splitnet tune`")
    parser.add_argument("--round", default="", help="more options of `splitnet round start`")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or Path(tempfile.mkdtemp(prefix="joint-"))
    output.mkdir(parents=True, exist_ok=True)
    parts = dealt(arguments.train, output, arguments.seed)
    spans = even_spans(Checkpoint.open(arguments.checkpoint).num_blocks, PEERS)
    names = [f"owner{number}" for number in range(OWNERS)]
    with (
        Lab((*PEERS, "coordinator", *names), delay_ms=arguments.delay) as lab,
        LabPeers(lab, arguments.checkpoint, spans) as peers,
    ):
        # Owners join through a peer: ten more DHT nodes would use the cores of the measured processes.
        address = re.findall(r'--join "(tcp://[^\s"]+)', peers.log(PEERS[0]))[0]
        trial = Trial(arguments, lab, output, ["--join", address, "--no-lan"])
        trial.joint(names, parts, "")
        size = arguments.all_batch_size
        trial.told("one owner with all data", *trial.tune(names[0], arguments.train, "all", size))
        for number in range(arguments.alone):
            trial.joint([names[number]], [parts[number]], f"alone{number}")


def dealt(train: Path, output: Path, seed: int) -> list[Path]:
    """Writes a file with the examples of each owner, and returns the files."""
    rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    chance = random.Random(seed)
    chance.shuffle(rows)
    rows.sort(key=lambda row: row["label"])
    count = OWNERS * PIECES
    pieces = [rows[place * len(rows) // count : (place + 1) * len(rows) // count] for place in range(count)]
    chance.shuffle(pieces)
    files = list[Path]()
    for owner in range(OWNERS):
        own = [row for piece in pieces[owner::OWNERS] for row in piece]
        files.append(output / f"owner{owner}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        print(f"owner {owner}: {len(own)} examples of {', '.join(sorted({row['label'] for row in own}))}", flush=True)
    return files


class Trial:
    """Runs commands in the hosts of a lab. join: the arguments with which they join the swarm."""

    def __init__(self, arguments: argparse.Namespace, lab: Lab, output: Path, join: Sequence[str]) -> None:
        self._arguments, self._lab, self._output, self._join = arguments, lab, output, join

    def _begin(self, host: str, log: str, *command: str, lie: bool = False) -> subprocess.Popen[Any]:
        code = f"{LIE}; {MAIN}" if lie else MAIN
        with (self._output / f"{log}.log").open("ab") as file:
            every = [sys.executable, "-c", code, *command, *self._join]
            return self._lab.run(host, every, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def log(self, name: str) -> str:
        return (self._output / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def _await(self, name: str, text: str, process: subprocess.Popen[Any]) -> None:
        while text not in self.log(name):
            if process.poll() is not None:
                raise LabError(self.log(name))
            time.sleep(0.1)

    def _train(self, host: str, data: Path, name: str, size: int, *options: str, **how: Any) -> subprocess.Popen[Any]:
        given = self._arguments
        command = ["tune", given.checkpoint, "--data", str(data), "--output", str(self._output / name)]
        command += ["--batch-size", str(size), "--seed", str(given.seed), "--codec", "none", *options]
        return self._begin(host, name, *command, **how)

    def tune(self, host: str, data: Path, name: str, size: int) -> tuple[str, float]:
        given, began = self._arguments, time.monotonic()
        options = ["--eval", str(given.test), "--steps", str(given.steps), *given.tune.split()]
        training = self._train(host, data, name, size, *options)
        if training.wait():
            raise LabError(self.log(name))
        return name, time.monotonic() - began

    def told(self, what: str, name: str, seconds: float) -> None:
        lines = [json.loads(line) for line in (self._output / name / "metrics.jsonl").read_text().splitlines()]
        found = [line for line in lines if "eval_loss" in line]
        moved = [sum(line.get(way, 0) for line in lines) / 1e6 for way in ("sent_bytes", "received_bytes")]
        accuracy = " -> ".join(f"{line['eval_accuracy']:.1%}" for line in found)
        print(
            f"{what}: accuracy {accuracy}, held-out loss {found[-1]['eval_loss']:.3f}, {seconds:.0f} s, with the peers "
            f"{moved[0]:.1f} MB sent, {moved[1]:.1f} received",
            flush=True,
        )

    def joint(self, names: Sequence[str], parts: Sequence[Path], alone: str) -> None:
        """Trains with all owners together, or with one owner alone in a round named `alone`: its own examples may lack
        labels of the held-out examples.
        """
        given, began, name = self._arguments, time.monotonic(), alone or "joint"
        start = ["round", "start", name, given.checkpoint, "--output", str(self._output / f"round-{name}")]
        start += ["--owners", str(len(names)), *given.round.split()]
        start += ["--listen", f"tcp://{self._lab.address('coordinator')}:0", *self._key(0)]
        coordinator = self._begin("coordinator", f"round-{name}", *start)
        self._await(f"round-{name}", "owners join", coordinator)
        starts = ["--steps", str(given.steps), *given.tune.split()]
        owners = list[subprocess.Popen[Any]]()
        for number, (host, part) in enumerate(zip(names, parts, strict=True)):
            more = ["--join-round", name, *self._key(number)]
            more += ["--eval", str(given.test), *starts] if not number else []
            lie = number == LIAR and not alone
            owners.append(self._train(host, part, alone or host, given.batch_size, *more, lie=lie))
            # The owners start one after the other, because all share this machine.
            self._await(alone or host, "trained parameters", owners[-1])
        self._await(f"round-{name}", f"round {max(1, given.steps // 4)} of", coordinator)
        dropped = () if alone else DROPPED
        for number in dropped:
            owners[number].kill()
        for number, owner in enumerate(owners):
            if owner.wait() and number not in dropped:
                raise LabError(self.log(alone or names[number]))
        coordinator.wait()
        first = alone or names[0]
        self.told(alone or f"{OWNERS} owners together", first, time.monotonic() - began)
        print(" ".join(re.findall("To the coordinator.*", self.log(first))), flush=True)

    def _key(self, owner: int) -> list[str]:
        return ["--key-file", str(self._output / f"key{owner}")]


if __name__ == "__main__":
    main()
