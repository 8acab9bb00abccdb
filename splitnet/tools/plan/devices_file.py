"""Reads the file of devices and links for `splitnet plan`; docs/placement.md describes its format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scheduler.facts import CLIENT, MAX_WATTS, Link, Network, Speed
from splitnet.blocks.chosen_device import DEVICE_NAME
from splitnet.errors import SplitnetError

CLIENT_NAME: Final = "client"  # The client's name in links if the client does not run on one of the devices

SAME_MACHINE: Final = Link(latency_ms=0.05, bytes_per_ms=1e6)
"""The link between a client and a peer on the same machine, through memory."""

_BYTES: Final = {"b": 1.0} | {
    f"{prefix}{mark}": float(base**power)
    for mark, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}
_BYTES_PER_S: Final = {f"{unit}/s": value for unit, value in _BYTES.items()}
_BITS_PER_S: Final = {f"{prefix}bit/s": 1000.0**power / 8 for power, prefix in enumerate(["", "k", "m", "g", "t"])}
_FLOPS: Final = {f"{prefix}flops": 1000.0**power for power, prefix in enumerate(["", "k", "m", "g", "t", "p"])}


class DevicesFileError(SplitnetError):
    """The file of devices cannot be read, or has an invalid value."""


@dataclass(frozen=True)
class MachineSpeed:
    """The speed that a device achieves. bytes_per_ms: for reading memory. flops_per_ms: in the type of the weights."""

    bytes_per_ms: float
    flops_per_ms: float


@dataclass(frozen=True)
class KnownDevice:
    """A device of the file."""

    name: str
    memory: int  # bytes for weights, KV caches and, on the client's device, the client part
    speed: Speed | MachineSpeed  # the speed measured with the model, or figures from which the speed is derived
    torch_device: str | None = None  # the torch device to compute on, such as `cuda`; None: the peer chooses
    watts: float = 0.0  # power of the device while it computes; 0: unknown


@dataclass(frozen=True)
class DevicesFile:
    """The content of the file. client_host: name of the device that runs the client; None: another machine runs it."""

    devices: tuple[KnownDevice, ...]
    client_host: str | None
    network: Network


def read_devices(path: Path) -> DevicesFile:
    """Reads and checks a file of devices. Raises DevicesFileError with the place in the file and the fix."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DevicesFileError(f"cannot read {path} ({error}): give a file such as examples/devices.yaml") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise DevicesFileError(f"{place}: {getattr(error, 'problem', error)}: this is not YAML") from None
    try:
        return _file(content)
    except DevicesFileError as error:
        raise DevicesFileError(f"{path}: {error}") from None


def _file(content: Any) -> DevicesFile:
    top = _mapping(content, "the file", required=("devices",), optional=("client", "links"))
    entries = _sequence(top["devices"], "devices")
    devices = tuple(_device(entry, f"devices[{index}]") for index, entry in enumerate(entries))
    names = [device.name for device in devices]
    if not devices:
        raise DevicesFileError("devices is empty: describe at least one")
    for name in names:
        if names.count(name) > 1:
            raise DevicesFileError(f"devices: {name!r} is there twice: give each device its own name")
    host = None
    if top.get("client") is not None:
        host = _mapping(top["client"], "client", required=("host",))["host"]
        if host not in names:
            raise DevicesFileError(
                f"client.host: there is no device {host!r}: write one of {', '.join(names)}, or leave `client` out if "
                "it runs on another machine"
            )
    return DevicesFile(devices, host, _network(top.get("links"), names, host))


def _device(entry: Any, place: str) -> KnownDevice:
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        place = f"{place} ({entry['name']})"
    machine = ("memory_bandwidth", "compute")
    values = _mapping(entry, place, required=("name", "memory"), optional=("block_ms", *machine, "device", "watts"))
    name = values["name"]
    if not isinstance(name, str) or not name.strip() or name == CLIENT_NAME:
        raise DevicesFileError(f"{place}.name: {name!r} cannot be the name of a device: write another text")
    memory = int(_quantity(values["memory"], _BYTES, f"{place}.memory", "4GiB"))
    if "block_ms" in values:
        if any(key in values for key in machine):
            raise DevicesFileError(f"{place}: give block_ms, or memory_bandwidth and compute, not both")
        times = _mapping(values["block_ms"], f"{place}.block_ms", required=("decode", "prefill"))
        decode, prefill = (_number(times[key], f"{place}.block_ms.{key}") for key in ("decode", "prefill"))
        speed: Speed | MachineSpeed = Speed.of(decode, prefill)
    else:
        if any(key not in values for key in machine):
            raise DevicesFileError(
                f"{place}: the speed is missing: write memory_bandwidth and compute, or a measured block_ms"
            )
        speed = MachineSpeed(
            _quantity(values["memory_bandwidth"], _BYTES_PER_S, f"{place}.memory_bandwidth", "50GB/s") / 1000,
            _quantity(values["compute"], _FLOPS, f"{place}.compute", "1.5TFLOPS") / 1000,
        )
    torch_device = values.get("device")
    if torch_device is not None and not DEVICE_NAME.fullmatch(str(torch_device)):
        raise DevicesFileError(
            f"{place}.device: {torch_device!r} is unknown: write auto, cpu, cuda, cuda:1, mps or xpu"
        )
    watts = 0.0 if values.get("watts") is None else _number(values["watts"], f"{place}.watts")
    if watts > MAX_WATTS:
        raise DevicesFileError(f"{place}.watts: {watts:g} is more than a device draws: give {MAX_WATTS:g} at most")
    return KnownDevice(name, memory, speed, torch_device, watts)


