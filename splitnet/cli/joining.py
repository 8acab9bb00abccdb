"""How a daemon tells where others join: on stdout, and in a file that is there while it serves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from splitnet.errors import SplitnetError


def tell_addresses(addresses: Sequence[str]) -> None:
    """Prints them as options of the commands that join."""
    typer.echo("others join with")
    for address in addresses:
        typer.echo(f"  --join {address}")


def write_address(path: Path | None, address: str) -> None:
    """Puts the file there at once with all of its text; None: there is none to write."""
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(address + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise SplitnetError(f"cannot write the address to {path} ({error.strerror}): give another file") from None


def forget_address(path: Path | None) -> None:
    """Removes the file, so that it is there only while its daemon serves."""
    if path is None:
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SplitnetError(f"cannot replace {path} ({error.strerror}): give another --address-file") from None
