"""`splitnet key`: who this machine is to private swarms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitnet.cli.arguments import KeyFile


def key(
    key_file: KeyFile = None,
    swarm_key: Annotated[
        Path | None, typer.Option(help="Make a key that closes a swarm in this new file, for its peers and clients.")
    ] = None,
) -> None:
    """Print the public key of this machine, for the --authorized-keys file of a private swarm."""
    from splitnet.net.identity import Identity

    if swarm_key is not None:
        from splitnet.net.swarm_key import SwarmKey

        SwarmKey.create(swarm_key)
        typer.echo(f"{swarm_key} holds a new swarm key: give it to members alone, as `splitnet invite` does")
        return
    typer.echo(Identity.load_or_create(key_file).public.text)
