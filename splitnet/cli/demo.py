"""`splitnet demo`: three peer daemons on this machine, and one answer through them, or an API in front of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from splitnet.cli.arguments import CodecName, Device, resolve_model
from splitnet.cli.extras import require
from splitnet.cli.serve import serve as run_server
from splitnet.light_imports import import_models
from splitnet.model.demo import DEMO_NAME
from splitnet.net.addresses import listen_at

if TYPE_CHECKING:
    from splitnet.cli.local_swarm import LocalSwarm

PROMPT = "Explain in three sentences how bees find their way home."


def demo(
    model: Annotated[
        str, typer.Argument(help="Hugging Face id, checkpoint folder or GGUF file instead of SmolLM2-135M-Instruct.")
    ] = DEMO_NAME,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = PROMPT,
    peers: Annotated[int, typer.Option(min=1, max=16, help="How many daemons to start.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    codec: CodecName = "int8",
    device: Device = "auto",
    serve: Annotated[
        bool, typer.Option("--serve", help="Do not ask: run `splitnet serve` in front of the peers until interrupted.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --serve; 0 is any free one.")] = 8000,
) -> None:
    """Start peers as separate processes, each with its own blocks only, and generate an answer through them."""
    if serve:
        require("serve", "--serve")
        listen_at("127.0.0.1", port).close()  # to tell it now
    checkpoint = resolve_model(model)
    typer.secho(f"starting {peers} peers, which load and measure their blocks ...", err=True)

    from splitnet.cli.local_swarm import ONE_THREAD, LocalSwarm

    with LocalSwarm(checkpoint, peers, (*ONE_THREAD, "--device", device)) as swarm:
        for index, blocks in enumerate(swarm.spans):
            typer.secho(f"  daemon {index + 1}: blocks {blocks[0]}..{blocks[1] - 1}", err=True)
        if serve:
            address = swarm.wait()
            typer.secho(f"others reach this swarm with --join {address}", err=True)
            run_server(model=checkpoint, join=[address], port=port, codec=codec, device=device)
        else:
            _ask(checkpoint, swarm, prompt, max_new_tokens, codec, device)
    typer.secho("all daemons have left; nothing is running any more", err=True)


def _ask(checkpoint: str, swarm: LocalSwarm, prompt: str, max_new_tokens: int, codec: str, device: str) -> None:
    # The daemons load while this process does.
    import_models()
    from splitnet.cli.connection import Connection
    from splitnet.cli.generation import Client, Sampling, print_summary

    client = Client.connect(Connection(checkpoint, [swarm.wait()], codec, device=device))
    try:
        typer.secho(f"\n> {prompt}\n", bold=True)
        ids = client.encode_prompt(prompt, chat=None)
        with client.model.session() as cache:
            answer = client.answer(ids, Sampling(max_new_tokens, 0.0, 1.0, None))
            typer.echo()
            if cache.session is not None:
                print_summary(answer, cache.session)
    finally:
        client.model.close()
