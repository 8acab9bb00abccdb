"""`splitnet peer`: serve blocks of a model. Within the package `splitnet`, only this file may import `peers`."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scheduler.facts import MAX_WATTS
from splitnet import foreign_modules
from splitnet.cli.arguments import (
    Device,
    InviteFile,
    JoinIfAny,
    ModelId,
    ModelOrInvite,
    RelayPort,
    RelayRate,
    SwarmKeyFile,
    in_computing,
    in_keys,
    in_network,
    in_swarm,
    one_identity,
    option_group,
    parse_blocks,
    parse_host_port,
    parse_relay_rate,
    resolve_model,
)
from splitnet.cli.daemon import StopSignals, forget_address, published_address
from splitnet.cli.invite import Invite, model_name, with_invitation
from splitnet.errors import SplitnetError
from splitnet.import_shims import import_models
from splitnet.limits import allow_open_files, parse_bytes
from splitnet.logs import write_user_message
from splitnet.paths import lines_of
from splitnet.session.options import ConnectionOptions
from splitnet.transport.addresses import Reach, check_listen_address, hosts_of, is_reachable
from splitnet.wire.endpoints import is_global
from splitnet.wire.kv_forms import KV_BITS

if TYPE_CHECKING:
    from peers.running_peer import RunningPeer
    from splitnet.checkpoint.checkpoint import Checkpoint


in_memory = option_group("Blocks and memory")
in_sharing = option_group("Weights for others")


Dtype = StrEnum("Dtype", ["float32", "bfloat16", "float16"])  # Types that blocks can compute in
KVKind = StrEnum("KVKind", list(KV_BITS))
AS_COMPUTED = KVKind("auto")
# Formats of the weights of linear layers
WeightKind = StrEnum("WeightKind", ["auto", "float32", "bfloat16", "float16", "int8", "int4"])


def peer(
    model: ModelOrInvite = None,
    blocks: Annotated[
        str | None, in_memory(metavar="START:END", help="Blocks to serve. By default the peer chooses blocks.")
    ] = None,
    memory: Annotated[str | None, in_memory(metavar="4GiB", help="Memory for blocks; limits their number.")] = None,
    kv_memory: Annotated[str | None, in_memory(metavar="1GiB", help="Memory for the KV caches of sessions.")] = None,
    kv: Annotated[
        KVKind,
        in_memory(
            help="Format of KV caches. auto: the type that blocks compute in. int8-int4: keys in 8 bits, values in "
            "4 bits. With fewer bits, longer texts fit. States, latents and indexer keys keep the computed type."
        ),
    ] = AS_COMPUTED,
    prefix_store: Annotated[
        str | None,
        in_memory(
            metavar="off|memory|SIZE",
            help="Store of prompts' KV caches, for later prompts with the same beginning. off: no store. memory: in "
            "free KV memory. SIZE: also on disk, up to SIZE. Default: a tenth of the free disk, at most 8 GiB.",
        ),
    ] = None,
    any_model: Annotated[
        bool,
        in_memory(
            "--any-model",
            help="Serve the model with the highest demand, first MODEL if given. Leave a model without demand.",
        ),
    ] = False,
    allow: Annotated[
        Path | None,
        in_memory(
            metavar="FILE",
            help="With --any-model: file of allowed models, one per line. By default all models of the swarm.",
        ),
    ] = None,
    training_memory: Annotated[
        str | None, in_memory(metavar="1GiB", help="Memory reserved for training clients. One key gets at most half.")
    ] = None,
    vision: Annotated[
        bool, in_memory("--vision", help="Also read images for clients that do not load the model's vision tower.")
    ] = False,
    join: JoinIfAny = None,
    lan: Annotated[
        bool | None,
        in_swarm.shared(
            "--lan/--no-lan",
            help="Find peers on this network and be found. Default: on, except with --join or a loopback --listen.",
            show_default=False,
        ),
    ] = None,
    listen: Annotated[
        str, in_network(metavar="tcp://HOST:PORT", help="Address that receives activations. Port 0: any free port.")
    ] = "tcp://0.0.0.0:0",
    dht_listen: Annotated[
        str | None, in_network(metavar="/ip4/HOST/tcp/PORT", help="Address of this peer's node of the DHT.")
    ] = None,
    public_host: Annotated[
        str | None,
        in_network(
            metavar="HOST[:PORT]",
            help="Name and port by which others reach this machine, if they differ from --listen (NAT, containers).",
        ),
    ] = None,
    reach: Annotated[
        Reach,
        in_network(
            help="How others connect to this peer. direct: to its address. helpers: through helpers. auto: directly "
            "with --public-host; otherwise other peers test the address, and helpers are used if the test fails."
        ),
    ] = Reach.auto,
    port_mapping: Annotated[
        bool, in_network(help="Ask the router for a port (NAT-PMP, UPnP) if other peers cannot connect without one.")
    ] = True,
    relay_port: RelayPort = None,
    relay_rate: RelayRate = None,
    device: Device = "auto",
    dtype: Annotated[
        Dtype | None, in_computing(help="Type that blocks compute in. By default the checkpoint's type.")
    ] = None,
    weights: Annotated[
        WeightKind,
        in_computing(help="Format of the weights. auto: as stored, but float16 for float32 weights on x86 CPUs."),
    ] = WeightKind.auto,
    threads: Annotated[int | None, in_computing(min=1, help="CPU threads to compute with.")] = None,
    authorized_keys: Annotated[
        Path | None,
        in_keys(
            help="File of the keys that may connect (see `splitnet key`), with their options. By default all keys may."
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        in_keys(callback=one_identity, help="File with the key of this peer. By default a new key at each start."),
    ] = None,
    swarm_key: SwarmKeyFile = None,
    invite: InviteFile = None,
    model_id: ModelId = None,
    share_weights: Annotated[
        bool | None,
        in_sharing(
            "--share-weights/--no-share-weights",
            help="Send weights to permitted keys. Default: on in closed swarms or if --authorized-keys lacks `anyone`.",
            show_default=False,
        ),
    ] = None,
    share_rate: Annotated[
        str | None,
        in_sharing(metavar="64MiB", help="Total bytes of weights per second; a quarter while sessions run."),
    ] = None,
    compress_for: Annotated[
        Path | None,
        in_sharing(
            metavar="FILE",
            help="File of the keys for which this peer compresses its blocks (`splitnet compress --join`), in the "
            "format of --authorized-keys. By default no key.",
        ),
    ] = None,
    metrics_port: Annotated[
        str | None,
        in_network(
            metavar="[HOST:]PORT", help="Port of the Prometheus metrics (path /metrics). By default on 127.0.0.1."
        ),
    ] = None,
    watts: Annotated[
        float | None,
        in_computing(
            metavar="WATTS",
            help="Power of the device while it computes. By default the device's counters give it (docs/energy.md).",
        ),
    ] = None,
    drain_s: Annotated[
        float, typer.Option("--drain", min=0, metavar="SECONDS", help="Longest time to hand over sessions at the end.")
    ] = 15.0,
    address_file: Annotated[
        Path | None, in_swarm(help="The peer writes the address for --join to this file once it serves.")
    ] = None,
    join_file: Annotated[
        Path | None, in_swarm(help="Join through the peer with this --address-file; wait until the file exists.")
    ] = None,
) -> None:
    """Serve blocks of MODEL until interrupted (SIGINT or SIGTERM). Then running sessions move to other peers."""
    for sentence in foreign_modules():
        raise SplitnetError(sentence)
    if blocks and memory:
        raise typer.BadParameter("give --blocks or --memory, not both")
    if any_model and (blocks or model_id):
        raise typer.BadParameter("--any-model chooses the model and its blocks: leave out --blocks and --model-id")
    if any_model and vision:
        raise typer.BadParameter("--vision is for one model: leave out --any-model")
    if allow is not None and not any_model:
        raise typer.BadParameter("--allow is for --any-model only: add --any-model, or leave out --allow")
    wanted_blocks = parse_blocks(blocks) if blocks else None
    sizes = [parse_bytes(text) if text else None for text in (memory, kv_memory, training_memory, share_rate)]
    wanted_memory, wanted_kv_memory, wanted_training_memory, wanted_share = sizes
    wanted_disk = parse_bytes(prefix_store) if prefix_store not in (None, "off", "memory") else None
    wanted_metrics = parse_host_port(metrics_port) if metrics_port else None
    if watts is not None and not 0 < watts <= MAX_WATTS:
        raise SplitnetError(f"--watts {watts:g} is not a valid power: give more than 0 and at most {MAX_WATTS:g}")
    wanted_rate = parse_relay_rate(relay_rate, relay_port)
    if wanted_share == 0:
        raise typer.BadParameter("--share-rate 0 sends no weights: give a higher rate, or --no-share-weights")
    if wanted_share is not None and share_weights is False:
        raise typer.BadParameter("--share-rate has no effect with --no-share-weights: leave out one of the two")
    check_listen_address(listen)
    if relay_port:
        check_listen_address(f"{listen.rpartition(':')[0]}:{relay_port}")
    forget_address(address_file)
    allowed = read_models(allow) if allow is not None else []
    chooses = any_model and model is None  # the peer also chooses its first model
    checkpoint = None if chooses else resolve_model(model_name(model, invite))
    connecting = ConnectionOptions(initial_peers=join or (), swarm_key=swarm_key, invite=invite, model_id=model_id)
    given = with_invitation(connecting)

    stop = StopSignals()
    import_models(signals_raise=False)
    import torch

    from peers.peer_metrics import MetricsServer, registry_of
    from peers.peer_options import PeerOptions, SpanWish
    from peers.running_peer import RunningPeer
    from splitnet.blocks.chosen_device import find_device
    from splitnet.cli.stage_progress import StageProgress
    from splitnet.directory.hivemind_node import have_hivemind
    from splitnet.paths import cache_folder
    from splitnet.quant.device import keep_freed_memory

    closed = given.load_swarm_key()
    if invite and authorized_keys is None:
        authorized_keys = Invite.load(invite).list_of_keys(invite)
        if authorized_keys:
            typer.echo(
                f"{authorized_keys} lists clients with priority. Only these clients may connect, unless the file has a "
                "line `anyone`"
            )
    if closed is not None and authorized_keys is None:
        write_user_message(
            logging.WARNING,
            "anyone who knows this peer's address may use the peer: give --authorized-keys to restrict access",
        )
    if lan is None:
        lan = is_reachable(listen) and not (given.initial_peers or join_file) and closed is None
        if lan and not have_hivemind():
            lan = False
            write_user_message(
                logging.WARNING, "hivemind is not installed, so others cannot find this peer: give its address to them"
            )
    if wanted_share is not None and not share_weights and authorized_keys is None and closed is None:
        raise typer.BadParameter("--share-rate needs --share-weights if --authorized-keys is not given")
    keep_freed_memory()
    allow_open_files()
    computes_on = find_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    options = PeerOptions(
        wish=SpanWish(wanted_blocks, wanted_memory),
        initial_peers=given.initial_peers,
        join_file=join_file,
        lan=is_reachable(listen) and lan,
        listen=listen,
        dht_listen=(dht_listen,) if dht_listen else None,
        public_host=public_host,
        device=computes_on.device,
        dtype=str(dtype) if dtype else None,
        weights=str(weights),
        kv=str(kv),
        vision=vision,
        kv_memory=wanted_kv_memory,
        training_memory=wanted_training_memory,
        prefixes=prefix_store != "off",
        prefix_folder=cache_folder() / "prefixes" if prefix_store not in ("off", "memory") else None,
        prefix_disk=wanted_disk,
        authorized_keys=authorized_keys,
        key_file=key_file,
        watts=watts,
        identity=given.identity,
        swarm_key=closed,
        reach=reach,
        port_mapping=port_mapping,
        relay_port=relay_port,
        relay_rate=wanted_rate,
        share_weights=share_weights,
        share_rate=wanted_share,
        compress_for=compress_for,
        compress_folder=cache_folder() / "compression",
        model_id=given.model_id,
        invited=model is None,
        any_model=allowed if any_model else None,
        speeds_file=cache_folder() / "speeds.json",
    )
    metrics = MetricsServer(*wanted_metrics) if wanted_metrics else None
    with StageProgress() as progress:

        def report(stage: str, done: int, total: int) -> None:
            stop.raise_if_stopped()
            progress.update(stage, done, total)

        serving = RunningPeer.start(checkpoint, options, progress=report)
    try:
        # Loaded objects stay in memory, so the garbage collector need not traverse these objects between two tokens.
        gc.collect()
        gc.freeze()
        typer.echo(f"computes on {computes_on}")
        typer.echo(_what_it_serves(serving))
        if weights is WeightKind.auto and (other_weights := _other_weights(serving)):
            typer.echo(other_weights)
        if kv is not AS_COMPUTED and serving.span.kv != kv:
            typer.echo(f"--kv has no effect: {_why_kv_has_no_effect(serving)}")
        if vision:
            typer.echo("reads images for clients with `--vision peer`")
        if serving.counters.energy.origin:
            typer.echo(f"power: {serving.counters.energy.origin}")
        if serving.paths.relay_port:
            typer.echo(f"this peer relays for peers behind routers, on port {serving.paths.relay_port}")
        if metrics is not None:
            metrics.serve(registry_of(serving))
            typer.echo(f"metrics at {metrics.url}")
        with published_address([*serving.directory.addresses, serving.join_address], address_file):
            if elsewhere := join_advice(serving.endpoint.address, given.initial_peers, reach):
                typer.echo(elsewhere)
            stop.wait()
            typer.echo("leaving the swarm: running sessions move to other peers; interrupt again to leave at once")
            with suppress(KeyboardInterrupt):
                serving.drain(drain_s)
    finally:
        serving.close()
        if metrics is not None:
            metrics.close()


def what_fits(checkpoint: Checkpoint, memory: str | None, device: str) -> str:
    """A sentence about the blocks that a peer with this memory would serve here, and their speed.

    Raises OutOfMemory: no block fits; SplitnetError: `memory` is no amount.
    """
    from peers.peer_options import SpanWish
    from peers.relocation import expected_block_ms, fitting_blocks
    from splitnet.blocks.block_sizes import block_bytes

    weights = str(WeightKind.auto)
    wish = SpanWish(None, parse_bytes(memory) if memory else None)
    fitting = fitting_blocks(checkpoint, wish, device, None, weights)
    gib = fitting * block_bytes(checkpoint, None, weights, device) / 2**30
    token_s = checkpoint.num_blocks * expected_block_ms(checkpoint, device, None, weights) / 1000
    return (
        f"this machine can serve {fitting} of {checkpoint.num_blocks} blocks in {gib:.1f} GiB of memory; machines like "
        f"this one generate at most {1 / token_s:.0f} tokens/s"
    )


def read_models(file: Path) -> list[str]:
    """The models in a file, one per line. Raises SplitnetError if the file names no model, or a line is invalid."""
    try:
        lines = list(lines_of(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise SplitnetError(f"{file} cannot be read ({error}): give --allow a file with one model per line") from None
    for number, line in lines:
        if not line.isprintable() or (re.search(r"[\s*?]", line) and not Path(line).exists()):
            raise SplitnetError(f"{file}, line {number}: {line!r} is not a model: write one folder, file or hub id")
    models = [resolve_model(line) for _, line in lines]
    if not models:
        raise SplitnetError(f"{file} names no model: write one model per line, or leave out --allow")
    return models


def join_advice(address: str, joined: Sequence[str], reach: Reach) -> str | None:
    """Advice for machines in other networks that cannot reach this peer's address; None: no advice is needed."""
    if not is_reachable(address) or (is_global(address) and reach is not Reach.helpers):
        return None
    if reached := [one for one in joined if any(is_global(f"tcp://{host}:1") for host in hosts_of([one]))]:
        return "\n  --join ".join(("machines in other networks join with", *reached))
    fix = "--join a peer that they can reach, or forward a port and give --public-host"
    return f"machines in other networks cannot reach these addresses: {fix}"


