"""Chooses the device to compute on: the requested device, or the best one that is present and works."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from splitnet.errors import SplitnetError, first_line

log = logging.getLogger(__name__)

AUTO = "auto"
DEVICE_NAME = re.compile(r"auto|cpu|mps|(?:cuda|xpu)(?::\d+)?")  # the devices that a user may ask for
_KINDS = ("cuda", "mps", "xpu")  # of accelerators, best first; ROCm's build of torch calls its devices cuda, too


@dataclass(frozen=True)
class TorchDevices:
    """The devices that torch finds on this machine besides the CPU."""

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Kind (cuda, mps, xpu) -> names of its devices; a kind without devices may be absent."""
    faults: Mapping[str, str] = field(default_factory=dict[str, str])  # by device, such as `cuda:1`
    lacking: str = "torch finds no GPU"  # why there are no devices

    @property
    def devices(self) -> dict[str, str]:
        """Device -> its name, best device first."""
        found = {f"{kind}:{index}": name for kind in _KINDS for index, name in enumerate(self.names.get(kind, ()))}
        return {device.replace("mps:0", "mps"): name for device, name in found.items()}


@dataclass(frozen=True)
class ChosenDevice:
    """A device in torch's notation, and the reason for the choice."""

    device: str
    why: str

    def __str__(self) -> str:
        return f"{self.device} ({self.why})"


def choose_device(asked: str, present: TorchDevices) -> ChosenDevice:
    """Chooses the device to compute on. `asked`: `auto`, or a device in torch's notation; without a number, the first
    of its kind. Raises SplitnetError if this machine has no such device, or it does not work."""
    if asked == "cpu":
        return ChosenDevice("cpu", "as asked for")
    devices = present.devices
    if asked != AUTO:
        named = f"{asked}:0" if asked in ("cuda", "xpu") else asked
        if named not in devices or not DEVICE_NAME.fullmatch(asked):
            missing = f"this machine has no device {asked!r} for torch, only {', '.join(['cpu', *devices])}"
            raise SplitnetError(f"{missing}: use --device auto or cpu")
        if fault := present.faults.get(named):
            raise SplitnetError(f"{named} ({devices[named]}) cannot be used ({fault}): use --device auto or cpu")
        return ChosenDevice(named, f"{devices[named]}, as asked for")
    faults = [f"{device} cannot be used: {fault}" for device, fault in present.faults.items()]
    for device, name in devices.items():
        if device not in present.faults:
            count = len(present.names[device.partition(":")[0]])
            more = f", the first of {count}" if count > 1 else ""
            return ChosenDevice(device, "; ".join([f"{name}{more}", *faults]))
    return ChosenDevice("cpu", "; ".join(faults) or present.lacking)


def find_present(*, tried: bool = True) -> TorchDevices:
    """Finds the devices. With `tried`, a small product is computed on each device until one works, which starts its
    driver."""
    import torch

    names = {"cuda": _names_by(torch.cuda), "xpu": _names_by(torch.xpu)}
    names["mps"] = ("Metal",) if torch.backends.mps.is_available() else ()
    built = any((torch.version.cuda, torch.version.hip, torch.backends.mps.is_built(), torch.xpu._is_compiled()))
    lacking = "torch finds no GPU" if built else f"torch {torch.__version__} is built without support for GPUs"
    present = TorchDevices(names, lacking=lacking)
    faults: dict[str, str] = {}
    for device in present.devices if tried else ():
        if (fault := _fault_of(device)) is None:
            break
        faults[device] = fault
    return replace(present, faults=faults)


def find_device(asked: str) -> ChosenDevice:
    """Finds the devices and chooses one. Raises SplitnetError if the requested device is absent or does not work.

    The choice of `auto` is logged, as a warning if a device that is present does not work.
    """
    present = find_present() if asked == AUTO else TorchDevices()
    if asked not in ("cpu", AUTO):
        present = find_present(tried=False)
        fault = _fault_of(device := choose_device(asked, present).device)
        present = replace(present, faults={device: fault} if fault else {})
    choice = choose_device(asked, present)
    if asked == AUTO:
        log.log(logging.WARNING if present.faults else logging.INFO, "computes on %s", choice)
    return choice


def _names_by(torch_part: Any) -> tuple[str, ...]:
    """The names of the devices of `torch.cuda` or `torch.xpu`. Asking for names starts the driver, which may fail."""
    count = torch_part.device_count()
    try:
        return tuple(torch_part.get_device_name(index) for index in range(count))
    except (RuntimeError, AssertionError):
        return ("a GPU",) * count


def _fault_of(device: str) -> str | None:
    """Why a small product fails on a device, such as a driver that is too old, or a GPU that this torch does not
    support."""
    import torch

    try:
        ones = torch.ones(8, 8, device=device)
        found = float((ones @ ones).sum())
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError if built without the backend
        return first_line(error)
    return None if found == 8.0**3 else "its products are wrong"
