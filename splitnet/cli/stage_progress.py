"""Progress of long operations, on stderr."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from splitnet.logs import for_programs

log = logging.getLogger(__name__)


class StageProgress:
    """A context manager for progress: bars on a terminal, otherwise lines, or log events if stderr is for programs."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._for_programs = for_programs()
        self._live = self._console.is_terminal and not self._for_programs
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish_others("")
        self._bars.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of `total` (in any unit; 0: unknown) of a stage is done, and finishes earlier stages.

        Of the text `stage`, the part after `; ` may change between calls.
        """
        stage, _, detail = stage.partition("; ")
        if stage not in self._tasks:
            self._finish_others(stage)
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
            if self._for_programs:
                log.info("%s", stage)
            elif not self._live:
                print(f"{stage} ...", file=sys.stderr, flush=True)
        amount = f"{done / 2**20:,.0f} of {total / 2**20:,.0f} MiB from {detail}" if detail else ""
        self._bars.update(
            self._tasks[stage], description=f"{stage} {amount}".strip(), completed=done, total=total or None
        )

    def _finish_others(self, stage: str) -> None:
        for name, task in self._tasks.items():
            if name != stage:
                self._bars.update(task, total=1, completed=1)
