"""Whether the model can be read and cut, and whether the machine has room for its blocks."""

from __future__ import annotations

from pathlib import Path

from scheduler.placement import BLOCKS_SHARE
from splitnet.doctor.finding import Finding, failed, passed, warned
from splitnet.doctor.machine import disk, gib
from splitnet.errors import SplitnetError
from splitnet.model.checkpoint import Checkpoint
from splitnet.model.shell import check_all_is_taken
from splitnet.model.sizes import ModelSizes

SHOWN_DIGITS = 12
"""Of a fingerprint."""


def open_model(model: str) -> tuple[Finding, Checkpoint | None]:
    """Opens a folder, a file or a hub id, and reads a little of every shard.

    Returns:
        What was found, and the checkpoint if it can be used.
    """
    try:
        checkpoint = Checkpoint.open(model)
        blocks = len(checkpoint.block_tensors)
        check_all_is_taken(checkpoint)
        mark = f"fingerprint {checkpoint.fingerprint[:SHOWN_DIGITS]}" if checkpoint.knows_manifest else "not all here"
    except SplitnetError as error:
        return failed("model", str(error)), None
    except (OSError, ValueError, KeyError, TypeError) as error:  # damaged files can be anything
        return failed("model", f"the files of {model} are damaged ({error!r}): download it again"), None
    return passed("model", f"{checkpoint.name}, {checkpoint.model_type}, {blocks} blocks, {mark}"), checkpoint


def memory(sizes: ModelSizes, free: int) -> Finding:
    """Whether blocks of the model fit, as many as a peer takes that is not told otherwise.

    Args:
        free: bytes.
    """
    fitting = min(sizes.num_blocks, int(free * BLOCKS_SHARE) // sizes.block_bytes)
    block = f"{sizes.block_bytes / 2**20:.0f} MiB as {sizes.held_as}"
    if fitting:
        return passed("memory", f"{gib(free)} are free: room for {fitting} of {sizes.num_blocks} blocks ({block} each)")
    if free >= sizes.shell_bytes:
        return warned(
            "memory",
            f"{gib(free)} are free: enough for a client, but not for one block ({block}) and its KV caches; free some, "
            "or serve with smaller --weights",
        )
    return failed(
        "memory",
        f"{gib(free)} are free, and a client of {sizes.name} takes {gib(sizes.shell_bytes)}: end other programs, or "
        "use a smaller model",
    )


def room_on_disk(model: str, sizes: ModelSizes | None) -> Finding:
    """Whether what comes from the hub has room in its cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(model).expanduser().exists():
        return passed("disk", "the model is read from where it lies, nothing is downloaded")
    whole = 0
    if sizes:
        plain = sizes.num_blocks * (sizes.block_bytes + sizes.saved_bytes) + sizes.shell_bytes
        whole = sizes.file_bytes or plain
    return disk(Path(HF_HUB_CACHE), whole)
