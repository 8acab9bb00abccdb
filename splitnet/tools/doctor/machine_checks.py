"""The results of checks, and checks of the machine: Python, libraries, devices, kernels, disk, and the key."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from scheduler.placement import BLOCKS_SHARE
from splitnet import foreign_modules
from splitnet.blocks.chosen_device import AUTO, find_device, find_present
from splitnet.blocks.client_part import check_all_is_taken
from splitnet.blocks.model_sizes import ModelSizes
from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.errors import KernelsError, KeyFileError, SplitnetError
from splitnet.security.identity import Identity, default_key_file


class Status(StrEnum):
    """The result of a check."""

    passed = "pass"
    warned = "warn"  # something may be wrong, or is wrong for some uses
    failed = "fail"  # the setup cannot work


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check in words; if it did not pass, the problem and its fix."""

    check: str
    text: str
    status: Status


passed = partial(CheckResult, status=Status.passed)
warned = partial(CheckResult, status=Status.warned)
failed = partial(CheckResult, status=Status.failed)


_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def software() -> Iterator[CheckResult]:
    """Checks Python and the libraries against the package's requirements, and finds modules that hide splitnet's."""
    yield from (failed("libraries", sentence) for sentence in foreign_modules())
    try:
        package = metadata.distribution("splitnet")
    except metadata.PackageNotFoundError:
        yield warned("python", "splitnet is not installed, so its requirements are unknown: run `pip install .` there")
        return
    yield python_version(package.metadata["Requires-Python"], platform.python_version())
    yield from libraries(package.requires or (), installed_version)


def python_version(required: str, version: str) -> CheckResult:
    """Whether a version of Python satisfies `required`, such as `>=3.11`."""
    if SpecifierSet(required).contains(version, prereleases=True):
        return passed("python", version)
    return failed("python", f"this is Python {version}, splitnet needs {required}: install that, and splitnet in it")


def libraries(requirements: Sequence[str], installed: Callable[[str], str | None]) -> Iterator[CheckResult]:
    """Whether the required libraries of a package, without extras, are installed in versions that fit.

    installed: returns the version of a library; None: the library is not installed.
    """
    needed = [Requirement(text) for text in requirements]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = False
    for one in needed:
        version = installed(one.name)
        if version is not None and one.specifier.contains(version, prereleases=True):
            continue
        wrong = True
        state = "is not installed" if version is None else f"is {version}, splitnet needs {one.specifier}"
        yield failed("libraries", f"{one.name} {state}: run `pip install '{one.name}{one.specifier}'`")
    if not wrong:
        yield passed("libraries", f"{len(needed)} are installed, in versions that fit")


def devices(asked: str = AUTO) -> CheckResult:
    """The devices that torch can use, and the choice of `--device`."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return failed("devices", f"torch cannot be loaded ({error}): install it again, see https://pytorch.org")
    found = [f"cpu, {torch.get_num_threads()} threads on {os.cpu_count()} cores"]
    found += [f"{device}, {name}" for device, name in find_present(tried=False).devices.items()]
    text = f"torch {torch.__version__}: {'; '.join(found)}"
    try:
        text = f"{text}; --device {asked} is {find_device(asked)}"
    except SplitnetError as error:
        return failed("devices", f"{text}; {error}")
    if _NVIDIA_DRIVER.exists() and not torch.cuda.is_available():
        return warned(
            "devices", f"{text}; there is an NVIDIA driver, but this torch cannot use it: install one with CUDA"
        )
    return passed("devices", text)


def kernels() -> CheckResult:
    """Whether splitnet's kernels are compiled, and which of them this CPU uses."""
    try:
        from splitnet.quant.native import Kernels, have_threads, kernels_here, load_error, path_in_use, prefetch_in_use
    except (ImportError, OSError) as error:
        return failed("kernels", f"torch cannot be loaded ({error}): install it again, see https://pytorch.org")
    except KernelsError as error:
        return failed("kernels", str(error))
    found = kernels_here()
    if found is Kernels.NONE:
        fix = (
            "install a wheel of splitnet for this system; or a C compiler and Python's headers (Debian: apt install "
            "gcc python3-dev), then splitnet anew with `pip install --force-reinstall --no-deps .`"
        )
        if sys.platform == "win32":
            fix = "Microsoft's compiler, which pip takes on Windows, cannot compile them"
        return warned("kernels", f"{load_error}, so CPUs decode more slowly: {fix}")
    used = "plain loops are used, and torch's products where they are faster"
    if found is Kernels.FAST:
        used = f"{path_in_use()} is used, with prefetch {prefetch_in_use()}"
    text = f"compiled; {used}"
    if not have_threads():
        return warned(
            "kernels",
            f"{text}, with one thread: torch {metadata.version('torch')} has no OpenMP whose threads they could use: "
            "install another build of it, see https://pytorch.org",
        )
    return passed("kernels", text)


