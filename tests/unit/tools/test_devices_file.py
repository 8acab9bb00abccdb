from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.facts import CLIENT, Link, Speed
from splitnet.tools.plan.devices_file import SAME_MACHINE, DevicesFile, DevicesFileError, MachineSpeed, read_devices

LAPTOP = "{name: laptop, memory: 4GiB, memory_bandwidth: 50GB/s, compute: 1.5TFLOPS}"
BOARD = "{name: board, memory: 500MB, block_ms: {decode: 1.2, prefill: 0.05}, device: 'cuda:1'}"
DEFAULT = "default: {latency_ms: 2, bandwidth: 80Mbit/s}"


def read(tmp_path: Path, text: str) -> DevicesFile:
    file = tmp_path / "devices.yaml"
    file.write_text(text)
    return read_devices(file)


def two(links: str = f"{{{DEFAULT}}}", client: str = "") -> str:
    return f"devices:\n  - {LAPTOP}\n  - {BOARD}\nlinks: {links}\n{client}"


def test_devices_are_read_with_units(tmp_path: Path) -> None:
    file = read(tmp_path, two())
    laptop, board = file.devices
    assert laptop.name == "laptop"
    assert laptop.memory == 4 * 2**30
    assert laptop.speed == MachineSpeed(bytes_per_ms=50e6, flops_per_ms=1.5e9)
    assert laptop.torch_device is None
    assert board.memory == 500_000_000
    assert board.speed == Speed.of(1.2, 0.05)
    assert board.torch_device == "cuda:1"
    assert file.client_host is None


def test_the_watts_of_a_device_are_read(tmp_path: Path) -> None:
    text = two().replace("memory: 500MB", "memory: 500MB, watts: 7.5")
    assert [device.watts for device in read(tmp_path, text).devices] == [0.0, 7.5]
    for wrong in ("0", "-1", "much", ".inf", "1e6"):
        with pytest.raises(DevicesFileError, match=r"devices\[1\] \(board\).watts"):
            read(tmp_path, text.replace("7.5", wrong))


def test_a_pair_overrides_the_default_link_and_may_differ_by_direction(tmp_path: Path) -> None:
    pairs = (
        "[{between: [laptop, client], latency_ms: 0, bandwidth: 10MB/s},"
        "{from: board, to: laptop, latency_ms: 5, bandwidth: 8kbit/s}]"
    )
    network = read(tmp_path, two(f"{{{DEFAULT}, pairs: {pairs}}}")).network
    assert network.link("laptop", "board") == Link(2.0, 10_000.0)
    assert network.link("board", "laptop") == Link(5.0, 1.0)
    assert network.link("laptop", CLIENT) == network.link(CLIENT, "laptop") == Link(0.0, 10_000.0)
    assert network.link(CLIENT, "board") == Link(2.0, 10_000.0)


def test_a_client_on_a_device_has_the_links_of_that_device(tmp_path: Path) -> None:
    pairs = "[{from: board, to: laptop, latency_ms: 5, bandwidth: 8kbit/s}]"
    file = read(tmp_path, two(f"{{{DEFAULT}, pairs: {pairs}}}", "client: {host: laptop}"))
    assert file.client_host == "laptop"
    assert file.network.link("board", CLIENT) == Link(5.0, 1.0)
    assert file.network.link(CLIENT, "board") == Link(2.0, 10_000.0)
    assert file.network.link(CLIENT, "laptop") == file.network.link("laptop", CLIENT) == SAME_MACHINE


def test_one_device_with_the_client_needs_no_links(tmp_path: Path) -> None:
    assert read(tmp_path, f"devices: [{LAPTOP}]\nclient: {{host: laptop}}").client_host == "laptop"


