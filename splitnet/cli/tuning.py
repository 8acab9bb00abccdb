"""What `tune` does: rows from examples, a model with an adapter, steps with progress, and the files of the run."""

from __future__ import annotations

import hashlib
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from splitnet.cli.connection import Connection
from splitnet.cli.extras import has
from splitnet.cli.tuning_model import ModelToTune
from splitnet.cli.tuning_progress import TuningProgress
from splitnet.errors import SplitnetError
from splitnet.model.checkpoint import Checkpoint
from splitnet.tuning.data import Examples
from splitnet.tuning.encoding import Encoded, Encoder
from splitnet.tuning.evaluation import Evaluation, evaluate
from splitnet.tuning.folder import TuningFolder
from splitnet.tuning.loss_curve import draw_loss_curve
from splitnet.tuning.methods import AdapterOptions, Method
from splitnet.tuning.run import TuningRun
from splitnet.tuning.settings import Settings

LONGEST_ROW = 1024
"""Tokens per row where the user sets none."""


@dataclass(frozen=True)
class Tuning:
    """One call of the command; see its options."""

    method: Method
    options: AdapterOptions
    settings: Settings
    train: Examples
    held_out: Examples | None
    template: str
    head: bool
    max_length: int | None
    eval_every: int
    save_every: int
    output: Path
    resume: bool
    way: Sequence[str]
    """The arguments with which commands reach the model."""

    def run(self, connection: Connection) -> None:
        """Trains to the last step, or until the user stops it.

        Raises:
            SplitnetError: what went wrong; steps that were done are kept in the output folder.
        """
        checkpoint = connection.checkpoint()
        tokenizer = checkpoint.tokenizer()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        encoder = self._encoder(checkpoint, tokenizer)
        rows = encoder.encode(self.train)
        held_out = encoder.encode(self.held_out) if self.held_out else []
        classified = self.train.form == "classification"
        words = encoder.words() if classified and not self.head else None
        facts = connection.facts_of(checkpoint)
        folder = TuningFolder(self.output)
        description = self._description(facts.fingerprint)
        folder.check(description, resume=self.resume)
        swarm = connection.swarm_of(facts)
        try:
            torch.manual_seed(self.settings.seed)
            labels = self.train.labels if self.head else None
            maker = ModelToTune(checkpoint, swarm, connection, tokenizer, pad, labels)
            adapted = maker.with_adapter(self.method, self.options, self._beginning())
            folder.begin(description)
            run = TuningRun(adapted, rows, self.settings, pad=pad, head=self.head, device=connection.computes_on)
            _Training(self, run, folder, held_out, words, pad).train()
        finally:
            swarm.close()
        self._print_next()

    def _encoder(self, checkpoint: Checkpoint, tokenizer: Any) -> Encoder:
        virtual = self.options.virtual_tokens(self.method)
        room = checkpoint.max_positions - virtual if checkpoint.max_positions else None
        wanted = self.max_length or min(LONGEST_ROW, room or LONGEST_ROW)
        if room is not None and wanted > room:
            raise SplitnetError(
                f"{wanted:,} tokens and {virtual} virtual ones are more than the model's context of "
                f"{checkpoint.max_positions:,}: lower --max-length to {room:,}"
            )
        return Encoder(tokenizer, wanted, template=self.template, labels=self.train.labels, head=self.head)

    def _beginning(self) -> str:
        """What prompts and prefixes begin as: words that say what the examples show."""
        if self.options.init_text is not None:
            return self.options.init_text
        if self.train.form == "classification":
            return f"Tell the label of the text. The labels are {', '.join(self.train.labels)}."
        return "Write what follows in the way of the examples that you have seen."

    def _description(self, fingerprint: str) -> dict[str, Any]:
        """What makes two runs the same."""
        return {
            "model": fingerprint,
            "data": _digest(self.train.path),
            "evaluation": _digest(self.held_out.path) if self.held_out else None,
            "method": self.method,
            **asdict(self.options),
            **asdict(self.settings),
            "template": self.template,
            "head": self.head,
            "max_length": self.max_length,
            "labels": self.train.labels,
        }

    def _print_next(self) -> None:
        if self.head:
            typer.echo("Use it: splitnet.AutoModelForSequenceClassification and peft.PeftModel, see docs/tuning.md.")
            return
        command = ["splitnet", "chat" if self.train.form == "chat" else "generate", *self.way]
        command += ["--adapter", str(self.output)]
        if self.train.form != "chat":
            command += [
                "--raw",
                self.template.replace("{text}", "...") if self.train.form == "classification" else "...",
            ]
        typer.echo(f"Use it: {shlex.join(command)}")