def _network(content: Any, names: Sequence[str], host: str | None) -> Network:
    links = _mapping(content or {}, "links", optional=("default", "pairs"))
    numbers = ("latency_ms", "bandwidth")
    pairs = _sequence(links.get("pairs") or [], "links.pairs")
    default = _mapping(links["default"], "links.default", required=numbers) if "default" in links else None
    ends = [*names, *([] if host else [CLIENT_NAME])]
    known: dict[tuple[str, str], Link] = {}
    for index, entry in enumerate(pairs):
        place = f"links.pairs[{index}]"
        way = ("from", "to") if isinstance(entry, Mapping) and "between" not in entry else ("between",)
        values = _mapping(entry, place, required=(*way, *numbers))
        pair = [values["from"], values["to"]] if way == ("from", "to") else _sequence(values["between"], place)
        if len(pair) != 2 or pair[0] == pair[1]:
            raise DevicesFileError(f"{place}: a link has two ends: write between: [{', '.join(ends[:2])}]")
        for end in pair:
            if end not in ends:
                raise DevicesFileError(f"{place}: there is no device {end!r}: write two of {', '.join(ends)}")
        for sender, receiver in [pair] if "from" in way else [pair, pair[::-1]]:
            if (sender, receiver) in known:
                raise DevicesFileError(f"{place}: the link from {sender} to {receiver} is there twice: remove one")
            known[sender, receiver] = _link(values, place)
    lacking = [(a, b) for a in ends for b in ends if a != b and (a, b) not in known]
    if lacking and default is None:
        raise DevicesFileError(
            f"links: the link between {lacking[0][0]} and {lacking[0][1]} is missing: add it, or a default"
        )
    network = Network(known, _link(default, "links.default")) if default else Network(known)
    return _with_client(network, names, host)


def _with_client(network: Network, names: Sequence[str], host: str | None) -> Network:
    """The network with the client's links, which are the links of its device if it has one."""
    to_client = {(name, CLIENT): network.link(name, host or CLIENT_NAME) for name in names if name != host}
    from_client = {(CLIENT, name): network.link(host or CLIENT_NAME, name) for name in names if name != host}
    same = {(CLIENT, host): SAME_MACHINE, (host, CLIENT): SAME_MACHINE} if host else {}
    return network.with_links({**to_client, **from_client, **same})


def _link(values: Mapping[str, Any], place: str) -> Link:
    rate = _quantity(values["bandwidth"], _BITS_PER_S | _BYTES_PER_S, f"{place}.bandwidth", "100Mbit/s")
    return Link(_number(values["latency_ms"], f"{place}.latency_ms", least=0.0), rate / 1000)


def _mapping(value: Any, place: str, required: Sequence[str] = (), optional: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        keys = ", ".join(f"{key}: ..." for key in required or optional)
        raise DevicesFileError(f"{place}: write it as {{{keys}}}")
    for key in value:
        if key not in required and key not in optional:
            raise DevicesFileError(f"{place}: unknown key {key!r}: write one of {', '.join([*required, *optional])}")
    for key in required:
        if value.get(key) is None:
            raise DevicesFileError(f"{place}: {key} is missing: add it")
    return value


def _sequence(value: Any, place: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise DevicesFileError(f"{place}: write it as a list, each entry after a dash")
    return value


def _number(value: Any, place: str, least: float | None = None) -> float:
    """A finite number that is positive, or at least `least`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        enough = value > 0 if least is None else value >= least
        if enough and value < float("inf"):
            return float(value)
    bound = "above 0" if least is None else f"of at least {least:g}"
    raise DevicesFileError(f"{place}: {value!r} is not a number {bound}: correct it")


def _quantity(value: Any, units: Mapping[str, float], place: str, example: str) -> float:
    """A positive number with a unit, such as `4GiB`, in the base unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\D+)", str(value).strip())
    unit = units.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise DevicesFileError(f"{place}: {value!r} is not an amount above 0 with a unit: write it as {example}")
    return float(match[1]) * unit
