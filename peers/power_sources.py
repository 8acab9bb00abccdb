"""Finds what tells the power of a device: RAPL, sensors of boards, NVIDIA's library. docs/energy.md lists them."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from peers.energy import Source, Sources

SYSFS = Path("/sys")

_MICRO = 1e-6
_OTHER_DEVICES = frozenset({"amdgpu", "radeon", "nouveau", "i915", "xe"})
"""Chips whose power is that of a GPU."""

_WHOLE = re.compile(r"VDD_IN|POM_5V_IN|.*total.*", re.IGNORECASE)
"""Labels of a sensor that has all in it that the others of its board have."""


def find_sources(device: torch.device, sysfs: Path = SYSFS) -> Sources:
    """What tells the power of the device now.

    Args:
        device: that computes.
        sysfs: where Linux shows counters and sensors.
    """
    if device.type == "cuda":
        return _of_nvidia(device)
    if device.type != "cpu":
        return Sources()
    rapl = _of_rapl(sysfs)
    if rapl.parts:
        return rapl
    return _of_sensors(sysfs) or rapl


def _of_rapl(sysfs: Path) -> Sources:
    """The packages. Domains within them are in them; a platform (psys) has all in it, and counts where it is alone."""
    domains = [
        (folder, _text(folder / "name"))
        for folder in sorted((sysfs / "class/powercap").glob("intel-rapl:*"))
        if re.fullmatch(r"intel-rapl:\d+", folder.name)
    ]
    chosen = [each for each in domains if each[1].startswith("package")] or [
        each for each in domains if each[1] == "psys"
    ]
    parts: list[Source] = []
    for folder, name in chosen:
        file = folder / "energy_uj"
        try:
            _read(file, _MICRO)
        except PermissionError:
            return Sources(problem=_not_allowed(file, folder.parent / "intel-rapl:*/energy_uj"))
        except (OSError, ValueError):
            return Sources()  # a sum without it would be too small
        wraps_at = _text(folder / "max_energy_range_uj")
        parts.append(
            Source(f"RAPL {name}", partial(_read, file, _MICRO), int(wraps_at) * _MICRO if wraps_at.isdigit() else 0.0)
        )
    return Sources(tuple(parts))


def _of_sensors(sysfs: Path) -> Sources | None:
    """Those of one kind of chip: what different ones measure may be the same current. None: there are none."""
    by_kind: dict[str, list[tuple[Source, str]]] = {}
    for chip in sorted((sysfs / "class/hwmon").glob("hwmon*")):
        name = _text(chip / "name")
        # What hangs on a power supply or battery is what flows into it, or could.
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
            return Sources(tuple(sensors))
        except PermissionError as error:
            file = Path(error.filename or sysfs / "class/hwmon")
            problem = problem or _not_allowed(file, file)
        except (OSError, ValueError):
            continue
    return Sources(problem=problem) if problem else None


def _sensors(chip: Path, name: str) -> Iterator[tuple[Source, str]]:
    """Each with its label."""
    numbers = {int(match[1]) for file in chip.iterdir() if (match := re.fullmatch(r"power(\d+)_\w+", file.name))}
    found = False
    for number in sorted(numbers):
        files = [chip / f"power{number}_{kind}" for kind in ("input", "average")]
        file = next((file for file in files if file.exists()), None)
        if file is not None:
            label = _text(chip / f"power{number}_label")
            yield Source(f"{name} {label or f'power{number}'}", partial(_read, file, _MICRO)), label
            found = True
    if found or not name.startswith("ina"):
        return
    for number in (1, 2, 3):  # beyond these an INA3221 has voltages of shunts and sums
        current, voltage = chip / f"curr{number}_input", chip / f"in{number}_input"
        if current.exists() and voltage.exists() and _text(chip / f"in{number}_enable") != "0":
            label = _text(chip / f"in{number}_label")
            yield Source(f"{name} {label or f'channel {number}'}", partial(_product, current, voltage)), label


def _of_nvidia(device: torch.device) -> Sources:
    if torch.version.hip is not None or importlib.util.find_spec("pynvml") is None:
        return Sources()
    source = Source(f"NVML {device}", partial(_nvidia_watts, device))
    try:
        source.read()
    except OSError:
        return Sources()
    return Sources((source,))


def _nvidia_watts(device: torch.device) -> float:
    try:
        return torch.cuda.power_draw(device) / 1000
    except Exception as error:  # NVML has errors of its own, and which there are depends on its version
        raise OSError(f"NVML: {error}") from error


def _not_allowed(file: Path, files: Path) -> str:
    return f"not known, as {file} may not be read: `sudo chmod a+r {files}` until the next boot, or --watts"


def _product(current: Path, voltage: Path) -> float:
    """Watts of mA and mV."""
    return _read(current, 1e-3) * _read(voltage, 1e-3)


def _read(file: Path, unit: float) -> float:
    # In the way of every step, so without the layers of `open`.
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return int(os.read(descriptor, 64)) * unit
    finally:
        os.close(descriptor)


def _text(file: Path) -> str:
    """A line of a file, "" without one."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
