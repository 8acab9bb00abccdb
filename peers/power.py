"""The power of the device while it computes: counters and sensors are read before and after each computation."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from scheduler.facts import MAX_WATTS

log = logging.getLogger(__name__)

HALF_LIFE_S = 20.0  # seconds of computation after which a measurement has half its weight
SENSOR_S = 0.5  # interval between two readings of a sensor, because a reading over I2C takes a millisecond
# Highest plausible power of one counter: a larger difference means that the counter was reset, and did not wrap.
MOST_WATTS = 2000.0
SYSFS = Path("/sys")

_MICRO = 1e-6
_OTHER_DEVICES = frozenset({"amdgpu", "radeon", "nouveau", "i915", "xe"})  # drivers of GPUs, not of the CPU
_WHOLE = re.compile(r"VDD_IN|POM_5V_IN|.*total.*", re.IGNORECASE)  # labels of sensors for a whole board


@dataclass(frozen=True)
class PowerSource:
    """A counter of energy or a sensor of power, of the device or a part of it. Sources with equal names are equal.

    read: total joules of a counter, present watts of a sensor. Raises OSError or ValueError: the reading failed.
    """

    name: str
    read: Callable[[], float] = field(compare=False)
    wraps_at: float | None = None  # joules at which a counter wraps to 0; 0: unknown; None: the source is a sensor


@dataclass(frozen=True)
class PowerSources:
    """The sources whose sum is the power of the device. No sources: the power is unknown. problem: why it is unknown,
    and what the user can do about it."""

    parts: tuple[PowerSource, ...] = ()
    problem: str = ""

    @property
    def names(self) -> str:
        return ", ".join(part.name for part in self.parts)


class EnergyMeter:
    """Adds up the energy of computations; failed readings add nothing.

    One thread at a time computes; another thread may call `find_sources`. find: finds the readable sources. watts:
    power of the device while it computes, as the user states; if given, no source is read.
    """

    def __init__(
        self,
        find: Callable[[], PowerSources] = PowerSources,
        watts: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.joules = 0.0  # energy of all computations whose energy is known
        self._find = find
        self._given = watts
        self._clock = clock
        self._sources = PowerSources()
        self._recent_joules = self._recent_s = 0.0
        self._within = False
        self._sensed_watts, self._sensed_at = 0.0, float("-inf")
        self.find_sources()

    @property
    def watts(self) -> float:
        """Power while the device computes; 0: unknown."""
        if self._given is not None:
            return self._given
        joules, seconds = self._recent_joules, self._recent_s
        return min(joules / seconds, MAX_WATTS) if seconds else 0.0

    @property
    def origin(self) -> str:
        """The origin of `watts`, or why they are unknown; "" without any source."""
        if self._given is not None:
            return f"{self._given:g} W while it computes, as --watts says"
        return self._sources.names or self._sources.problem

    def find_sources(self) -> None:
        """Finds the readable sources, which change with drivers and rights."""
        if self._given is not None:
            return
        try:
            found = self._find()
        except OSError:  # a file vanished during the search
            found = PowerSources()
        if found != self._sources:
            self._use_sources(found)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Counts the energy used during the `with` statement. Only one thread may use it at a time; nested statements
        count once."""
        sources = self._sources
        if self._within or (self._given is None and not sources.parts):
            yield
            return
        began, before = self._clock(), self._counted(sources)
        self._within = True
        try:
            yield
        finally:
            self._within = False
            self._take_in(sources, before, self._clock() - began)

    def _take_in(self, sources: PowerSources, before: list[float] | None, seconds: float) -> None:
        if self._given is not None:
            self.joules += self._given * seconds
            return
        after = self._counted(sources)
        if before is None or after is None or sources is not self._sources or seconds <= 0:
            return
        counters = [part for part in sources.parts if part.wraps_at is not None]
        joules = 0.0
        for counter, earlier, later in zip(counters, before, after, strict=True):
            step = later - earlier if later >= earlier else later - earlier + (counter.wraps_at or 0.0)
            if not 0 <= step <= MOST_WATTS * seconds + MOST_WATTS / 1000:
                return
            joules += step
        watts = self._sensed(sources)
        if watts is None:
            return
        joules += watts * seconds
        self.joules += joules
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self._recent_joules = self._recent_joules * kept + joules
        self._recent_s = self._recent_s * kept + seconds

    def _counted(self, sources: PowerSources) -> list[float] | None:
        return self._readings(sources, [part for part in sources.parts if part.wraps_at is not None])

    def _sensed(self, sources: PowerSources) -> float | None:
        """Watts of all sensors, at most `SENSOR_S` old; None: a reading failed."""
        sensors = [part for part in sources.parts if part.wraps_at is None]
        now = self._clock()
        if sensors and now - self._sensed_at >= SENSOR_S:
            watts = self._readings(sources, sensors)
            if watts is None:
                return None
            self._sensed_watts, self._sensed_at = max(0.0, sum(watts)), now
        return self._sensed_watts if sensors else 0.0

    def _readings(self, sources: PowerSources, parts: list[PowerSource]) -> list[float] | None:
        """A reading of each part; None: a reading failed."""
        try:
            return [part.read() for part in parts]
        except (OSError, ValueError) as error:
            if sources is self._sources:
                log.info("the power of the device cannot be read any more: %s", error)
                self._use_sources(PowerSources())
            return None

    def _use_sources(self, sources: PowerSources) -> None:
        self._sources = sources
        self._recent_joules = self._recent_s = 0.0
        self._sensed_at = float("-inf")


