"""What `bench` does: join the swarm, load the model, measure, and tell in what environment."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from splitnet.cli.connection import Connection
from splitnet.cli.progress import StageProgress
from splitnet.hf.causal_lm import attached
from splitnet.quant.native import path_in_use, prefetch_in_use, processor
from splitnet.tools.bench.backends import LocalArm, SwarmArm
from splitnet.tools.bench.figures import Case, check_room
from splitnet.tools.bench.report import LOCAL, SWARM, Arm, Report, measure
from splitnet.version import __version__


@dataclass(frozen=True)
class Benchmark:
    """One call of the command; see its options."""

    cases: Sequence[Case]
    rounds: int
    warm_up: int
    seed: int
    threads: int | None
    local: bool

    def run(self, connection: Connection) -> Report:
        """Measures; with `local` and no address of a swarm, only plain transformers.

        Raises:
            ContextTooLong: the model has no room for a case.
            SplitnetError: what else went wrong.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        checkpoint = connection.checkpoint()
        check_room(self.cases, checkpoint.max_positions)
        arms: dict[str, Arm] = {}
        with ExitStack() as at_end, StageProgress() as progress:
            if self._measures_swarm(connection):
                swarm = connection.swarm(checkpoint)
                at_end.callback(swarm.close)
                arms[SWARM] = SwarmArm(attached(checkpoint, swarm, connection.options), self.seed)
            if self.local:
                progress.update(f"loading {checkpoint.name} for --local", 0, 0)
                arms[LOCAL] = LocalArm(checkpoint, self.seed, connection.options.device)
            measured = measure(arms, self.cases, rounds=self.rounds, warm_up=self.warm_up, progress=progress.update)
        return Report(checkpoint.name, self._settings(connection), environment(), measured)

    def _measures_swarm(self, connection: Connection) -> bool:
        return bool(connection.given.initial_peers or connection.given.invite) or not self.local

    def _settings(self, connection: Connection) -> dict[str, Any]:
        options = connection.options
        settings: dict[str, Any] = {"rounds": self.rounds, "warm_up": self.warm_up, "seed": self.seed}
        settings["device"] = options.device
        if self._measures_swarm(connection):
            settings |= {"codec": options.codec, "join": list(options.initial_peers), "prefer": options.prefer}
        if options.local_blocks is not None or options.local_weights is not None:
            settings |= {"local_blocks": options.local_blocks, "local_weights": options.local_weights}
        return settings


def environment() -> dict[str, Any]:
    """Of this process; what peers run on is not known here."""
    return {
        "splitnet": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "kernels": path_in_use(),
        "prefetch": str(prefetch_in_use()),
    }
