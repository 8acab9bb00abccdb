"""The folder of a training run. Its files are never partially written, and a run can resume from it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from splitnet.errors import DataError

if TYPE_CHECKING:
    import torch

# Separate folder for hidden states, because readers of heads load all safetensors in the folder of a config
WORK = "work"
CHECKPOINT = "checkpoint.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class TuningFolder:
    """The files of a run: the adapter in PEFT's format, the settings, metrics (a line per step and per evaluation), the
    loss curve, and the checkpoint from which a run resumes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings = path / "settings.json"
        self._metrics = path / "metrics.jsonl"
        self._checkpoint = path / CHECKPOINT

    def check_place(self, *, resume: bool) -> None:
        """Raises DataError if no run can begin here or, with `resume`, continue here. Needs no settings of a run."""
        if resume:
            if not self._settings.exists():
                raise DataError(f"{self.path} holds no run to continue: leave out --resume")
        elif self.path.is_dir() and any(path not in (self._settings, self._metrics) for path in self.path.iterdir()):
            found = "a run: continue it with --resume, or" if self._settings.exists() else "files:"
            raise DataError(f"{self.path} already holds {found} give another --output")
        there = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise DataError(f"cannot make {self.path} ({there} cannot be written): give another --output")

    def check_settings(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Raises the errors of `check_place`, and DataError if the folder holds a run with other settings."""
        self.check_place(resume=resume)
        if not resume:
            return
        settings = json.loads(json.dumps(settings))
        try:
            saved = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self._settings} cannot be read ({error}): train again with another --output") from None
        for name in [*saved, *settings]:
            if saved.get(name) != settings.get(name):
                raise DataError(
                    f"the run in {self.path} has {name} {saved.get(name)!r}, not {settings.get(name)!r}: continue "
                    "with the options of that run, or give another --output"
                )

    def claim(self, settings: dict[str, Any]) -> None:
        """Claims the folder for a run. Raises DataError if it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make {self.path} ({error.strerror}): give another --output") from None
        with self._replacing(self._settings) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def save_checkpoint(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], file: str = CHECKPOINT) -> None:
        from safetensors.torch import save_file

        with self._replacing(self.path / file) as partial:
            # safetensors refuses views without contiguous(), and its metadata may contain only texts.
            whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, partial, metadata={"facts": json.dumps(facts)})

    def load_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last checkpoint; None if no checkpoint exists. Raises DataError if the file is damaged."""
        if not self._checkpoint.exists():
            return None
        try:
            with safe_open(self._checkpoint, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
            return _finite_tensors(self._checkpoint), facts
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise DataError(f"{self._checkpoint} is damaged ({error}): train again with another --output") from error

    def save_adapter(self, model: Any) -> None:
        with self._writing(self.path), tempfile.TemporaryDirectory(dir=self.path, prefix=".adapter.") as folder:
            # "auto" asks the hub for the base model, to see whether embeddings were resized; here they never are.
            model.save_pretrained(folder, save_embedding_layers=False)
            for name in ADAPTER:
                with self._replacing(self.path / name) as partial:
                    (Path(folder) / name).replace(partial)

    def add_metrics(self, line: dict[str, Any]) -> None:
        with self._writing(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self, until: int | None = None) -> list[dict[str, Any]]:
        """The lines of the metrics. until: permanently removes the lines of steps after this step.

        After a crash, the file may contain steps after the last checkpoint, and an incomplete line.
        """
        lines: list[dict[str, Any]] = []
        if self._metrics.exists():
            for text in self._metrics.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    break
        if until is not None:
            lines = [line for line in lines if line["step"] <= until]
            with self._replacing(self._metrics) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return lines

    def save_chart(self, draw: Callable[[Path], None]) -> None:
        """Writes the loss curve; `draw` is called with the file to write."""
        with self._replacing(self.path / "loss.png") as partial:
            draw(partial)

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """Yields a file to write. Once the file is on the disk, it replaces `path`.

        Before that, the tensors in the file are read, and must be finite. After a DataError, `path` is unchanged.
        """
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            with self._writing(path):
                yield partial
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                if path.suffix == ".safetensors":
                    try:
                        _finite_tensors(partial)
                    except ValueError as error:
                        raise DataError(
                            f"{path} is unchanged, because {error}: start again with smaller steps"
                        ) from error
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    @contextmanager
    def _writing(path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot write {path} ({reason}): make room, then continue with --resume") from error


def _finite_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. Raises OSError and SafetensorError, and ValueError if a tensor is not finite."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is not finite")
    return tensors
