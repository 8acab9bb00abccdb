"""Lists the models of a swarm from its directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from scheduler.facts import coverage, missing_blocks
from splitnet.directory.demand import demand_of
from splitnet.directory.interface import SwarmDirectory
from splitnet.directory.record import PeerRecord, facts_of
from splitnet.swarm.plan import peer_command

MAX_MODELS: Final = 64  # largest number of models in the list, because anyone can announce models
_AT_ONCE = 8  # models whose peers are looked up at the same time


@dataclass(frozen=True)
class SwarmModel:
    """A model that peers serve, or that users request from gateways. The name is a claim of peers or gateways.

    records: of the model's peers. demand: tokens per second that users request, as claimed by gateways.
    """

    fingerprint: str
    name: str
    num_blocks: int
    records: tuple[PeerRecord, ...]
    demand: float

    @property
    def replicas(self) -> list[int]:
        """Number of peers that serve each block."""
        return coverage(map(facts_of, filter(lambda one: one.serves, self.records)), self.num_blocks)

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Ranges of blocks `[start, end)` that no peer serves."""
        return missing_blocks(map(facts_of, filter(lambda one: one.serves, self.records)), self.num_blocks)

    def commands(self, join_args: Sequence[str]) -> list[str]:
        """The commands that start a peer for each missing range; join_args: the arguments that join the
        swarm."""
        return [peer_command(self.name, join_args, *hole) for hole in self.missing]

    def as_json(self, join_args: Sequence[str]) -> dict[str, Any]:
        return {
            "model": self.name,
            "fingerprint": self.fingerprint,
            "num_blocks": self.num_blocks,
            "peers": len(self.records),
            "replicas": self.replicas,
            "tokens_per_s": self.demand,
            "missing": [list(hole) for hole in self.missing],
            "commands": self.commands(join_args),
        }


def models_of(directory: SwarmDirectory) -> list[SwarmModel]:
    """The models of a swarm, in order of demand, at most `MAX_MODELS`. Raises DirectoryError."""
    listed, demand = directory.models(), demand_of(directory)
    chosen = list(dict.fromkeys([*demand, *sorted(listed, key=lambda model: listed[model])]))[:MAX_MODELS]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        peers = list(pool.map(directory.peers, chosen))
    found: list[SwarmModel] = []
    for model, records in zip(chosen, peers, strict=True):
        wanted = demand.get(model)
        counts = Counter(record.num_blocks for record in records)
        blocks = counts.most_common(1)[0][0] if counts else wanted.num_blocks if wanted else 0
        if blocks:
            name = listed[model] if model in listed else wanted.name if wanted else records[0].model_name
            kept = tuple(record for record in records if record.num_blocks == blocks)
            found.append(SwarmModel(model, name, blocks, kept, wanted.tokens_per_s if wanted else 0.0))
    return found