def _what_it_serves(peer: RunningPeer) -> str:
    # In a separate function, because a variable of the caller would keep a span in memory after the peer has moved.
    span = peer.span
    computes = str(span.dtype).removeprefix("torch.")
    exactly = "exactly " if span.weights.exact else ""
    held = "" if span.weights.kind == computes else f" with weights {exactly}as {span.weights.kind}"
    kv = "" if span.kv == AS_COMPUTED else f", KV caches as {span.kv}"
    return (
        f"serving blocks {span.start}..{span.end - 1} of {peer.checkpoint.name} "
        f"({computes}{held}{kv} on {span.device}) at {peer.endpoint.address}"
    )


def _why_kv_has_no_effect(peer: RunningPeer) -> str:
    config, computes = peer.checkpoint.config, peer.span.dtype.itemsize
    if getattr(config, "kv_lora_rank", None):
        return f"the family {config.model_type!r} caches latents, and latents keep the type that blocks compute in"
    if computes == 2:
        return "this format saves no memory"
    return f"the family {config.model_type!r} caches only states, and states keep the type that blocks compute in"


def _other_weights(peer: RunningPeer) -> str | None:
    """A sentence about other formats of the weights; None: no other format has a known advantage."""
    from splitnet.quant.choose import STORED
    from splitnet.quant.native import has_integer_kernels

    span = peer.span
    held = span.weights
    if span.device.type != "cpu" or not has_integer_kernels() or held.kind.startswith(STORED):
        return None
    exact = "; --weights float32 is slower, but exact" if "/" in held.description else ""
    return f"--weights int8 is faster, but less exact{exact} (docs/weights.md)"
