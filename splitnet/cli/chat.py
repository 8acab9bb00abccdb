"""`splitnet chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from splitnet.cli.arguments import ModelOrInvite, connects, resolve_model
from splitnet.cli.generate import AdapterFolder, MaxNewTokens, Seed, Speculate, Temperature, TopP
from splitnet.cli.invite import model_or_invited
from splitnet.errors import SplitnetError
from splitnet.import_shims import import_models
from splitnet.logs import printable
from splitnet.session.options import ConnectionOptions


@connects()
def chat(
    model: ModelOrInvite = None,
    *,
    connecting: ConnectionOptions,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    adapter: AdapterFolder = None,
    speculate: Speculate = None,
) -> None:
    """Chat with MODEL through the peers of a swarm; they keep the KV cache of the conversation."""
    checkpoint = resolve_model(model_or_invited(model, connecting.invite))

    import_models()
    from splitnet.cli.connection import Connection
    from splitnet.cli.generation import Client, Sampling

    connection = Connection(checkpoint, connecting)
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
