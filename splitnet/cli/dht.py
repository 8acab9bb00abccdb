"""`splitnet dht`: a node of the DHT that serves no blocks, as the fixed address of a swarm."""

from __future__ import annotations

import ipaddress
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from splitnet.cli.arguments import RelayPort, RelayRate, checked_addresses, parse_relay_rate
from splitnet.cli.daemon import StopSignals, forget_address, published_address
from splitnet.errors import KeyFileError, SplitnetError

_FIRST_BYTE = b"\x08"  # The first byte of a private key in libp2p's format: the tag of the field with the key's type


def _checked_multiaddrs(addresses: list[str] | None) -> list[str] | None:
    for address in checked_addresses(addresses) or ():
        if address.startswith("tcp://"):
            raise SplitnetError(f"{address} is not the address of a node of the DHT: give an address /ip4/...")
    return addresses


def dht(
    listen: Annotated[
        str,
        typer.Option(
            metavar="/ip4/HOST/tcp/PORT", help="Address to listen at; with a fixed port, the address stays valid."
        ),
    ] = "/ip4/0.0.0.0/tcp/31330",
    public_host: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Name and port at which others reach this machine, if they differ (NAT, containers).",
        ),
    ] = None,
    join: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDR", callback=_checked_multiaddrs, help="Address of another node; without it a new DHT starts."
        ),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key of this node, created if missing; by default dht-key in your data folder."
        ),
    ] = None,
    address_file: Annotated[
        Path | None, typer.Option(help="File for the address to join with, written once this node answers.")
    ] = None,
    relay_port: RelayPort = None,
    relay_rate: RelayRate = None,
    authorized_keys: Annotated[
        Path | None, typer.Option(help="File with the keys that may use the relay; by default anyone may.")
    ] = None,
) -> None:
    """Run a node of the DHT until interrupted (SIGINT or SIGTERM); peers and clients of any model can join through it.

    The node loads no model. It stores the records of peers, so that peers and clients find each other. With
    --relay-port, it also relays encrypted activations between machines that cannot connect to each other.
    """
    public = [_multiaddr(public_host, listen)] if public_host else []
    rate = parse_relay_rate(relay_rate, relay_port)
    if authorized_keys and relay_port is None:
        raise typer.BadParameter("--authorized-keys is for --relay-port, which is not given")
    forget_address(address_file)

    stop = StopSignals()
    from splitnet.directory.announcer import relaying
    from splitnet.directory.dht_directory import DhtDirectory
    from splitnet.limits import allow_open_files
    from splitnet.security.identity import AuthorizedKeys, Identity

    stop.raise_if_stopped()
    allow_open_files()
    key = _prepared(key_file)
    with ExitStack() as stack:
        starting = DhtDirectory.start(
            initial_peers=join or (), listen=[listen], public=public, identity_path=key, waiting=stop.raise_if_stopped
        )
        directory = stack.enter_context(starting)
        if relay_port is not None:
            own = Identity.load_or_create(key.with_name(f"{key.name}.relay"))
            authorized = AuthorizedKeys(authorized_keys) if authorized_keys else None
            host = listen.split("/")[2]
            host = f"[{host}]" if ":" in host else host
            offer = relaying(directory, own, host, relay_port, public_host, authorized=authorized, bytes_per_s=rate)
            relay = stack.enter_context(offer)
            typer.echo(f"peers behind routers are reached through {relay.address.removeprefix('tcp://')}")
        typer.echo(f"a node of the DHT, listening at {listen}")
        with published_address(directory.addresses, address_file):
            stop.wait()


def _multiaddr(public_host: str, listen: str) -> str:
    """The multiaddr for a text such as `example.org:31330`. If the text has no port, the port of `listen` is used."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::(\d{1,5}))?", public_host)
    if match is None:
        raise SplitnetError(f"{public_host!r} is not a host: write HOST or HOST:PORT, as in example.org:31330")
    host, port = match[1].strip("[]"), match[2] or listen.rpartition("/")[2]
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise SplitnetError(f"others cannot reach {public_host} at port {port}: write --public-host HOST:PORT")
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns4"
    return f"/{kind}/{host}/tcp/{port}"


def _prepared(key_file: Path | None) -> Path:
    if key_file is None:
        import platformdirs

        key_file = platformdirs.user_data_path("splitnet") / "dht-key"
    try:
        key_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if key_file.exists():
            with key_file.open("rb") as file:
                first = file.read(1)
            if first != _FIRST_BYTE:
                raise KeyFileError(f"{key_file} holds no key of a DHT node: move it away, then a new key is created")
    except OSError as error:
        raise KeyFileError(
            f"the key in {key_file} cannot be used ({error.strerror}): give another --key-file"
        ) from None
    return key_file
