"""`splitnet key`: who this machine is to private swarms."""

from __future__ import annotations

import typer

from splitnet.cli.arguments import KeyFile


def key(key_file: KeyFile = None) -> None:
    """Print the public key of this machine, for the --authorized-keys file of a private swarm."""
    from splitnet.net.identity import Identity

    typer.echo(Identity.load_or_create(key_file).public.text)
