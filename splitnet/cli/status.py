"""`splitnet status`: who serves what."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from splitnet.cli.arguments import Join, Lan, Model, resolve_model


def status(
    model: Model,
    join: Join = None,
    lan: Lan = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the peers of MODEL's swarm, their blocks, speed and load, and which blocks nobody serves."""
    checkpoint = resolve_model(model)

    from scheduler.swarm import missing_blocks
    from splitnet.cli.local_network import find_swarm
    from splitnet.client.swarm import ModelFacts, Swarm
    from splitnet.model.checkpoint import Checkpoint
    from splitnet.net.facts import facts_of

    facts = ModelFacts.of(Checkpoint.open(checkpoint))
    with Swarm(facts, join or find_swarm(facts, lan=lan)) as swarm:
        records = sorted(swarm.peers(fresh=True), key=lambda record: (record.start, record.end))
    holes = missing_blocks([facts_of(record) for record in records if record.serves], facts.num_blocks)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": facts.name,
                    "fingerprint": facts.fingerprint,
                    "num_blocks": facts.num_blocks,
                    "missing": [list(hole) for hole in holes],
                    "peers": [_as_json(record) for record in records],
                }
            )
        )
        return
    _print_table(facts, records, holes)


def _as_json(record: Any) -> dict[str, Any]:
    values = dataclasses.asdict(record)
    values["key"] = record.key.text
    values["links"] = [
        {"peer": link.peer.hex(), "rtt_ms": link.rtt_ms, "bytes_per_ms": link.bytes_per_ms} for link in record.links
    ]
    return values


def _blocks_of(record: Any) -> str:
    served = f"{record.start}..{record.end - 1}"
    return f"{served} -> {record.moving_to[0]}..{record.moving_to[1] - 1}" if record.moving_to else served


def _print_table(facts: Any, records: Any, holes: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"{facts.name}, {facts.num_blocks} blocks", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for column in ("blocks", "address", "device"):
        table.add_column(column, no_wrap=column != "device")
    for column in ("ms/token", "free KV", "sessions"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("key", no_wrap=True)
    for record in records:
        table.add_row(
            _blocks_of(record),
            record.address.removeprefix("tcp://"),
            f"{record.device} {record.dtype}",
            f"{record.block_ms[0] * (record.end - record.start):.1f}",
            str(record.kv_free_positions),
            str(record.sessions),
            record.key.text[:9],
        )
    console.print(table)
    if holes:
        for start, end in holes:
            console.print(f"blocks {start}..{end - 1} are served by nobody: start a peer with --blocks {start}:{end}")
    else:
        console.print("every block is served")
