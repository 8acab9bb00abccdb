"""`splitnet generate`: one answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from splitnet.cli.arguments import ModelOrInvite, connects, require, resolve_model
from splitnet.cli.invite import model_or_invited
from splitnet.errors import AdapterError, SplitnetError
from splitnet.import_shims import import_models
from splitnet.session.options import ConnectionOptions

ANSWER = "Answer"

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.", rich_help_panel=ANSWER)]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.", rich_help_panel=ANSWER)]
TopP = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Sample from the likeliest tokens of this total probability.", rich_help_panel=ANSWER
    ),
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=ANSWER)]


def _has_adapter(folder: Path | None) -> Path | None:
    """Refuses a folder without an adapter before anything slow begins."""
    if folder is not None:
        require("tune", "--adapter")
        if not (folder / "adapter_config.json").is_file():
            raise AdapterError(f"there is no adapter in {folder}: give the folder that holds adapter_config.json")
    return folder


AdapterFolder = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        callback=_has_adapter,
        help="Folder of an adapter in PEFT's format, such as LoRA or a prompt.",
    ),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        metavar="HOW",
        help="Draft tokens, which peers verify together: prompt-lookup, or a small model with the same tokenizer.",
        rich_help_panel=ANSWER,
    ),
]


@connects()
def generate(
    model: ModelOrInvite = None,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False)] = None,
    *,
    connecting: ConnectionOptions,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    adapter: AdapterFolder = None,
    speculate: Speculate = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="With the model's chat template, or the bare text.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print route, speed and bytes, to stderr.")] = False,
) -> None:
    """Generate text after PROMPT through the peers of a swarm, streaming to stdout."""
    if prompt is None and connecting.invite is not None:
        model, prompt = None, model  # the only argument
    if prompt is None:
        raise typer.BadParameter("give MODEL and PROMPT; MODEL may be left out with --invite")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise SplitnetError("the prompt is empty: give some text")
    checkpoint = resolve_model(model_or_invited(model, connecting.invite))

    import_models()
    from splitnet.cli.connection import Connection
    from splitnet.cli.generation import Client, Sampling, print_summary

    connection = Connection(checkpoint, connecting)
    client = Client.connect(connection, adapter, speculate)
    try:
        ids = client.encode_prompt(text, chat=chat, system=system)
        with client.model.session() as cache:
            answer = client.answer(ids, Sampling(max_new_tokens, temperature, top_p, seed))
            if stats and cache.session is not None:
                print_summary(answer, cache.session)
    finally:
        client.model.close()
