"""`splitnet generate`: one answer."""

from __future__ import annotations

import sys
from pathlib import Path
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
from splitnet.errors import SplitnetError
from splitnet.light_imports import import_models

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this total probability.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Wait = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", help="Time to wait for blocks that suddenly nobody serves."),
]
AdapterFolder = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="Folder of an adapter in PEFT's format, such as LoRA or a prompt."),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        metavar="HOW",
        help="Draft tokens, which peers verify together: prompt-lookup, or a small model with the same tokenizer.",
    ),
]


def generate(
    model: ModelOrInvite = None,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False)] = None,
    join: Join = None,
    lan: Lan = True,
    max_new_tokens: MaxNewTokens = 256,
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
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="With the model's chat template, or the bare text.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print route, speed and bytes, to stderr.")] = False,
    key_file: KeyFile = None,
    swarm_key: SwarmKeyFile = None,
    trusted_peers: TrustedPeers = None,
    invite: InviteFile = None,
) -> None:
    """Generate text after PROMPT through the peers of a swarm, streaming to stdout."""
    if prompt is None and invite is not None:
        model, prompt = None, model  # the only argument
    if prompt is None:
        raise typer.BadParameter("give MODEL and PROMPT; MODEL may be left out with --invite")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise SplitnetError("the prompt is empty: give some text")
    checkpoint = resolve_model(model_or_invited(model, invite))

    import_models()
    from splitnet.cli.connection import Connection
    from splitnet.cli.generation import Client, Sampling, print_summary

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
        ids = client.encode_prompt(text, chat=chat, system=system)
        with client.model.session() as cache:
            answer = client.answer(ids, Sampling(max_new_tokens, temperature, top_p, seed))
            if stats and cache.session is not None:
                print_summary(answer, cache.session)
    finally:
        client.model.close()
