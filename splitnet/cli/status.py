"""`splitnet status`: the peers of a model and their blocks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from splitnet.cli.arguments import ModelOrInvite, connects
from splitnet.cli.daemon import print_addresses
from splitnet.cli.generate import connection_to
from splitnet.cli.tables import table
from splitnet.session.options import ConnectionOptions

SHOWN_ADDRESSES = 3  # Maximum number of addresses to join with that are printed; JSON contains all addresses

if TYPE_CHECKING:
    from splitnet.swarm.swarm import Overview


@connects(only=("initial_peers", "lan", "key_file", "swarm_key", "invite", "model_id"))
def status(
    model: ModelOrInvite = None,
    *,
    connecting: ConnectionOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the peers of MODEL's swarm, their blocks, speed and load, and the blocks without a peer."""
    connection = connection_to(model, connecting)
    from splitnet.audit.auditor import named_peers
    from splitnet.checkpoint.checkpoint import Checkpoint
    from splitnet.swarm.swarm import Overview, short_key

    facts = connection.facts_of(Checkpoint.open(connection.model))
    with connection.swarm_of(facts) as swarm:
        overview = Overview.of(swarm, swarm.peers(fresh=True))
    lied = named_peers(facts.fingerprint)
    if as_json:
        typer.echo(json.dumps(overview.as_json() | {"lied": {key: str(file) for key, file in lied.items()}}))
        return
    _print_table(overview)
    for key, file in lied.items():
        typer.echo(f"{short_key(key)} has lied, and is not used by this user's clients: {file}")


def _print_table(overview: Overview) -> None:
    from splitnet.swarm.plan import blocks_text
    from splitnet.swarm.swarm import reached, short_key, token_joules, token_ms
    from splitnet.transport.addresses import peer_address

    facts = overview.facts
    joules = ["J/token"] * any(record.watts for record in overview.records)
    figures = ["ms/token", *joules, "free KV", "sessions"]
    rows: list[list[str]] = []
    for record in overview.records:
        blocks, spent = blocks_text(record.start, record.end), token_joules(record)
        rows.append(
            [
                f"{blocks} -> {blocks_text(*record.moving_to)}" if record.moving_to else blocks,
                record.address.removeprefix("tcp://"),
                reached(record),
                f"{token_ms(record):.1f}",
                *(["?" if spent is None else f"{spent:.3g}"] * len(joules)),
                str(record.kv_free_positions),
                str(record.sessions),
                short_key(record.key.text),
                f"{record.device} {record.dtype}",
            ]
        )
    heads = ["blocks", "address", "reached", *figures, "key", "device"]
    typer.echo(table(heads, rows, figures, title=f"{facts.name}, {facts.num_blocks} blocks"))
    for sentence in overview.advice() or ["every block is served"]:
        typer.echo(sentence)
    if overview.records:
        print_addresses([peer_address(record.endpoint) for record in overview.records[:SHOWN_ADDRESSES]])