def disk(folder: Path, needed: int) -> CheckResult:
    """Whether a cache folder is writable and has room for `needed` more bytes."""
    there = nearest_folder(folder)
    if not os.access(there, os.W_OK):
        return failed("disk", f"{there} cannot be written to: change its owner, or set HF_HOME to another folder")
    free = shutil.disk_usage(there).free
    if free < needed:
        return warned(
            "disk",
            f"{gib(free)} are free for {folder}, the whole model takes {gib(needed)}: that is enough for some of its "
            "blocks only; make room, or set HF_HOME to a folder on another disk",
        )
    return passed("disk", f"{gib(free)} are free for {folder}")


def key_of(path: Path | None) -> tuple[CheckResult, Identity | None]:
    """Whether the machine's key, in `path` or the user's file, is usable. Also returns the key, if it exists."""
    path = path or default_key_file()
    try:
        if path.exists():
            return passed("key", f"{path} holds a key that only its owner can read"), Identity.load_or_create(path)
    except KeyFileError as error:
        return failed("key", str(error)), None
    except OSError as error:
        return failed("key", f"{path} cannot be searched ({error.strerror}): change the owner of its folder"), None
    folder = nearest_folder(path.parent)
    if not os.access(folder, os.W_OK):
        return failed("key", f"{path} cannot be made: change the owner of {folder}, or give --key-file"), None
    return passed("key", f"there is no key yet; {path} is created when a command needs it"), None


def nearest_folder(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def installed_version(name: str) -> str | None:
    """The version of an installed library, else None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


SHOWN_DIGITS = 12  # Number of digits of a fingerprint that are printed


def open_model(model: str) -> tuple[CheckResult, Checkpoint | None]:
    """Opens a folder, a file or a hub id, and reads a little of every shard. Returns the checkpoint if it is usable."""
    try:
        checkpoint = Checkpoint.open(model)
        blocks = len(checkpoint.block_tensors)
        check_all_is_taken(checkpoint)
        mark = f"fingerprint {checkpoint.fingerprint[:SHOWN_DIGITS]}" if checkpoint.knows_manifest else "not all here"
    except SplitnetError as error:
        return failed("model", str(error)), None
    except (OSError, ValueError, KeyError, TypeError) as error:  # damaged files can raise any of these
        return failed("model", f"the files of {model} are damaged ({error!r}): download it again"), None
    return passed("model", f"{checkpoint.name}, {checkpoint.model_type}, {blocks} blocks, {mark}"), checkpoint


def memory(sizes: ModelSizes, free: int) -> CheckResult:
    """Whether blocks of the model fit in the share of `free` bytes that a peer uses by default."""
    fitting = min(sizes.num_blocks, int(free * BLOCKS_SHARE) // sizes.block_bytes)
    block = f"{sizes.block_bytes / 2**20:.0f} MiB as {sizes.held_as}"
    if fitting:
        return passed("memory", f"{gib(free)} are free: room for {fitting} of {sizes.num_blocks} blocks ({block} each)")
    if free >= sizes.client_part_bytes:
        return warned(
            "memory",
            f"{gib(free)} are free: enough for a client, but not for one block ({block}) and its KV caches; free some, "
            "or serve with smaller --weights",
        )
    return failed(
        "memory",
        f"{gib(free)} are free, and a client of {sizes.name} takes {gib(sizes.client_part_bytes)}: "
        "end other programs, or use a smaller model",
    )


def room_on_disk(model: str, sizes: ModelSizes | None) -> CheckResult:
    """Whether the hub's cache has room for the download."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(model).expanduser().exists():
        return passed("disk", "the model is read from its present place, nothing is downloaded")
    whole = 0
    if sizes:
        plain = sizes.num_blocks * (sizes.block_bytes + sizes.saved_bytes) + sizes.client_part_bytes
        whole = sizes.file_bytes or plain
    return disk(Path(HF_HUB_CACHE), whole)
