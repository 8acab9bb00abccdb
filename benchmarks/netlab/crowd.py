"""Other sessions that keep one peer busy.

The sessions only send requests to this peer: the other hops of whole routes would use the cores of this machine, and
slow down peers that must be idle.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.netlab.errors import LabError
from benchmarks.netlab.lab import Lab
from benchmarks.netlab.peers import GuidedSwarm
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.directory.record import PeerRecord
from splitnet.errors import SplitnetError
from splitnet.session.inference import Session
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.plan import PlannedHop
from splitnet.swarm.swarm import ModelFacts
from splitnet.wire.messages import Chunk

PROMPT_POSITIONS = 128
ANSWER_TOKENS = 8
_STOP_TIMEOUT_S = 15.0
_FIND_TIMEOUT_S = 60.0


class Crowd:
    """Sessions in a host that generate through the peer of another host, one answer after the other. Use with `with`.

    On entry, the program of the sessions starts; it sends nothing before `begin`.

    Args:
        lab: the hosts.
        host: the host of the sessions.
        checkpoint: hub id or folder.
        join: multiaddrs to join the swarm with.
        peer: address of the peer, `tcp://host:port`.
        sessions: number of sessions.
    """

    def __init__(self, lab: Lab, host: str, checkpoint: str, join: Sequence[str], peer: str, sessions: int) -> None:
        self._lab = lab
        self._host = host
        self._arguments = [checkpoint, peer, str(sessions), *join]

    def __enter__(self) -> Crowd:
        package = __package__ or ""
        folder = Path(__file__).parents[package.count(".") + 1]  # the parent folder of this package
        self._process = self._lab.run(
            self._host,
            [sys.executable, "-m", f"{package}.crowd", *self._arguments],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear("ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]

    def begin(self) -> None:
        """Lets the sessions generate until the end of the `with` block."""
        self._process.stdin.write("begin\n")  # pyright: ignore[reportOptionalMemberAccess]
        self._process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]

    def _hear(self, word: str) -> None:
        said = self._process.stdout.readline().strip()  # pyright: ignore[reportOptionalMemberAccess]
        if said != word:
            raise LabError(f"the crowd in {self._host} could not start: see its messages above")


def main(arguments: Sequence[str]) -> None:
    checkpoint, peer, sessions, *join = arguments
    torch.set_num_threads(1)
    facts = ModelFacts.of(Checkpoint.open(checkpoint))
    with GuidedSwarm(facts, join) as swarm:
        record = _find(swarm, peer)
        swarm.route = [PlannedHop(record, record.start, record.end)]
        swarm.facts = replace(facts, num_blocks=record.end)  # the client then accepts this peer's output as the end
        ended = threading.Event()
        threads = [threading.Thread(target=_generate, args=(swarm, ended)) for _ in range(int(sessions))]
        print("ready", flush=True)
        if sys.stdin.readline():
            for thread in threads:
                thread.start()
            sys.stdin.read()
            ended.set()
            for thread in threads:
                thread.join()


def _find(swarm: GuidedSwarm, address: str) -> PeerRecord:
    deadline = time.monotonic() + _FIND_TIMEOUT_S
    while time.monotonic() < deadline:
        for record in swarm.peers(fresh=True):
            if record.address == address:
                return record
        time.sleep(0.5)
    raise LabError(f"the peer at {address} is not in the DHT")


def _generate(swarm: GuidedSwarm, ended: threading.Event) -> None:
    """Generates one answer after the other."""
    hidden = torch.randn(PROMPT_POSITIONS, swarm.facts.hidden_size)
    while not ended.is_set():
        session = Session(swarm, ConnectionOptions(codec="none"), reservation=PROMPT_POSITIONS + ANSWER_TOKENS)
        try:
            # A peer with inner blocks returns the outputs of all positions, so all are requested.
            session.step(hidden, [Chunk(1, 0, PROMPT_POSITIONS, PROMPT_POSITIONS)])
            for position in range(PROMPT_POSITIONS, PROMPT_POSITIONS + ANSWER_TOKENS):
                if ended.is_set():
                    break
                session.step(hidden[:1], [Chunk(1, position, 1, 1)])
        except SplitnetError as error:
            print(f"a session of the crowd: {error}", file=sys.stderr)
            ended.wait(1.0)
        finally:
            session.close()


if __name__ == "__main__":
    main(sys.argv[1:])
