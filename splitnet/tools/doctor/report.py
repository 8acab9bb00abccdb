"""The report of `splitnet doctor --report`: facts from a fixed list, which name neither users, machines nor texts."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from splitnet.blocks.chosen_device import find_present
from splitnet.cli.configuration import Setting
from splitnet.errors import KernelsError
from splitnet.quant.device import free_memory
from splitnet.tools.doctor.machine_checks import CheckResult, gib, installed_version
from splitnet.version import __version__
from splitnet.wire.codecs import CODECS

LIBRARIES = ("torch", "transformers", "hivemind", "tokenizers", "safetensors", "huggingface-hub", "numpy", "pyzmq")
# Features of CPUs that kernels use, of x86 and ARM, as Linux names them
FEATURES = {"avx", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"}
FEATURES |= {"amx_tile", "amx_int8", "amx_bf16", "f16c", "fma", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"}
# Values of options that are shown; any other text may be a name, an address, a key or a prompt.
WORDS = {*CODECS, "auto", "on", "off", "yes", "no", "true", "false", "cpu", "cuda", "mps", "xpu", "prompt-lookup"}
WORDS |= {"mtp", "float32", "bfloat16", "float16", "int8", "int8-int4", "int4"}
AMOUNT = r"\d+(\.\d+)?[KMGT]iB|\d+:\d+"  # such as `8GiB`, or the blocks `0:16`
SET = "set"  # in place of all other values


def report(findings: Iterable[CheckResult], options: Iterable[tuple[str, Setting, Any]]) -> dict[str, Any]:
    """The report as JSON. options: as `splitnet.cli.configuration.given_options`. Texts of findings are left out."""
    checks: dict[str, str] = {}
    for finding in findings:
        checks[finding.check] = f"{checks.get(finding.check, '')} {finding.status}".strip()
    return {
        "versions": {
            "splitnet": __version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in LIBRARIES},
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
        },
        "system": _system(),
        "cpu": _cpu(),
        "memory": _memory(),
        "devices": find_present(tried=False).devices,
        "checks": checks,
        "options": {name: shown(setting, value) for name, setting, value in options},
    }


def shown(setting: Setting, value: Any) -> str:
    """The value of an option if it is a number, a switch or a word that splitnet knows, else `SET`."""
    text = str(value.value if isinstance(value, Enum) else value).strip()
    words = {str(each.value) for each in setting.kind} if issubclass(setting.kind, Enum) else WORDS
    if text.lower() in words or re.fullmatch(AMOUNT, text, re.ASCII):
        return text
    if setting.kind in (bool, int, float):
        with suppress(ValueError):
            return f"{float(text):g}"
    return SET


def _system() -> dict[str, str]:
    """The system, without the names that its owner gave to kernel and machine."""
    number = re.match(r"[\d.]*", platform.release(), re.ASCII)
    told = {"name": platform.system(), "release": number[0] if number else "", "machine": platform.machine()}
    with suppress(OSError):
        found = platform.freedesktop_os_release()
        told["distribution"] = f"{found['ID']} {found.get('VERSION_ID', '')}".strip()
    return told | {"libc": " ".join(platform.libc_ver())}


def _cpu() -> dict[str, Any]:
    told: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        told["features"] = sorted(FEATURES.intersection(flags.split()))
    with suppress(KernelsError):  # `SPLITNET_KERNELS` names none of the kernels
        from splitnet.quant.native import have_threads, kernels_here, path_in_use, prefetch_in_use, processor

        told |= {"model": processor(), "kernels": kernels_here().name.lower(), "path": path_in_use()}
        told |= {"prefetch": str(prefetch_in_use()), "kernels have threads": have_threads()}
    return told


def _memory() -> dict[str, str]:
    told = {"free": gib(free_memory("cpu"))}
    with suppress(AttributeError, ValueError):  # not on Windows
        told["total"] = gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return told