class _Training:
    """Steps, evaluations and files of a run until its end, or until it is stopped."""

    def __init__(
        self,
        tuning: Tuning,
        run: TuningRun,
        folder: TuningFolder,
        held_out: Sequence[Encoded],
        words: Sequence[int] | None,
        pad: int,
    ) -> None:
        self._tuning = tuning
        self._run = run
        self._folder = folder
        self._held_out = held_out
        self._words = words
        self._pad = pad
        self._progress = TuningProgress(tuning.settings.steps)

    def train(self) -> None:
        """Trains.

        Raises:
            SystemExit: it was stopped; all is saved.
        """
        run, steps = self._run, self._tuning.settings.steps
        saved = self._folder.load_checkpoint() if self._tuning.resume else None
        if saved:
            run.restore(*saved)
        self._folder.metrics(until=run.done if saved else -1)
        typer.echo(
            f"{self._tuning.method}: {run.trained_parameters:,} trained parameters, "
            f"{len(self._tuning.train.rows):,} examples" + (f", going on after step {run.done}" if saved else ""),
            err=True,
        )
        with self._progress, _stop_signals() as stopped:
            try:
                self._evaluate_if_due()
                while run.done < steps and not stopped:
                    self._step()
                    self._evaluate_if_due()
            except SplitnetError:
                if run.done:
                    typer.echo(f"{run.done} steps are saved; the same command with --resume goes on.", err=True)
                raise
            finally:
                self._save()
        self._report(stopped[0] if stopped else None)

    def _step(self) -> None:
        began = time.perf_counter()
        moved = self._run.model.training_bytes
        step = self._run.step()
        seconds = time.perf_counter() - began
        sent, received = (after - before for before, after in zip(moved, self._run.model.training_bytes, strict=True))
        line = {
            "step": step.number,
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "gradient_norm": step.gradient_norm,
            "tokens": step.tokens,
            "seconds": round(seconds, 4),
            "sent_bytes": sent,
            "received_bytes": received,
        }
        self._folder.add_metrics(line)
        self._progress.stepped(step, step.tokens / seconds)
        if step.number % self._tuning.save_every == 0:
            self._folder.save_checkpoint(*self._run.state())

    def _evaluate_if_due(self) -> None:
        done, every = self._run.done, self._tuning.eval_every
        due = done in (0, self._tuning.settings.steps) or (every and done % every == 0)
        if not self._held_out or not due:
            return
        if not any(line["step"] == done and "eval_loss" in line for line in self._folder.metrics()):
            self._evaluate()

    def _evaluate(self) -> None:
        with self._progress.evaluating(len(self._held_out)) as advance:
            result = evaluate(
                self._run.model,
                self._held_out,
                batch_size=self._tuning.settings.batch_size,
                pad=self._pad,
                words=self._words,
                head=self._tuning.head,
                advance=advance,
                device=self._run.device,
            )
        self._folder.add_metrics({"step": self._run.done, "eval_loss": result.loss, "eval_accuracy": result.accuracy})
        self._progress.say(f"step {self._run.done}: {_told(result)}")

    def _save(self) -> None:
        """All that was done so far, also when an error ends the run."""
        if not self._run.done:
            return
        self._folder.save_checkpoint(*self._run.state())
        self._folder.save_adapter(self._run.model)
        if not has("plot"):
            return
        metrics = self._folder.metrics()
        title = f"{self._tuning.method}, {self._tuning.train.path.name}"
        self._folder.save_chart(lambda path: draw_loss_curve(metrics, title, path))

    def _report(self, stopped_by: int | None) -> None:
        done, output = self._run.done, self._tuning.output
        if stopped_by is not None:
            typer.echo(f"Stopped after step {done}; nothing is lost. The same command with --resume goes on.", err=True)
            raise SystemExit(128 + stopped_by)
        evaluations = [line for line in self._folder.metrics() if "eval_loss" in line]
        if len(evaluations) > 1:
            ends = (evaluations[0], evaluations[-1])
            before, after = (Evaluation(line["eval_loss"], line["eval_accuracy"]) for line in ends)
            typer.echo(f"Before: {_told(before)}. After {done} steps: {_told(after)}.")
        if has("plot"):
            typer.echo(f"The adapter, metrics.jsonl and loss.png are in {output}.")
        else:
            typer.echo(f"The adapter and metrics.jsonl are in {output}. For loss.png: `pip install 'splitnet[plot]'`.")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects the first signal to stop, so that the running step can be finished; a second one ends at once."""
    stopped: list[int] = []

    def note(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        typer.echo("Stopping after this step; once more to stop at once.", err=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(result: Evaluation) -> str:
    accuracy = f", accuracy {result.accuracy:.1%}" if result.accuracy is not None else ""
    return f"held-out loss {result.loss:.4f}{accuracy}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
