"""`splitnet tune --plan`: the cost of a method, estimated from some measured steps."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import typer

from splitnet.cli.tables import table
from splitnet.tools.tune.methods import TrainingSettings
from splitnet.tools.tune.run import Encoded, TuningRun
from splitnet.tools.tune.side_tuner import SideTuner

MEASURED = 3  # Number of measured steps, after a first step that opens routes and sends the adapter
_RESET_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Cost:
    """The estimated cost of a method.

    states_s, states_bytes, disk_bytes: time, traffic and disk space of the hidden states of all examples, which are
    sent only once. first_s: additional time of the first step. step_bytes: bytes that the client sends and receives per
    step. states_joules, step_joules: energy of peers; nan: some peers do not state their power. client_bytes: growth of
    the client's memory; None: unknown.
    """

    method: str
    examples: int
    trained: int
    states_s: float
    states_bytes: tuple[int, int]
    disk_bytes: int
    first_s: float
    step_s: float
    step_bytes: tuple[float, float]
    states_joules: float
    step_joules: float
    client_bytes: int | None

    def seconds(self, steps: int) -> float:
        """Duration of a run without evaluations."""
        return self.states_s + self.first_s + steps * self.step_s

    def moved_bytes(self, steps: float) -> tuple[float, float]:
        """Bytes sent and received in a run of this many steps."""
        sent, received = (once + steps * each for once, each in zip(self.states_bytes, self.step_bytes, strict=True))
        return sent, received


def first_rows(rows: Sequence[Encoded], settings: TrainingSettings) -> list[Encoded]:
    """Rows for the measured steps, evenly distributed over the file."""
    count = min(len(rows), (1 + MEASURED) * settings.batch_size)
    return [rows[place * len(rows) // count] for place in range(count)]


def measured(method: str, run: TuningRun, rows: Sequence[Encoded], held_out: Sequence[Encoded]) -> Cost:
    """Measures steps of a run over some of all `rows`. held_out: rows for evaluation. Raises the errors of a step."""
    model = run.model
    disk_bytes, share, states_joules = 0, 1.0, 0.0
    with _peak() as peak:
        began, before = time.perf_counter(), model.training_bytes
        if isinstance(model, SideTuner):
            model.compute_states(run.pad, lambda told: None, [])
            states_joules = model.training_joules
            different = {tuple(row.ids) for row in (*rows, *held_out)}
            share = sum(map(len, different)) / sum(len(row.ids) for row in model.rows)
            disk_bytes = int(model.disk_bytes * share)
        states_s, filled, joules = time.perf_counter() - began, model.training_bytes, model.training_joules
        times: list[float] = []
        moved = now = filled
        for _ in range(1 + MEASURED):
            began, moved = time.perf_counter(), now
            run.take_step()
            times.append(time.perf_counter() - began)
            now = model.training_bytes
    step_s = sum(times[1:]) / MEASURED
    return Cost(
        method,
        len(rows),
        run.trained_parameters,
        states_s * share if disk_bytes else 0.0,
        (int((filled[0] - before[0]) * share), int((filled[1] - before[1]) * share)),
        disk_bytes,
        max(0.0, times[0] - step_s),
        step_s,
        (now[0] - moved[0], now[1] - moved[1]),
        states_joules * share,
        (model.training_joules - joules) / (1 + MEASURED),
        peak[0] if peak else None,
    )


def print_costs(costs: Sequence[Cost], settings: TrainingSettings) -> None:
    """Prints a row per method, the fastest first, for an epoch and for a run."""
    examples = costs[0].examples
    steps = examples / settings.batch_size
    title = f"{settings.steps} steps of {settings.batch_size}, {settings.steps / steps:.1f} times {examples:,} examples"
    heads = ["trained", "first\nepoch", "each\nlater", "whole\nrun"]
    heads += ["sent\nMB", "received\nMB", "client\nMiB", "disk\nMiB"]
    joules = {cost.method: cost.states_joules + settings.steps * cost.step_joules for cost in costs}
    told = any(map(math.isfinite, joules.values()))
    heads += ["peers\nkJ"] if told else []
    rows: list[list[str]] = []
    for cost in sorted(costs, key=lambda cost: cost.seconds(settings.steps)):
        seconds = [cost.seconds(1) + (steps - 1) * cost.step_s, steps * cost.step_s, cost.seconds(settings.steps)]
        rows.append(
            [
                cost.method,
                f"{cost.trained:,}",
                *(f"{each:,.1f}" for each in seconds),
                *(f"{each / 1e6:,.1f}" for each in cost.moved_bytes(settings.steps)),
                "?" if cost.client_bytes is None else f"{cost.client_bytes / 2**20:,.0f}",
                f"{cost.disk_bytes / 2**20:,.0f}",
                *([f"{joules[cost.method] / 1000:,.2f}"] if told else ()),
            ]
        )
    typer.echo(table(["method", *heads], rows, heads, title=title))
    typer.echo(
        "Epochs and run in seconds, without evaluations; sent and received: by the client in the whole run; client: "
        "growth of the client's memory."
    )


@contextmanager
def _peak() -> Iterator[list[int]]:
    """After the `with`, the list holds the maximum growth of this process's memory in bytes, if known."""
    grown: list[int] = []
    before = 0
    if sys.platform == "linux":
        with suppress(OSError):
            _RESET_PEAK.write_text("5", encoding="ascii")
            before = _status("VmRSS")
    yield grown
    if before:
        grown.append(max(0, _status("VmHWM") - before))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
