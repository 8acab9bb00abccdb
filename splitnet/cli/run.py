"""`splitnet run`: one command that joins or starts the swarm of a model, serves missing blocks, and chats."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from splitnet.cli.arguments import CONNECTING, ModelOrInvite, command_arguments, connects
from splitnet.cli.generate import MaxNewTokens, Stats, Temperature, chat, connection_to, generate
from splitnet.cli.model_list import model_list
from splitnet.cli.peer import in_memory, what_fits
from splitnet.cli.peer_process import PeerProcess
from splitnet.errors import NoSwarm, SplitnetError
from splitnet.limits import parse_bytes
from splitnet.session.options import ConnectionOptions

if TYPE_CHECKING:
    from splitnet.checkpoint.checkpoint import Checkpoint
    from splitnet.cli.connection import ModelConnection

Hole = tuple[int, int]

START_TIMEOUT_S = 1800.0  # the peer may have to load its weights from the hub
LOOK_S = 1.0  # interval between two looks at the swarm while blocks are missing
FOR_PEER = ("initial_peers", "device", "swarm_key", "invite", "model_id")
"""The options of `run` that its peer shares."""


@connects(without=("trusted_peers",))  # the peer of this command has a new key, which no list contains
def run(
    model: ModelOrInvite = None,
    prompt: Annotated[
        str | None, typer.Argument(help="Answer only this prompt; by default, chat.", show_default=False)
    ] = None,
    *,
    connecting: ConnectionOptions,
    serve: Annotated[
        bool | None,
        in_memory(
            "--serve/--no-serve",
            help="Whether this machine serves blocks. By default it asks if blocks have no peer.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[str | None, in_memory(metavar="4GiB", help="Memory for the blocks that are served here.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    stats: Stats = False,
) -> None:
    """Chat with MODEL over the machines of this network; the same command on each machine adds its memory.

    Without MODEL, list models that are here or at the hub, with the number of machines that they need.
    """
    if memory is not None:
        parse_bytes(memory)
        if serve is False:
            raise typer.BadParameter("--memory is for blocks that are served here: leave out --no-serve")
    if model is None and connecting.invite is None:
        _list_models(memory)
    connection = connection_to(model, connecting)
    checkpoint = connection.checkpoint()
    missing = missing_blocks(connection, checkpoint)
    with tempfile.TemporaryDirectory(prefix="splitnet-run-") as folder:
        if serve or (missing and _may_serve(connection, checkpoint, missing, memory, serve)):
            # An invitation is for one person, so other machines need their own.
            words = None if connecting.invite else ["splitnet", "run", str(model)]
            with _served(connection, memory, Path(folder), words) as address:
                joined = replace(connecting, initial_peers=[address])
                _answer(connection.model, joined, prompt, max_new_tokens, temperature, stats)
        else:
            _answer(connection.model, connecting, prompt, max_new_tokens, temperature, stats)


def _list_models(memory: str | None) -> NoReturn:
    from scheduler.placement import BLOCKS_SHARE
    from splitnet.quant.device import free_memory

    here = parse_bytes(memory) if memory else int(free_memory("cpu") * BLOCKS_SHARE)
    typer.echo(model_list(here))
    typer.echo(f"machines: how many such as this one, with {here / 2**30:.1f} GiB for blocks, hold all blocks together")
    raise SplitnetError("name a model: splitnet run MODEL, on as many machines")


def missing_blocks(connection: ModelConnection, checkpoint: Checkpoint) -> list[Hole]:
    """The blocks `[start, end)` of the model that no peer serves: all if there is no swarm.

    Raises the errors of `ModelConnection.facts_of`, except NoSwarm if the facts of the model are known here.
    """
    from splitnet.swarm.swarm import Overview

    facts = connection.facts_of(checkpoint)
    try:
        with connection.swarm_of(facts) as swarm:
            return list(Overview.of(swarm, swarm.peers(fresh=True)).missing)
    except NoSwarm:
        return [(0, facts.num_blocks)]


def _may_serve(
    connection: ModelConnection, checkpoint: Checkpoint, missing: list[Hole], memory: str | None, serve: bool | None
) -> bool:
    """Shows what fits into the memory of this machine, and asks whether to serve it."""
    from splitnet.swarm.plan import blocks_text

    what = f"blocks {', '.join(blocks_text(*hole) for hole in missing)} of {checkpoint.name} are served by nobody"
    if serve is False:
        raise SplitnetError(f"{what}: leave out --no-serve, or run the same command on another machine")
    fits = what_fits(checkpoint, memory, connection.options.device)
    if not sys.stdin.isatty():
        raise SplitnetError(f"{what}, and {fits}: give --serve, or start another peer")
    typer.echo(f"{what}; {fits}", err=True)
    if not typer.confirm("serve them here?", default=True, err=True):
        raise SplitnetError(f"{what}: run the same command on a machine that serves them")
    return True


@contextmanager
def _served(connection: ModelConnection, memory: str | None, folder: Path, words: list[str] | None) -> Generator[str]:
    """Runs a peer until the end of the `with`. Waits until no block is missing, and yields the peer's address.

    words: the beginning of the command for other machines; None: that command is not printed.
    """
    requested = connection.requested
    shared = {name: getattr(requested, name) for name in FOR_PEER}
    arguments = [connection.model, *command_arguments(ConnectionOptions(**shared))]
    if memory is not None:
        arguments += ["--memory", memory]
    if not requested.lan:
        arguments.append("--no-lan")
    peer = PeerProcess("the peer", arguments, folder)
    try:
        typer.secho("starting a peer, which loads and measures its blocks ...", err=True)
        address = peer.await_address(START_TIMEOUT_S)
        _wait_for_others(replace(connection, requested=replace(requested, initial_peers=[address])), peer, words)
        yield address
    finally:
        typer.secho("the peer leaves: its sessions move to other peers ...", err=True)
        peer.terminate()
        peer.close()


def _wait_for_others(connection: ModelConnection, peer: PeerProcess, words: list[str] | None) -> None:
    """Prints the command for other machines, which begins with `words`, and waits until each block has a peer.

    Raises SplitnetError if the own peer has ended.
    """
    from splitnet.cli.daemon import quoted
    from splitnet.swarm.plan import blocks_text
    from splitnet.swarm.swarm import Overview
    from splitnet.transport.addresses import is_reachable, peer_address

    shown: tuple[Hole, ...] | None = None
    with connection.swarm(connection.checkpoint()) as swarm:
        while True:
            overview = Overview.of(swarm, swarm.peers(fresh=True))
            peer.check_running()
            if overview.records and overview.missing != shown:
                if shown is None and words:
                    reachable = [record for record in overview.records if is_reachable(record.address)]
                    first = (reachable or overview.records)[0]
                    key = connection.requested.swarm_key
                    command = shlex.join([*words, *(["--swarm-key", str(key)] if key else [])])
                    typer.echo(f"on other machines: {command} --join {quoted(peer_address(first.endpoint))}", err=True)
                shown = overview.missing
                if shown:
                    holes = ", ".join(blocks_text(*hole) for hole in shown)
                    typer.echo(f"waiting for peers with blocks {holes} ...", err=True)
            if shown == ():
                return
            time.sleep(LOOK_S)


def _answer(
    model: str,
    connecting: ConnectionOptions,
    prompt: str | None,
    max_new_tokens: int | None,
    temperature: float,
    stats: bool,
) -> None:
    names = {field.name for field in fields(connecting)} & CONNECTING.keys()
    options = {name: getattr(connecting, name) for name in names}
    options |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "stats": stats}
    if prompt is None:
        chat(model=model, **options)
    else:
        generate(model=model, prompt=prompt, **options)
