"""The dashboard reads only new metrics of a run of `splitnet tune`, and all again when the run has gone back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitnet.serve.dashboard import POINTS, TunedRun


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 1 / step, "tokens": 10, "seconds": 0.5, "sent_bytes": 3, **more}) + "\n"


def test_complete_lines_are_read(tmp_path: Path) -> None:
    run = TunedRun(tmp_path)
    assert run.read_run()["losses"] == []
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(1) + line(2)[:9])
    assert run.read_run()["losses"] == [[1, 1.0]]
    file.write_text(line(1) + line(2, joules=2.5) + json.dumps({"step": 2, "eval_loss": 0.5}) + "\n")
    told = run.read_run()
    assert told["losses"] == [[1, 1.0], [2, 0.5]]
    assert [each["eval_loss"] for each in told["evaluations"]] == [0.5]
    assert (told["tokens"], told["sent_bytes"], told["joules"], told["tokens_per_s"]) == (20, 6, 2.5, 20.0)


def test_a_run_that_continues_from_an_earlier_step_is_read_again(tmp_path: Path) -> None:
    run, file = TunedRun(tmp_path), tmp_path / "metrics.jsonl"
    file.write_text("".join(line(step) for step in range(1, 6)))
    run.read_run()
    file.write_text(line(1))
    assert run.read_run()["losses"] == [[1, 1.0]]


def test_long_runs_are_thinned_and_end_with_the_last_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(line(step) for step in range(1, 7 * POINTS)))
    losses = TunedRun(tmp_path).read_run()["losses"]
    assert POINTS <= len(losses) <= 2 * POINTS and losses[-1][0] == 7 * POINTS - 1