def find_sources(device: torch.device, sysfs: Path = SYSFS) -> PowerSources:
    """The readable sources of the power of `device`. sysfs: where Linux has counters and sensors."""
    if device.type == "cuda":
        return _of_nvidia(device)
    if device.type != "cpu":
        return PowerSources()
    rapl = _of_rapl(sysfs)
    return rapl if rapl.parts else _of_sensors(sysfs) or rapl


def _of_rapl(sysfs: Path) -> PowerSources:
    """The counters of packages, which include their subdomains; without packages, that of the platform (psys)."""
    domains = [
        (folder, _text(folder / "name"))
        for folder in sorted((sysfs / "class/powercap").glob("intel-rapl:*"))
        if re.fullmatch(r"intel-rapl:\d+", folder.name)
    ]
    packages = [each for each in domains if each[1].startswith("package")]
    chosen = packages or [each for each in domains if each[1] == "psys"]
    parts: list[PowerSource] = []
    for folder, name in chosen:
        file = folder / "energy_uj"
        try:
            _read(file, _MICRO)
        except PermissionError:
            return PowerSources(problem=_not_allowed(file, folder.parent / "intel-rapl:*/energy_uj"))
        except (OSError, ValueError):
            return PowerSources()  # the sum of the other packages would be too small
        range_uj = _text(folder / "max_energy_range_uj")
        wraps_at = int(range_uj) * _MICRO if range_uj.isdigit() else 0.0
        parts.append(PowerSource(f"RAPL {name}", partial(_read, file, _MICRO), wraps_at))
    return PowerSources(tuple(parts))


def _of_sensors(sysfs: Path) -> PowerSources | None:
    """Sensors of one kind of chip, because different kinds may measure the same current. None: there are no sensors."""
    by_kind: dict[str, list[tuple[PowerSource, str]]] = {}
    for chip in sorted((sysfs / "class/hwmon").glob("hwmon*")):
        name = _text(chip / "name")
        # The sensor of a power supply or battery measures its charge or its limit.
        if name and name not in _OTHER_DEVICES and not (chip / "device/type").exists():
            sensors = list(_sensors(chip, name))
            if sensors:
                by_kind.setdefault("ina" if name.startswith("ina") else name, []).extend(sensors)
    problem = ""
    for kind in sorted(by_kind, key=lambda kind: (kind != "ina", kind != "power_meter", kind)):
        whole = [each for each in by_kind[kind] if _WHOLE.fullmatch(each[1])][:1]
        sensors = [source for source, _ in whole or by_kind[kind]]
        try:
            for sensor in sensors:
                sensor.read()
            return PowerSources(tuple(sensors))
        except PermissionError as error:
            file = Path(error.filename or sysfs / "class/hwmon")
            problem = problem or _not_allowed(file, file)
        except (OSError, ValueError):
            continue
    return PowerSources(problem=problem) if problem else None


def _sensors(chip: Path, name: str) -> Iterator[tuple[PowerSource, str]]:
    numbers = {int(match[1]) for file in chip.iterdir() if (match := re.fullmatch(r"power(\d+)_\w+", file.name))}
    found = False
    for number in sorted(numbers):
        files = [chip / f"power{number}_{kind}" for kind in ("input", "average")]
        file = next((file for file in files if file.exists()), None)
        if file is not None:
            label = _text(chip / f"power{number}_label")
            yield PowerSource(f"{name} {label or f'power{number}'}", partial(_read, file, _MICRO)), label
            found = True
    if found or not name.startswith("ina"):
        return
    for number in (1, 2, 3):  # higher numbers of an INA3221 are voltages of shunts and sums
        current, voltage = chip / f"curr{number}_input", chip / f"in{number}_input"
        if current.exists() and voltage.exists() and _text(chip / f"in{number}_enable") != "0":
            label = _text(chip / f"in{number}_label")
            yield PowerSource(f"{name} {label or f'channel {number}'}", partial(_product, current, voltage)), label


def _of_nvidia(device: torch.device) -> PowerSources:
    if torch.version.hip is not None or importlib.util.find_spec("pynvml") is None:
        return PowerSources()
    source = PowerSource(f"NVML {device}", partial(_nvidia_watts, device))
    try:
        source.read()
    except OSError:
        return PowerSources()
    return PowerSources((source,))


def _nvidia_watts(device: torch.device) -> float:
    try:
        return torch.cuda.power_draw(device) / 1000
    except Exception as error:  # the errors of NVML depend on its version
        raise OSError(f"NVML: {error}") from error


def _not_allowed(file: Path, files: Path) -> str:
    return f"not known, as {file} may not be read: `sudo chmod a+r {files}` until the next boot, or --watts"


def _product(current: Path, voltage: Path) -> float:
    """Watts from mA and mV."""
    return _read(current, 1e-3) * _read(voltage, 1e-3)


def _read(file: Path, unit: float) -> float:
    # Without `open`, whose layers would slow down every step.
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return int(os.read(descriptor, 64)) * unit
    finally:
        os.close(descriptor)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
