"""What `bench` does: join the swarm, load the model, measure, and tell in what environment."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import splitnet
from splitnet.bench.arms import LocalArm, SwarmArm
from splitnet.bench.cases import Case, check_room
from splitnet.bench.measuring import Arm, measure
from splitnet.bench.report import LOCAL, SWARM, Report
from splitnet.cli.progress import StageProgress
from splitnet.client.causal_lm import attach
from splitnet.client.swarm import ModelFacts, Swarm
from splitnet.model.checkpoint import Checkpoint
from splitnet.net.codecs import codec_by_name
from splitnet.net.identity import Identity


@dataclass(frozen=True)
class Benchmark:
    """One call of the command; see its options."""

    cases: Sequence[Case]
    rounds: int
    warm_up: int
    seed: int
    threads: int | None
    codec: str
    local: bool

    def run(self, model: str, join: Sequence[str], key_file: Path | None) -> Report:
        """Measures.

        Args:
            join: addresses of the swarm; empty: only plain transformers is measured.

        Raises:
            ContextTooLong: the model has no room for a case.
            SplitnetError: what else went wrong.
        """
        if self.codec != "auto":
            codec_by_name(self.codec)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        checkpoint = Checkpoint.open(model)
        check_room(self.cases, checkpoint.max_positions)
        arms: dict[str, Arm] = {}
        with ExitStack() as at_end, StageProgress() as progress:
            if join:
                swarm = Swarm(ModelFacts.of(checkpoint), join, identity=Identity.load_or_create(key_file))
                at_end.callback(swarm.close)
                arms[SWARM] = SwarmArm(attach(checkpoint, swarm, codec=self.codec), self.seed)
            if self.local:
                progress.update(f"loading {checkpoint.name} for --local", 0, 0)
                arms[LOCAL] = LocalArm(checkpoint, self.seed)
            measured = measure(arms, self.cases, rounds=self.rounds, warm_up=self.warm_up, progress=progress.update)
        return Report(checkpoint.name, self._settings(join), environment(), measured)

    def _settings(self, join: Sequence[str]) -> dict[str, Any]:
        settings: dict[str, Any] = {"rounds": self.rounds, "warm_up": self.warm_up, "seed": self.seed}
        return settings | ({"codec": self.codec, "join": list(join)} if join else {})


def environment() -> dict[str, Any]:
    """Of this process; what peers run on is not known here."""
    return {
        "splitnet": splitnet.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
