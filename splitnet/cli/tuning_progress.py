"""Progress of training, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from splitnet.tuning.run import Step

LINE_EVERY_S = 10.0
"""How often a line is written where there is no terminal."""


class TuningProgress:
    """A bar with loss, tokens/s and remaining time on a terminal; a line now and then where there is none."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._training = self._bars.add_task("training", total=steps, facts="")
        self._line_at = 0.0

    def __enter__(self) -> TuningProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stepped(self, step: Step, tokens_per_s: float) -> None:
        """Shows that a step is done."""
        facts = f"loss {step.loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        self._bars.update(self._training, completed=step.number, facts=facts)
        now = time.monotonic()
        due = now - self._line_at >= LINE_EVERY_S or step.number == self._steps
        if due and not self._console.is_terminal:
            self._line_at = now
            self.say(f"step {step.number} of {self._steps}: {facts}")

    @contextmanager
    def evaluating(self, rows: int) -> Iterator[Callable[[int], None]]:
        """Shows an evaluation; gives the function to tell how many more rows are done."""
        task = self._bars.add_task("evaluating", total=rows, facts="")
        try:
            yield lambda done: self._bars.advance(task, done)
        finally:
            self._bars.remove_task(task)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
