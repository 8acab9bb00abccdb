"""The command `splitnet`: its subcommands, and how errors end it."""

from __future__ import annotations

import io
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

import splitnet
from splitnet.cli.bench import bench
from splitnet.cli.chat import chat
from splitnet.cli.configuration import CONFIG_VARIABLE, ConfigurableGroup, read_configuration
from splitnet.cli.demo import demo
from splitnet.cli.dht import dht
from splitnet.cli.doctor import doctor
from splitnet.cli.generate import generate
from splitnet.cli.invite import invite
from splitnet.cli.key import key
from splitnet.cli.logs import LogFormat, set_up, tell
from splitnet.cli.peer import peer
from splitnet.cli.plan import plan
from splitnet.cli.serve import serve
from splitnet.cli.simulate import simulate
from splitnet.cli.status import status
from splitnet.cli.tune import tune
from splitnet.errors import DirectoryError, NotAuthorized, PeerLost, SplitnetError
from splitnet.light_imports import claim_process
from splitnet.signals import ENDING

app = typer.Typer(
    name="splitnet",
    cls=ConfigurableGroup,
    help="Run a model that is too big for any one device across many.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (peer, generate, chat, serve, tune, status, doctor, bench, plan, dht, key, invite, demo, simulate):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"splitnet {splitnet.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar=CONFIG_VARIABLE,
            callback=read_configuration,
            is_eager=True,
            help="Take options from this TOML file, see docs/configuration.md.",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Write the log as text, or as a JSON object per line, see docs/metrics.md.")
    ] = LogFormat.text,
) -> None:
    """Options before the command."""
    set_up(log_format, logging.INFO if verbose else logging.WARNING)


_DOCTOR_KNOWS = (DirectoryError, NotAuthorized, PeerLost)
"""Errors that a check of `splitnet doctor` explains further."""


def main() -> None:
    """Runs the command line; an error that the user can act on is one sentence and exit code 1."""
    claim_process()
    if sys.platform == "win32":  # whose pipes are not UTF-8
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8")
    # Or the process would end without what it does at its end: leave the swarm, and stop its children.
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit_cleanly)
    try:
        app()
    except SplitnetError as error:
        text = str(error)
        if isinstance(error, _DOCTOR_KNOWS):
            text = f"{text.rstrip('.')}; `splitnet doctor --join ADDR` looks for the cause"
        tell(logging.ERROR, text)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _exit_cleanly(number: int, frame: object) -> None:
    sys.exit(128 + number)
