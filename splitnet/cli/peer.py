"""`splitnet peer`: serve blocks of a model. The only file outside `peers` that may import it."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer

from splitnet.cli.arguments import KeyFile, Model, parse_blocks, parse_bytes, resolve_model


def peer(
    model: Model,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="START:END", help="Blocks to serve; chosen by what the swarm lacks if not given."),
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="4GiB", help="Memory for blocks; as many as fit.")] = None,
    kv_memory: Annotated[str | None, typer.Option(metavar="1GiB", help="Memory for the KV caches of sessions.")] = None,
    join: Annotated[
        list[str] | None,
        typer.Option("--join", metavar="ADDR", help="Address of a swarm to join; without it a new one starts."),
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="tcp://HOST:PORT", help="Where to take activations; port 0 is any free one.")
    ] = "tcp://0.0.0.0:0",
    dht_listen: Annotated[
        str | None, typer.Option(metavar="/ip4/HOST/tcp/PORT", help="Where to take part in the DHT.")
    ] = None,
    public_host: Annotated[
        str | None, typer.Option(metavar="HOST", help="Name or address that others reach this machine by.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to compute with.")] = None,
    authorized_keys: Annotated[
        Path | None, typer.Option(help="File with the keys (see `splitnet key`) that may connect; anyone if not given.")
    ] = None,
    key_file: KeyFile = None,
    address_file: Annotated[
        Path | None, typer.Option(help="Write the address to join with here, once this peer serves.")
    ] = None,
) -> None:
    """Serve blocks of MODEL until interrupted."""
    # A stop that comes while libraries load must be as clean as one that comes later.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _interrupt(stop))
    wanted_blocks = parse_blocks(blocks) if blocks else None
    wanted_memory = parse_bytes(memory) if memory else None
    wanted_kv_memory = parse_bytes(kv_memory) if kv_memory else None
    checkpoint = resolve_model(model)

    import torch

    from peers.daemon import Peer, PeerOptions
    from peers.placing import SpanWish
    from splitnet.cli.progress import StageProgress

    if threads is not None:
        torch.set_num_threads(threads)
    options = PeerOptions(
        wish=SpanWish(wanted_blocks, wanted_memory),
        initial_peers=join or (),
        listen=listen,
        dht_listen=(dht_listen,) if dht_listen else None,
        public_host=public_host,
        device=device,
        dtype=dtype,
        kv_memory=wanted_kv_memory,
        authorized_keys=authorized_keys,
        key_file=key_file,
    )
    with StageProgress() as progress:
        serving = Peer.start(checkpoint, options, progress=progress.update)
    try:
        signal.signal(signal.SIGINT, lambda *_: stop.set())
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        span = serving.span
        typer.echo(
            f"serving blocks {span.start}..{span.end - 1} of {serving.checkpoint.name} "
            f"({str(span.dtype).removeprefix('torch.')} on {span.device}) at {serving.endpoint.address}"
        )
        typer.echo("others join with")
        for address in serving.addresses:
            typer.echo(f"  --join {address}")
        if address_file is not None:
            _write_atomically(address_file, serving.addresses[0] + "\n")
        while not stop.wait(1.0):  # a bounded wait lets signal handlers run
            pass
        typer.echo("leaving the swarm")
    finally:
        serving.close()


def _interrupt(stop: threading.Event) -> None:
    stop.set()
    raise KeyboardInterrupt


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
