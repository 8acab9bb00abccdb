"""Simulates a swarm: the way in to `simulator/`."""

from __future__ import annotations

from collections.abc import Callable

from simulator.engine import Simulation
from simulator.outcome import Outcome, differences, outcome_of, pooled
from simulator.variants import ABLATIONS, AGAINST, BASELINES, POLICIES
from simulator.world import SCENARIOS, Settings, World

__all__ = [
    "ABLATIONS", "AGAINST", "BASELINES", "POLICIES", "SCENARIOS", "Outcome", "Settings", "World", "differences",
    "pooled", "simulate",
]  # fmt: skip


def simulate(world: World, policy: str, progress: Callable[[float], None] | None = None) -> Outcome:
    """What becomes of the clients of a world under a policy, one of `POLICIES`; the same arguments give the same.

    progress: told from time to time which share of the clients has come.
    """
    chosen = POLICIES[policy]
    world = world.under(**chosen.rules)
    simulation = Simulation(world, chosen.routing(world), chosen.placing(world))
    for share in simulation.run():
        if progress:
            progress(share)
    return outcome_of(simulation)
