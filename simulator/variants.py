"""The policies that can be simulated, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from simulator.petals import PetalsPlacing, PetalsRouting
from simulator.placing import OwnPlacing, Placing
from simulator.policies import Best, BestOptions, FewestHops, Nearest, RandomRoute, Routing
from simulator.world import World

EVERYBODY: Final = 1_000_000
"""As a limit of candidates: no limit."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How clients choose routes and peers choose blocks. rules: settings that differ from those of the world."""

    label: str
    routing: Callable[[World], Routing]
    placing: Callable[[World], Placing] = OwnPlacing
    rules: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _best(**options: Any) -> Callable[[World], Routing]:
    return lambda world: Best(world, BestOptions(**options))


def _petals(push: bool) -> Callable[[World], Routing]:
    return lambda world: PetalsRouting(world, push=push)


BASELINES: Final = ("own", "no-prompt", "no-replan", "petals-push", "petals", "fewest-hops", "nearest", "random")
AGAINST: Final = ("own", "no-load", "petals-push", "petals", "fewest-hops", "nearest", "random", "oracle")
ABLATIONS: Final = (
    "own", "no-prompt", "few-probes", "own-checks", "no-doubt", "no-replan", "no-moves", "no-load", "stale",
    "no-coordinates", "true-links", "no-distance", "petals-routing", "petals-placement",
)  # fmt: skip

POLICIES: Final[Mapping[str, Policy]] = MappingProxyType(
    {
        "own": Policy("own", _best()),
        "no-prompt": Policy("own, the prompt ignored", _best(prompt=False)),
        "own-checks": Policy("own, links of the new route asked for", _best(checks=2)),
        "true-links": Policy("own, all links known", _best(true_links=True)),
        "oracle": Policy(
            "oracle: all links known, facts of 3 s ago",
            _best(true_links=True),
            rules={"refresh_s": 2.0, "record_ttl_s": 6.0, "view_s": 1.0},
        ),
        "no-coordinates": Policy("own, measured links only", _best(coordinates=False)),
        "few-probes": Policy("own, clients measure 32 links", _best(), rules={"probes": (16, 16)}),
        "no-replan": Policy("own, no re-planning", _best(replans=False)),
        "no-doubt": Policy("own, forecasts never doubted", _best(), rules={"doubts": False}),
        "no-moves": Policy("own, peers never move", _best(), rules={"moves": False}),
        "no-distance": Policy("own, blocks chosen wherever peers are", _best(), partial(OwnPlacing, by_distance=False)),
        "no-load": Policy("own, load ignored", _best(load=False)),
        "stale": Policy(
            "own, facts four times as old",
            _best(),
            rules={"refresh_s": 120.0, "look_s": 120.0, "record_ttl_s": 360.0, "view_s": 120.0},
        ),
        "all-candidates": Policy("own, over all peers", _best(limit=EVERYBODY)),
        "random": Policy("random route", RandomRoute),
        "fewest-hops": Policy("fewest hops", FewestHops),
        "nearest": Policy("nearest next", Nearest),
        "petals": Policy("Petals, through the client", _petals(push=False), PetalsPlacing),
        "petals-push": Policy("Petals, pushing", _petals(push=True), PetalsPlacing),
        "petals-routing": Policy("Petals' routing, own placement", _petals(push=True)),
        "petals-placement": Policy("own routing, Petals' placement", _best(), PetalsPlacing),
    }
)
