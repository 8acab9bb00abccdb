"""`splitnet chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from splitnet.cli.arguments import (
    CodecName,
    Device,
    EnergySlowdown,
    InviteFile,
    Join,
    KeyFile,
    Lan,
    LocalBlocks,
    LocalWeights,
    ModelOrInvite,
    Prefer,
    Preferred,
    SwarmKeyFile,
    Tokenizer,
    TrustedPeers,
    model_or_invited,
    resolve_model,
)
from splitnet.cli.generate import AdapterFolder, MaxNewTokens, Seed, Speculate, Temperature, TopP, Wait
from splitnet.errors import SplitnetError
from splitnet.light_imports import import_models
from splitnet.printable import printable


def chat(
    model: ModelOrInvite = None,
    join: Join = None,
    lan: Lan = True,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    codec: CodecName = "auto",
    wait: Wait = 30.0,
    adapter: AdapterFolder = None,
    speculate: Speculate = None,
    device: Device = "auto",
    local_blocks: LocalBlocks = None,
    local_weights: LocalWeights = None,
    tokenizer: Tokenizer = None,
    prefer: Prefer = Preferred.latency,
    energy_slowdown: EnergySlowdown = None,
    key_file: KeyFile = None,
    swarm_key: SwarmKeyFile = None,
    trusted_peers: TrustedPeers = None,
    invite: InviteFile = None,
) -> None:
    """Chat with MODEL through the peers of a swarm; they keep the KV cache of the conversation."""
    checkpoint = resolve_model(model_or_invited(model, invite))

    import_models()
    from splitnet.cli.connection import Connection
    from splitnet.cli.generation import Client, Sampling

    connection = Connection(
        checkpoint,
        join or (),
        codec,
        key_file,
        wait,
        local_blocks,
        local_weights,
        lan,
        tokenizer,
        device,
        prefer=prefer.value,
        energy_slowdown=energy_slowdown,
        swarm_key=swarm_key,
        trusted_peers=trusted_peers,
        invite=invite,
    )
    client = Client.connect(connection, adapter, speculate)
    try:
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        start = [{"role": "system", "content": system}] if system else []
        messages = list(start)
        if sys.stdin.isatty():
            typer.secho("/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer", dim=True)
        with client.model.session():
            while (line := _read_line()) is not None:
                if line == "/reset":
                    messages = list(start)
                    continue
                messages.append({"role": "user", "content": line})
                try:
                    answer = client.answer(client.encode_chat(messages), sampling)
                except KeyboardInterrupt:
                    typer.echo("\n(stopped)", err=True)
                    messages.pop()
                    continue
                except SplitnetError as error:
                    if not sys.stdin.isatty():
                        raise
                    typer.secho(f"\nerror: {printable(str(error))}", err=True, fg="red")
                    typer.secho("the conversation is kept: say it again when that is done", err=True, dim=True)
                    messages.pop()
                    continue
                messages.append({"role": "assistant", "content": answer.text})
    finally:
        client.model.close()


def _read_line() -> str | None:
    """The next line that says something; None at the end."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            if terminal:
                typer.echo()
            return None
        if line == "/exit":
            return None
        if line:
            return line
