"""Folders and files of splitnet, lists that people write, and figures that are kept between runs."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

MAX_KNOWN: Final = 64  # Largest number of figures that a file of `KnownFigures` keeps; the latest are kept
_COMMENT = re.compile(r"(?:^|\s)#.*", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def cache_folder() -> Path:
    """The folder of the demo model, weights and measured figures. `SPLITNET_CACHE` names another folder."""
    override = os.environ.get("SPLITNET_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("splitnet"))


def public_name(source: str) -> str:
    """A checkpoint's name for files and other users: its hub id or path, without the path of the cache folder."""
    path = Path(source)
    return path.name.removesuffix(".gguf") if cache_folder() in path.parents else source


def is_on_hub(name: str) -> bool:
    """Whether an untrusted name is the name of a model on the hub, and not of a file of this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a list with their numbers from 1, without blank lines, comments (from a # at the beginning of a line
    or after white space) and the byte order mark of some editors."""
    for number, line in enumerate(re.split(r"\r\n?|\n", text.removeprefix("\ufeff")), start=1):
        if kept := _COMMENT.sub("", line).strip():
            yield number, kept


def keep_file(file: Path, data: bytes, what: str) -> None:
    """Writes a file atomically, so that no process reads half of it. A failure is logged; `what` names the data."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        log.info("%s are not kept in %s: %s", what, file, error.strerror)


class KnownFigures:
    """A JSON file of figures that were measured on this machine, by key. An unreadable file counts as empty; a failure
    to write is logged."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def find_figure(self, key: str) -> Any:
        """The figure of a key, a JSON value; None: unknown."""
        return self._read_figures().get(key)

    def keep_figure(self, key: str, figure: Any) -> None:
        """Stores a figure in place of the previous one."""
        known = self._read_figures()
        known.pop(key, None)
        known[key] = figure
        latest = dict(list(known.items())[-MAX_KNOWN:])
        # Processes that write at the same time may lose each other's new figures, but no others.
        keep_file(self._file, json.dumps(latest, indent=1).encode(), "figures of this device")

    def _read_figures(self) -> dict[str, Any]:
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