def device(text: str) -> str:
    return f"devices: [{text}]\nclient: {{host: laptop}}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("devices: [", r"line 1: .*not YAML"),
        ("a: b: c", r"line 1: .*not YAML"),
        ("!!python/object/apply:os.getcwd []", r"line 1: .*not YAML"),
        ("when: 2026-13-45", "not YAML"),
        ("", "write it as {devices"),
        ("devices: []", "describe at least one"),
        ("devices: laptop", "write it as a list"),
        ("device: []", "unknown key 'device': write one of devices, client, links"),
        (device("laptop"), r"devices\[0\]: write it as"),
        (device("{name: laptop}"), r"devices\[0\] \(laptop\): memory is missing"),
        (device("{memory: 4GiB}"), "name is missing"),
        (device("{name: 7, memory: 4GiB, block_ms: {decode: 1, prefill: 1}}"), "7 cannot be the name"),
        (device("{name: client, memory: 4GiB, block_ms: {decode: 1, prefill: 1}}"), "'client' cannot be the name"),
        (device(LAPTOP.replace("4GiB", "4")), r"\(laptop\).memory: 4 is not an amount above 0 with a unit.*4GiB"),
        (device(LAPTOP.replace("4GiB", "-4GiB")), "memory: '-4GiB' is not an amount"),
        (device(LAPTOP.replace("50GB/s", "0GB/s")), "memory_bandwidth: '0GB/s' is not an amount"),
        (device(LAPTOP.replace("50GB/s", "50GB")), "memory_bandwidth: '50GB' .*write it as 50GB/s"),
        (device(LAPTOP.replace("1.5TFLOPS", "fast")), "compute: 'fast' .*write it as 1.5TFLOPS"),
        (device(LAPTOP.replace(", compute: 1.5TFLOPS", "")), "the speed is missing"),
        (device(LAPTOP.replace("memory_", "ram_")), "unknown key 'ram_bandwidth'"),
        (device(LAPTOP.replace("}", ", block_ms: {decode: 1, prefill: 1}}")), "not both"),
        (device("{name: laptop, memory: 4GiB, block_ms: {decode: -1, prefill: 1}}"), "block_ms.decode: -1 is not"),
        (device("{name: laptop, memory: 4GiB, block_ms: {decode: .nan, prefill: 1}}"), "block_ms.decode: nan is not"),
        (device("{name: laptop, memory: 4GiB, block_ms: {decode: 1}}"), "prefill is missing"),
        (device(LAPTOP.replace("}", ", device: tpu}")), "'tpu' is unknown"),
        (f"devices: [{LAPTOP}, {LAPTOP}]", "'laptop' is there twice"),
        (two(client="client: {host: phone}"), "client.host: there is no device 'phone': write one of laptop, board"),
        (two("{}"), "the link between laptop and board is missing"),
        (two(f"{{{DEFAULT.replace('2', '-2')}}}"), "links.default.latency_ms: -2 is not a number of at least 0"),
        (two(f"{{{DEFAULT}, pairs: [{{between: [laptop, phone], latency_ms: 1, bandwidth: 1Mbit/s}}]}}"), "'phone'"),
        (two(f"{{{DEFAULT}, pairs: [{{between: [laptop], latency_ms: 1, bandwidth: 1Mbit/s}}]}}"), "two ends"),
        (two(f"{{{DEFAULT}, pairs: [{{from: laptop, latency_ms: 1, bandwidth: 1Mbit/s}}]}}"), "to is missing"),
        (
            two(
                f"{{{DEFAULT}, pairs: [{{between: [laptop, board], latency_ms: 1, bandwidth: 1Mbit/s}},"
                "{from: board, to: laptop, latency_ms: 1, bandwidth: 1Mbit/s}]}"
            ),
            r"pairs\[1\]: the link from board to laptop is there twice",
        ),
        (
            two(
                f"{{{DEFAULT}, pairs: [{{between: [laptop, client], latency_ms: 1, bandwidth: 1Mbit/s}}]}}",
                "client: {host: board}",
            ),
            "no device 'client'",
        ),
    ],
)
def test_errors_name_the_place_of_the_mistake(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DevicesFileError, match=said) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "devices.yaml"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DevicesFileError, match="cannot read"):
        read_devices(tmp_path / "absent.yaml")


def test_the_example_is_valid() -> None:
    file = read_devices(Path(__file__).parents[3] / "examples" / "devices.yaml")
    assert file.client_host in {known.name for known in file.devices}
