"""Energy from a tree of files such as Linux has in /sys, and what becomes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peers import power
from peers.power import EnergyMeter, PowerSource, PowerSources, find_sources

CPU = torch.device("cpu")
WRAP_UJ = 262_143_328_850


class Tree:
    """A fake /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, value: object) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
        return file

    def rapl(self, zone: str, name: str, energy_uj: int = 0) -> Path:
        """A domain of RAPL; the file of its energy."""
        folder = f"class/powercap/{zone}"
        self.write(f"{folder}/name", name)
        self.write(f"{folder}/max_energy_range_uj", WRAP_UJ)
        return self.write(f"{folder}/energy_uj", energy_uj)

    def chip(self, number: int, name: str, **files: object) -> None:
        for file, value in {"name": name, **files}.items():
            self.write(f"class/hwmon/hwmon{number}/{file}", value)

    def found(self) -> str:
        return find_sources(CPU, self.root).names

    def watts(self) -> float:
        return sum(part.read() for part in find_sources(CPU, self.root).parts)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter_of(tree: Tree, clock: Clock) -> Callable[[], EnergyMeter]:
    return lambda: EnergyMeter(lambda: find_sources(CPU, tree.root), clock=clock)


def work(meter: EnergyMeter, clock: Clock, seconds: float, *changes: Callable[[], object]) -> None:
    """Some work of the device, during which the counters change."""
    with meter.computing():
        clock.now += seconds
        for change in changes:
            change()


def counts(file: Path, joules: float) -> Callable[[], object]:
    """The counter goes on by so much, and wraps as the hardware does."""
    return lambda: file.write_text(str((int(file.read_text()) + round(joules * 1e6)) % WRAP_UJ))


