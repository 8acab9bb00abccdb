"""`splitnet models`: the models of a swarm, and their missing blocks."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from splitnet.cli.arguments import connects
from splitnet.cli.tables import table
from splitnet.session.options import ConnectionOptions


@connects(only=("initial_peers", "lan", "key_file", "swarm_key", "invite"))
def models(
    *,
    connecting: ConnectionOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the models of a swarm: blocks served, replicas, demand, and commands that serve missing blocks."""
    from splitnet.cli.connection import ModelConnection
    from splitnet.swarm.plan import blocks_text
    from splitnet.swarm.swarm_models import models_of

    connection = ModelConnection("", connecting)
    with connection.directory() as directory:
        found = models_of(directory)
    if as_json:
        typer.echo(json.dumps([model.as_json(connection.join_args) for model in found]))
        return
    rows: list[list[str]] = []
    for model in found:
        replicas = model.replicas
        covered, least, most = sum(map(bool, replicas)), min(replicas), max(replicas)
        rows.append(
            [
                model.name,
                f"{covered} of {model.num_blocks}",
                str(len(model.records)),
                str(least) if least == most else f"{least} to {most}",
                f"{model.demand:.2f} tokens/s" if model.demand else "-",
            ]
        )
    figures = ["blocks", "peers", "replicas", "demand"]
    typer.echo(table(["model", *figures], rows, figures))
    for model in found:
        for hole, command in zip(model.missing, model.commands(connection.join_args), strict=True):
            typer.echo(
                f"blocks {blocks_text(*hole)} of {model.name} are served by nobody: start a peer with `{command}`"
            )
    if not found:
        typer.echo("the swarm serves no model: start a peer with `splitnet peer MODEL`")
