"""Hidden states of texts on the disk: peers compute them once, and every epoch reads them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitnet.tools.tune.folder import CHECKPOINT, TuningFolder
from splitnet.tools.tune.run import IGNORED, Encoded

log = logging.getLogger(__name__)


class States:
    """Texts and the hidden states that the model computes for them. Each file has several texts, and is written at
    once; a damaged file and all later files are written again.
    """

    def __init__(self, folder: TuningFolder) -> None:
        self.folder = folder
        self.files: list[Path] = []
        while (path := self._next_path).exists() and _is_sound(path):
            self.files.append(path)
        for path in sorted(folder.path.glob("*.safetensors")) if self._next_path.exists() else ():
            if path.name != CHECKPOINT and path not in self.files:
                log.warning("%s is damaged, or follows a damaged file: its states are computed again", path)
                path.unlink()

    @property
    def _next_path(self) -> Path:
        return self.folder.path / f"{len(self.files):05}.safetensors"

    @property
    def texts(self) -> int:
        return sum(len(lengths) for lengths in self.all("lengths"))

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def told_size(self) -> str:
        """A sentence for the user at the end of a run."""
        return f"{self.folder.path} holds {self.nbytes / 2**20:,.0f} MiB that are not needed any more."

    def add_texts(self, rows: Sequence[Encoded], states: Sequence[Tensor]) -> None:
        """Writes texts with their states, `[len(ids), size]` each, in 16 bits. Raises DataError if the disk is full."""
        packed = torch.cat(list(states)).cpu()
        halves = packed.to(torch.float16)  # more exact than bfloat16 if the values are in the range of float16
        tensors = {
            "ids": torch.tensor([token for row in rows for token in row.ids], dtype=torch.int32),
            "learned": torch.tensor([target != IGNORED for row in rows for target in row.targets]),
            "lengths": torch.tensor([len(row.ids) for row in rows], dtype=torch.int32),
            "states": halves if bool(halves.isfinite().all()) else packed.to(torch.bfloat16),
        }
        path = self._next_path
        self.folder.save_checkpoint(tensors, {"sha256": _digest(tensors)}, path.name)
        self.files.append(path)

    def all(self, name: str) -> Iterator[Tensor]:
        """The tensor `ids`, `learned` or `lengths` of each file, in order."""
        return (read(path, name) for path in self.files)

    def text_places(self) -> Iterator[tuple[tuple[int, ...], Path, int]]:
        """For each text: its token ids, its file, and the index of its first state in the file."""
        for path in self.files:
            first = 0
            for ids in read(path, "ids").split(read(path, "lengths").tolist()):
                yield tuple(ids.tolist()), path, first
                first += len(ids)


def parts_of(rows: Sequence[Encoded], positions: int) -> list[list[Encoded]]:
    """Rows in order, in parts of at most this many positions, including padding. Each part has at least one row."""
    parts: list[list[Encoded]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.ids))
        if parts and (len(parts[-1]) + 1) * longest <= positions:
            parts[-1].append(row)
        else:
            parts.append([row])
            longest = len(row.ids)
    return parts


def read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def states_of(path: Path, first: int, count: int) -> Tensor:
    """States `[count, size]`, float32."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice("states")[first : first + count].float()


def _is_sound(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            expected = json.loads((file.metadata() or {})["facts"])["sha256"]
            return _digest({name: file.get_tensor(name) for name in file.keys()}) == expected  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        return False


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