def denied(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root may read the file, and the tests may run as root."""
    opened = os.open

    def refuse(path: Path, flags: int) -> int:
        if Path(path) == file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags)

    monkeypatch.setattr(power.os, "open", refuse)


def test_packages_are_added_up_and_their_parts_are_not_counted_twice(
    tree: Tree, clock: Clock, meter_of: Callable[[], EnergyMeter]
) -> None:
    packages = [tree.rapl("intel-rapl:0", "package-0", 5_000), tree.rapl("intel-rapl:1", "package-1", 7_000)]
    others = [
        tree.rapl("intel-rapl:0:0", "core"),
        tree.rapl("intel-rapl:0:1", "dram"),
        tree.rapl("intel-rapl:2", "psys"),
        tree.rapl("intel-rapl-mmio:0", "package-0"),
    ]
    tree.write("class/powercap/intel-rapl/enabled", 1)
    tree.chip(0, "power_meter", power1_average=90_000_000)
    meter = meter_of()
    assert meter.origin == "RAPL package-0, RAPL package-1"
    assert meter.watts == 0.0
    work(meter, clock, 0.5, counts(packages[0], 10.0), counts(packages[1], 5.0), *(counts(file, 99) for file in others))
    assert meter.watts == pytest.approx(30.0)
    clock.now += 1000  # while nothing is computed nothing counts
    counts(packages[0], 500.0)()
    work(meter, clock, 0.5, counts(packages[0], 5.0), counts(packages[1], 2.5))
    assert meter.joules == pytest.approx(22.5)
    assert 15.0 < meter.watts < 22.5  # what was drawn last counts a little more


def test_a_platform_counts_where_it_is_alone(tree: Tree) -> None:
    tree.rapl("intel-rapl:1", "psys")
    assert tree.found() == "RAPL psys"


def test_a_counter_wraps(tree: Tree, clock: Clock, meter_of: Callable[[], EnergyMeter]) -> None:
    package = tree.rapl("intel-rapl:0", "package-0", WRAP_UJ - 4_000_000)
    meter = meter_of()
    work(meter, clock, 1.0, counts(package, 10.0))
    assert int(package.read_text()) == 6_000_000
    assert meter.joules == pytest.approx(10.0, rel=1e-6)
    assert meter.watts == pytest.approx(10.0, rel=1e-6)


def test_a_counter_that_was_set_back_invents_nothing(
    tree: Tree, clock: Clock, meter_of: Callable[[], EnergyMeter]
) -> None:
    package = tree.rapl("intel-rapl:0", "package-0", 50_000_000)
    meter = meter_of()
    work(meter, clock, 1.0, counts(package, 10.0))
    work(meter, clock, 1.0, lambda: package.write_text("0"))
    work(meter, clock, 1.0, counts(package, 1e5))
    assert (meter.joules, meter.watts) == pytest.approx((10.0, 10.0))


def test_a_counter_without_its_range_counts_until_it_wraps(
    tree: Tree, clock: Clock, meter_of: Callable[[], EnergyMeter]
) -> None:
    package = tree.rapl("intel-rapl:0", "package-0", WRAP_UJ - 4_000_000)
    (package.parent / "max_energy_range_uj").unlink()
    meter = meter_of()
    work(meter, clock, 1.0, counts(package, 2.0))
    work(meter, clock, 1.0, counts(package, 10.0))
    assert meter.joules == pytest.approx(2.0)


def test_a_counter_vanishes_and_appears(tree: Tree, clock: Clock, meter_of: Callable[[], EnergyMeter]) -> None:
    meter = meter_of()
    work(meter, clock, 1.0)
    assert (meter.watts, meter.origin) == (0.0, "")
    packages = [tree.rapl("intel-rapl:0", "package-0"), tree.rapl("intel-rapl:1", "package-1")]
    meter.find_sources()
    work(meter, clock, 1.0, *(counts(file, 10.0) for file in packages))
    meter.find_sources()  # finds the same, and keeps what was measured
    assert meter.watts == pytest.approx(20.0)
    work(meter, clock, 1.0, packages[1].unlink)
    assert (meter.watts, meter.origin) == (0.0, "")  # half of the device is not the device
    work(meter, clock, 1.0, counts(packages[0], 10.0))
    meter.find_sources()
    assert (meter.watts, meter.origin) == (0.0, "")
    tree.rapl("intel-rapl:1", "package-1")
    meter.find_sources()
    work(meter, clock, 1.0, *(counts(file, 15.0) for file in packages))
    assert (meter.watts, meter.joules) == pytest.approx((30.0, 50.0))


@pytest.mark.parametrize("text", ["", "nonsense", "1.5"])
def test_a_counter_that_says_no_number(
    text: str, tree: Tree, clock: Clock, meter_of: Callable[[], EnergyMeter]
) -> None:
    package = tree.rapl("intel-rapl:0", "package-0")
    meter = meter_of()
    work(meter, clock, 1.0, lambda: package.write_text(text))
    assert (meter.watts, meter.joules) == (0.0, 0.0)
    meter.find_sources()
    assert meter.origin == ""


def test_counters_that_only_root_may_read_say_what_helps(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, clock: Clock, meter_of: Callable[[], EnergyMeter]
) -> None:
    package = tree.rapl("intel-rapl:0", "package-0")
    with monkeypatch.context() as patch:
        denied(package, patch)
        meter = meter_of()
        files = tree.root / "class/powercap/intel-rapl:*/energy_uj"
        allows = f"`sudo chmod a+r {files}` until the next boot, or --watts"
        assert meter.origin == f"not known, as {package} may not be read: {allows}"
        work(meter, clock, 1.0, counts(package, 10.0))
        assert meter.watts == 0.0
        tree.chip(0, "ina226", power1_input=4_000_000)
        meter.find_sources()
        assert meter.origin == "ina226 power1"
    meter.find_sources()
    assert meter.origin == "RAPL package-0"


def test_rights_that_are_taken_away_while_it_computes(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, clock: Clock, meter_of: Callable[[], EnergyMeter]
) -> None:
    package = tree.rapl("intel-rapl:0", "package-0")
    meter = meter_of()
    work(meter, clock, 1.0, counts(package, 10.0), lambda: denied(package, monkeypatch))
    assert (meter.watts, meter.joules) == (0.0, 0.0)


def test_an_error_of_the_work_is_not_hidden(tree: Tree, clock: Clock, meter_of: Callable[[], EnergyMeter]) -> None:
    package = tree.rapl("intel-rapl:0", "package-0")
    meter = meter_of()
    with pytest.raises(RuntimeError, match="of the work"), meter.computing():
        clock.now += 1.0
        counts(package, 3.0)()
        raise RuntimeError("of the work")
    assert meter.joules == pytest.approx(3.0)


def test_sensors_tell_the_power_now(tree: Tree, clock: Clock, meter_of: Callable[[], EnergyMeter]) -> None:
    tree.chip(0, "ina226", power1_input=6_000_000, in1_input=5000, curr1_input=9999)
    meter = meter_of()
    assert meter.origin == "ina226 power1"
    work(meter, clock, 2.0)
    assert (meter.watts, meter.joules) == pytest.approx((6.0, 12.0))
    tree.chip(0, "ina226", power1_input=12_000_000)
    work(meter, clock, 0.1)  # read a moment ago
    assert meter.joules == pytest.approx(12.6)
    work(meter, clock, 0.5)
    assert meter.joules == pytest.approx(18.6)


@pytest.mark.parametrize(
    ("chips", "names", "watts"),
    [
        (
            [("zenpower", {"power1_input": 20_000_000, "power2_input": 3_000_000})],
            "zenpower power1, zenpower power2",
            23,
        ),
        ([("fam15h_power", {"power1_average": 8_000_000})], "fam15h_power power1", 8),
        ([("amdgpu", {"power1_average": 80_000_000})], "", 0),
        ([("BAT0", {"device/type": "Battery", "power1_input": 9_000_000})], "", 0),
        ([("ucsi_source_psy", {"in0_input": 20000, "curr1_input": 3000, "in1_input": 20000})], "", 0),
        (
            [("ina3221", {"in1_input": 5000, "curr1_input": 400, "in2_input": 900, "curr2_input": 1000})],
            "ina3221 channel 1, ina3221 channel 2",
            2.9,
        ),
        (
            [
                (
                    "ina3221",
                    {
                        "in1_label": "VDD_IN",
                        "in1_input": 5000,
                        "curr1_input": 1000,
                        "in2_label": "VDD_SOC",
                        "in2_input": 5000,
                        "curr2_input": 300,
                    },
                )
            ],
            "ina3221 VDD_IN",
            5,
        ),
        (
            [
                (
                    "ina3221",
                    {"in1_input": 5000, "curr1_input": 400, "in2_input": 5000, "curr2_input": 7, "in2_enable": 0},
                )
            ],
            "ina3221 channel 1",
            2,
        ),
        (
            [("power_meter", {"power1_average": 150_000_000}), ("ina219", {"power1_input": 2_000_000})],
            "ina219 power1",
            2,
        ),
        (
            [("corsairpsu", {f"power{n}_input": n * 1_000_000 for n in (1, 2, 3)} | {"power1_label": "power total"})],
            "corsairpsu power total",
            1,
        ),
        (
            [("ina219", {"power1_input": 2_000_000}), ("ina3221", {"in1_input": 5000, "curr1_input": 1000})],
            "ina219 power1, ina3221 channel 1",
            7,
        ),
    ],
)
def test_which_sensors_count(tree: Tree, chips: list[tuple[str, dict[str, object]]], names: str, watts: float) -> None:
    for number, (name, files) in enumerate(chips):
        tree.chip(number, name, **files)
    assert tree.found() == names
    assert tree.watts() == pytest.approx(watts)


def test_a_gpu_does_not_draw_what_its_processor_draws(tree: Tree) -> None:
    tree.rapl("intel-rapl:0", "package-0")
    for device in ("mps", "xpu", "cuda"):
        assert find_sources(torch.device(device), tree.root) == PowerSources()


def test_a_gpu_of_nvidia_tells_its_power(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    milliwatts = [250_000]
    monkeypatch.setattr(power.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "power_draw", lambda _: milliwatts[0])
    meter = EnergyMeter(lambda: find_sources(torch.device("cuda:1")), clock=clock)
    assert meter.origin == "NVML cuda:1"
    work(meter, clock, 1.0)
    assert meter.watts == pytest.approx(250.0)
    monkeypatch.delattr(torch.cuda, "power_draw")
    work(meter, clock, 1.0)
    assert (meter.watts, meter.origin) == (0.0, "")


def test_what_the_user_says_is_taken_and_nothing_is_read(clock: Clock) -> None:
    def find() -> PowerSources:
        raise AssertionError("it is read")

    meter = EnergyMeter(find, 15.0, clock)
    work(meter, clock, 2.0)
    meter.find_sources()
    assert (meter.watts, meter.joules) == (15.0, 30.0)
    assert meter.origin == "15 W while it computes, as --watts says"


def test_a_chip_that_vanishes_while_it_is_looked_at(clock: Clock) -> None:
    def find() -> PowerSources:
        raise FileNotFoundError("hwmon0")

    assert EnergyMeter(find, clock=clock).watts == 0.0


def test_what_is_known_of_nothing_is_nothing(clock: Clock) -> None:
    meter = EnergyMeter(clock=clock)
    work(meter, clock, 2.0)
    assert (meter.watts, meter.joules, meter.origin) == (0.0, 0.0, "")


def test_a_long_time_ago_counts_little(clock: Clock) -> None:
    joules = [0.0]
    meter = EnergyMeter(lambda: PowerSources((PowerSource("test", lambda: joules[0], 0.0),)), clock=clock)

    def draw(watts: float, seconds: int) -> None:
        for _ in range(10 * seconds):
            with meter.computing():
                clock.now += 0.1
                joules[0] += 0.1 * watts

    draw(10.0, 5)
    assert meter.watts == pytest.approx(10.0)
    draw(40.0, 60)
    assert 38.0 < meter.watts < 40.0
