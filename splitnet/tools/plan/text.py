"""The tables and sentences of `splitnet plan`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from splitnet.tools.plan.planning import Plan, amount, joules_of


def title(plan: Plan) -> str:
    """What is cut, and for how much cache there is memory."""
    sizes, demand = plan.sizes, plan.demand
    sessions = f"{demand.sessions} sessions" if demand.sessions > 1 else "a session"
    caches = f"KV caches for {sessions} of {demand.context} tokens"
    return f"{sizes.name}, {sizes.num_blocks} blocks in {sizes.held_as}, with {caches}"


def device_table(plan: Plan) -> Table:
    """The devices in the order of the chain, and what they hold."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("device", no_wrap=True)
    table.add_column("blocks", no_wrap=True)
    table.add_column("memory used of available", justify="right", no_wrap=True)
    table.add_column("ms/token", justify="right", no_wrap=True)
    shows_energy = any(stage.device.watts for stage in plan.stages)
    if shows_energy:
        table.add_column("J/token", justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            stage.device.name,
            f"{stage.start}..{stage.end - 1}" if stage.end - stage.start > 1 else str(stage.start),
            f"{amount(stage.memory_used)} of {amount(stage.device.memory)}",
            f"{stage.ms_per_token:.1f}",
            *(["?" if stage.joules_per_token is None else f"{stage.joules_per_token:.3g}"] * shows_energy),
        )
    if plan.client_ms is None:
        table.add_row("client", "head", "", "?")
    else:
        table.add_row(f"client on {plan.client}", "head", "", f"{plan.client_ms:.1f}")
    return table


def link_table(plan: Plan) -> Table:
    """The links in the order of the chain, from the client and back to it."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("link", no_wrap=True)
    table.add_column("latency ms", justify="right", no_wrap=True)
    table.add_column("ms/token", justify="right", no_wrap=True)
    for link in plan.links:
        table.add_row(f"{link.sender} -> {link.receiver}", f"{link.latency_ms:.1f}", f"{link.ms_per_token:.1f}")
    return table


def summary(plan: Plan) -> Iterator[str]:
    """What to expect, and whether fewer devices would do better."""
    together = f", {plan.all_tokens_per_s:.1f} tokens/s for {plan.sessions} sessions together" * (plan.sessions > 1)
    yield (
        f"Expect {plan.tokens_per_s:.1f} tokens/s for one session{together}, and {plan.first_token_ms / 1000:.2f} s to "
        f"the first token of a prompt of {plan.demand.prompt}."
    )
    if plan.sessions <= 1:
        yield f"There is memory for one session of {plan.demand.context} tokens; --sessions makes room for more."
    joules = joules_of(plan.stages)
    if joules is not None:
        yield f"A token takes {joules:.3g} J on the devices, without the client and the network."
    yield from _comparison(plan)
    if plan.client_ms is None:
        yield "The client's time for the head is not in these figures: name the device that it runs on (client: host:)."
    if not plan.exact:
        yield "With so many devices the partition comes from a local search: a slightly better one may exist."


def _comparison(plan: Plan) -> Iterator[str]:
    names = [stage.device.name for stage in plan.stages]
    unit = f"tokens/s for {plan.sessions} sessions together" if plan.demand.throughput else "tokens/s"
    everyone = f": all devices in a chain would give {plan.everyone:.1f} {unit}" if plan.everyone is not None else ""
    if len(names) == 1:
        yield f"{names[0]} alone is faster than any chain of devices{everyone}."
        if names[0] == plan.client:
            yield "The client runs on it too, so you need no splitnet for this: run the model there with transformers."
        return
    if everyone:
        yield f"These {len(names)} devices are faster than more of them{everyone}."
    if plan.alone:
        best = max(plan.alone, key=lambda name: plan.alone[name])
        yield f"{best} alone would give {plan.alone[best]:.1f} {unit}."
    else:
        yield "No device has memory for the model alone."
