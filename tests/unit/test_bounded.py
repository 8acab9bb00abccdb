"""A separate process for work on untrusted input."""

from __future__ import annotations

import threading

import pytest

from splitnet import bounded
from splitnet.bounded import BoundedProcess
from splitnet.errors import SplitnetError


def rendered(process: BoundedProcess, template: str) -> str | None:
    question = {"template": template, "messages": [], "tools": None, "answer": False, "variables": {}}
    answer, error = process.ask(question)
    assert (answer is None) is (error is not None)
    return answer


def test_one_process_answers_questions_in_turn() -> None:
    process = BoundedProcess("template")
    answers: list[str | None] = []
    threads = [threading.Thread(target=lambda n=n: answers.append(rendered(process, f"{n}"))) for n in range(8)]
    try:
        assert rendered(process, "first") == "first"
        running = process._running
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(filter(None, answers)) == [f"{n}" for n in range(8)]
        assert rendered(process, "{{ 'a' * 1500000000 }}") is None
        assert rendered(process, "last") == "last"
        assert process._running is running
    finally:
        process.kill_process()


def test_the_error_of_a_process_that_does_not_start_names_a_command() -> None:
    process = BoundedProcess("unknown")
    with pytest.raises(SplitnetError, match=r"run `.*bounded_program.py unknown` to see why"):
        process.ask(None)
    process.kill_process()


def test_a_late_answer_ends_the_process_and_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = BoundedProcess("template")
    try:
        assert rendered(process, "first") == "first"
        running = process._running
        monkeypatch.setattr(bounded, "ANSWER_S", 0.1)
        assert (
            rendered(process, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}") is None
        )
        assert running is not None and running.returncode is not None and running.stdout is not None
        assert running.stdout.closed
        monkeypatch.undo()
        assert rendered(process, "another") == "another"
    finally:
        process.kill_process()
