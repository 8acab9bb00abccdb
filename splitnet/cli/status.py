"""`splitnet status`: who serves what."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from splitnet.cli.arguments import ModelOrInvite, connects
from splitnet.cli.daemon import tell_addresses
from splitnet.cli.generate import connection_to
from splitnet.session.options import ConnectionOptions

SHOWN_ADDRESSES = 3  # To join with; all are in the JSON

if TYPE_CHECKING:
    from splitnet.swarm.swarm import Overview


@connects(only=("initial_peers", "lan", "key_file", "swarm_key", "invite", "model_id"))
def status(
    model: ModelOrInvite = None,
    *,
    connecting: ConnectionOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the peers of MODEL's swarm, their blocks, speed and load, and which blocks nobody serves."""
    connection = connection_to(model, connecting)
    from splitnet.checkpoint.checkpoint import Checkpoint
    from splitnet.swarm.swarm import Overview

    facts = connection.facts_of(Checkpoint.open(connection.model))
    with connection.swarm_of(facts) as swarm:
        overview = Overview.of(swarm, swarm.peers(fresh=True))
    if as_json:
        typer.echo(json.dumps(overview.as_json()))
    else:
        _print_table(overview)


def _print_table(overview: Overview) -> None:
    from rich.console import Console
    from rich.table import Table

    from splitnet.swarm.plan import blocks_text
    from splitnet.swarm.swarm import reached, short_key, token_joules, token_ms
    from splitnet.transport.addresses import peer_address
    from splitnet.wire.fields import STRICT_VERSIONS

    console = Console()
    facts = overview.facts
    table = Table(
        title=f"{facts.name}, {facts.num_blocks} blocks", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for column in ("blocks", "address", "reached", "device"):
        table.add_column(column, no_wrap=column != "device")
    shows_energy = any(record.watts for record in overview.records)
    for column in ("ms/token", *(["J/token"] * shows_energy), "free KV", "sessions"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("key", no_wrap=True)
    for record in overview.records:
        blocks, joules = blocks_text(record.start, record.end), token_joules(record)
        table.add_row(
            f"{blocks} -> {blocks_text(*record.moving_to)}" if record.moving_to else blocks,
            record.address.removeprefix("tcp://"),
            reached(record),
            f"{record.device} {record.dtype}",
            f"{token_ms(record):.1f}",
            *(["?" if joules is None else f"{joules:.3g}"] * shows_energy),
            str(record.kv_free_positions),
            str(record.sessions),
            short_key(record.key.text),
        )
    console.print(table)
    for sentence in overview.advice() or ["every block is served"]:
        typer.echo(sentence)
    if answering := [record for record in overview.records if record.version not in STRICT_VERSIONS]:
        tell_addresses([peer_address(record.endpoint) for record in answering[:SHOWN_ADDRESSES]])
