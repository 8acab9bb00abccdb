"""The work of `tune`: rows from examples, a model with an adapter, steps with progress, and the files of the run."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from splitnet.checkpoint.checkpoint import Checkpoint
from splitnet.cli.arguments import has
from splitnet.cli.connection import ModelConnection
from splitnet.errors import NotFinite, SplitnetError
from splitnet.hf.causal_lm import RemoteCausalLM, attached
from splitnet.hf.classifier import attached_classifier
from splitnet.hf.image_text import attached_with_images
from splitnet.session.options import ConnectionOptions
from splitnet.swarm.swarm import Swarm
from splitnet.tools.tune.costs import MEASURED, Cost, first_rows, measured, print_costs
from splitnet.tools.tune.data import Examples
from splitnet.tools.tune.folder import WORK, TuningFolder
from splitnet.tools.tune.methods import (
    AdapterOptions,
    Method,
    PromptNetwork,
    Schedule,
    TrainingSettings,
    begin_prefix,
    with_new_adapter,
)
from splitnet.tools.tune.owner import JointRun, RoundLink
from splitnet.tools.tune.run import IGNORED, Encoded, Encoder, TuningRun, TuningStep, collate, pad_of, rows_at_once
from splitnet.tools.tune.side_tuner import SideTuner
from splitnet.tools.tune.states import States
from splitnet.wire.messages import RoundState, RoundWish

SMOOTHED_OVER = 10  # Number of steps that each point of the smoothed line averages


def draw_loss_curve(metrics: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Writes a PNG of the lines of `metrics.jsonl`."""
    from matplotlib.figure import Figure  # pyplot is not used, because it opens windows and has global state

    steps = [line["step"] for line in metrics if "loss" in line]
    losses = [line["loss"] for line in metrics if "loss" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss of the step")
    if len(losses) > SMOOTHED_OVER:
        windows = [losses[max(0, end - SMOOTHED_OVER) : end] for end in range(1, len(losses) + 1)]
        means = [sum(window) / len(window) for window in windows]
        axes.plot(steps, means, color="tab:blue", label=f"mean of {SMOOTHED_OVER} steps")
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="loss on held-out examples")
    accuracy = [(line["step"], line["eval_accuracy"]) for line in metrics if line.get("eval_accuracy") is not None]
    handles = axes.get_legend_handles_labels()
    if accuracy:
        right = axes.twinx()
        right.plot(*zip(*accuracy, strict=True), "s--", color="tab:green", label="accuracy on held-out examples")
        right.set_ylim(0, 1)
        right.set_ylabel("accuracy")
        handles = tuple(a + b for a, b in zip(handles, right.get_legend_handles_labels(), strict=True))
    axes.legend(*handles)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


LINE_EVERY_S = 10.0  # Seconds between lines of progress if stderr is not a terminal


class TuningProgress:
    """Shows progress within `bars`: loss, tokens/s and remaining time on a terminal, otherwise a line every
    `LINE_EVERY_S` seconds."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._training = self.bars.add_task("training", total=steps, facts="")
        self._line_at = 0.0

    def stepped(self, step: TuningStep, tokens_per_s: float) -> None:
        facts = f"loss {step.loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        self.bars.update(self._training, completed=step.number, facts=facts)
        now = time.monotonic()
        due = now - self._line_at >= LINE_EVERY_S or step.number == self._steps
        if due and not self._console.is_terminal:
            self._line_at = now
            self.say(f"step {step.number} of {self._steps}: {facts}")

    @contextmanager
    def evaluating(self, rows: int) -> Iterator[Callable[[int], None]]:
        """Shows an evaluation. Yields a function that the caller calls with the number of newly evaluated rows."""
        task = self.bars.add_task("evaluating", total=rows, facts="")
        try:
            yield lambda done: self.bars.advance(task, done)
        finally:
            self.bars.remove_task(task)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result on held-out examples."""

    loss: float  # mean over the learned tokens, or with a head over the examples
    accuracy: float | None  # share of examples with the right label; None if the examples have no labels


@torch.no_grad()
def evaluate(
    run: TuningRun, rows: Sequence[Encoded], words: Sequence[int] | None, advance: Callable[[int], None]
) -> Evaluation:
    """Evaluates the model of a run on rows, by forward passes.

    words: the first token of each label; the likeliest of these is the model's choice. None: the run has a head, or no
    labels. advance: called with the number of rows after each batch.
    """
    model, head, batch_size = run.model, run.head, rows_at_once(rows, run.settings.batch_size)
    model.eval()
    loss_sum, weight_sum, right = 0.0, 0, 0
    in_parts = not head and getattr(model, "loss_in_parts", False)
    by_length = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(by_length), batch_size):
        part = by_length[start : start + batch_size]
        places = _before_answers(part) if words is not None and not head else [-1] * len(part)
        kept: dict[str, Any] = {}
        if in_parts:
            asked = sorted(set(places))
            kept = {"logits_to_keep": torch.tensor(asked, device=run.device)}
            places = [asked.index(place) for place in places]
        output = model(**collate(part, run.pad, head=head, device=run.device), **kept)
        weight = len(part) if head else sum(row.learned for row in part)
        loss_sum += float(output.loss) * weight
        weight_sum += weight
        if head:
            right += sum(int(output.logits[index].argmax()) == row.choice for index, row in enumerate(part))
        elif words is not None:
            scores = [logits[place, list(words)] for logits, place in zip(output.logits, places, strict=True)]
            right += sum(int(one.argmax()) == row.choice for one, row in zip(scores, part, strict=True))
        advance(len(part))
    classified = head or words is not None
    return Evaluation(loss_sum / weight_sum, right / len(rows) if classified else None)


def _before_answers(rows: Sequence[Encoded]) -> list[int]:
    """The position before the first learned token of each row, from the row's end, as soft prompts precede rows."""
    longest = max(len(row.ids) for row in rows)
    return [next(at for at, target in enumerate(row.targets) if target != IGNORED) - 1 - longest for row in rows]


LONGEST_ROW = 1024  # Default maximum of tokens per row


@dataclass(frozen=True)
class ModelUse:
    """A model, its swarm, and the options with which this client uses the model."""

    checkpoint: Checkpoint
    swarm: Swarm
    options: ConnectionOptions
    tokenizer: Any

    @property
    def pad(self) -> int:
        return pad_of(self.tokenizer)


@dataclass(frozen=True)
class Tuning:
    """One call of the command, see its options."""

    method: Method
    options: AdapterOptions
    settings: TrainingSettings
    train: Examples
    held_out: Examples | None
    template: str
    head: bool
    max_length: int | None
    eval_every: int
    save_every: int
    output: Path
    resume: bool
    states_limit: int  # bytes of hidden states on the disk, for a side network
    join_args: Sequence[str]  # the arguments with which commands reach the model
    join_round: str | None = None  # name of the joint tuning, see `splitnet.tools.tune.rounds`
    named: Mapping[str, str] = field(default_factory=dict[str, str])  # given options, by parameter

    def run(self, connection: ModelConnection) -> None:
        """Trains to the last step, or until a signal stops the training. Raises SplitnetError; keeps finished steps."""
        checkpoint = connection.checkpoint()
        rows = self._rows(checkpoint)
        facts = connection.facts_of(checkpoint)
        if self.join_round is None:
            TuningFolder(self.output).check_settings(self._description(facts.fingerprint), resume=self.resume)
        with ExitStack() as stack:
            swarm = stack.enter_context(connection.swarm_of(facts))
            model = ModelUse(checkpoint, swarm, connection.options, checkpoint.tokenizer())
            if self.join_round is None:
                self._run(model, *rows)
                return
            link = stack.enter_context(RoundLink(swarm, self.join_round, len(rows[0])))
            typer.echo(f"joining the round {link.name} ...", err=True)
            settings = json.dumps(self._shared()).encode()
            joined = link.ask_round(RoundWish.JOIN, payload=settings, say=lambda text: typer.echo(text, err=True))
            agreed = self._agreed(joined[0])
            agreed._run(model, *agreed._rows(checkpoint), link=link, joined=joined)

    def _rows(self, checkpoint: Checkpoint) -> tuple[list[Encoded], list[Encoded], Sequence[int] | None]:
        """Rows for training, rows for evaluation, and the first token of each label, if words predict labels."""
        encoder = self._encoder(checkpoint, checkpoint.tokenizer())
        rows, held_out = (encoder.encode_file(each) if each else [] for each in (self.train, self.held_out))
        classified = self.train.form == "classification" and not self.head
        return rows, held_out, encoder.words() if classified else None

    def _run(
        self, model: ModelUse, rows: list[Encoded], held_out: list[Encoded], words: Sequence[int] | None, **joint: Any
    ) -> None:
        """joint: the joined round, as arguments of `JointRun`."""
        folder, description = TuningFolder(self.output), self._description(model.swarm.facts.fingerprint)
        folder.check_settings(description, resume=self.resume)
        torch.manual_seed(self.settings.seed)
        adapted = self._adapted(model, [*rows, *held_out])
        folder.claim(description)
        if isinstance(adapted, SideTuner):
            self._fill(adapted, folder, model.pad)
        progress = TuningProgress(self.settings.steps)
        kind, joint = (JointRun, joint | {"say": progress.say}) if joint else (TuningRun, {})
        run = kind(adapted, rows, self.settings, pad=model.pad, head=self.head, device=model.options.device, **joint)
        self._train(run, held_out, words, progress)
        if isinstance(adapted, SideTuner):
            typer.echo(adapted.states.told_size)
        if isinstance(run, JointRun):
            sent, received = joint["link"].moved
            typer.echo(
                f"{sent / 1e6:,.2f} MB of numbers were sent to the coordinator, {received / 1e6:,.2f} MB received."
            )
        self._print_next()

    def _shared(self) -> dict[str, Any]:
        """The settings that all owners of a round share, for JSON."""
        shared: dict[str, Any] = {**asdict(self.options), **asdict(self.settings), "method": self.method}
        del shared["accumulate"]  # depends on this machine's memory
        begun = self._beginning() if self.options.virtual_tokens(self.method) else None
        shared |= {"init_text": begun, "template": self.template, "max_length": self.max_length}
        return json.loads(json.dumps(shared))

    def _agreed(self, state: RoundState) -> Tuning:
        """A copy with the settings of a round.

        Raises SplitnetError if a given option contradicts the settings, or the settings are of another version.
        """
        own = self._shared()
        try:
            theirs = json.loads(bytes(state.payload))
            if theirs.keys() != own.keys():
                raise ValueError(", ".join(theirs.keys() ^ own.keys()))
            for name, value in theirs.items():
                right = isinstance(value, type(own[name])) or None in (value, own[name])
                if not right or (isinstance(value, int | float) and not 0 <= value < 2**63):
                    raise ValueError(f"{name} {value}")
                if name in self.named and value != own[name]:
                    raise SplitnetError(
                        f"{self.named[name]} is {own[name]!r}, and {value!r} in this round: leave it out"
                    )
            method = Method(theirs["method"])
            options = {each.name: theirs[each.name] for each in fields(AdapterOptions)}
            options |= {"network": PromptNetwork(options["network"]), "targets": tuple(options["targets"])}
            training = {each.name: theirs[each.name] for each in fields(TrainingSettings) if each.name in theirs}
            training |= {"schedule": Schedule(training["schedule"]), "accumulate": self.settings.accumulate}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise SplitnetError(
                f"the settings of this round are of another version ({error}): upgrade the older splitnet"
            ) from None
        typer.echo(f"round of {method}, {training['steps']} steps", err=True)
        how = {"method": method, "options": AdapterOptions(**options), "settings": TrainingSettings(**training)}
        return replace(self, **how, template=theirs["template"], max_length=theirs["max_length"])

    def plan(self, connection: ModelConnection) -> None:
        """Measures some steps of each method, and prints the cost of a run; keeps no files.

        Raises SplitnetError if no method is possible.
        """
        checkpoint = connection.checkpoint()
        costs: list[Cost] = []
        with connection.swarm(checkpoint) as swarm:
            model = ModelUse(checkpoint, swarm, connection.options, checkpoint.tokenizer())
            for method in Method:
                typer.echo(f"{method}: {1 + MEASURED} steps ...", err=True)
                try:
                    costs.append(self._cost(method, model))
                except SplitnetError as error:
                    typer.echo(f"{method} is not possible: {error}", err=True)
                # Models with remote blocks have reference cycles, so without a collection their memory would be counted
                # for the next model.
                gc.collect()
        if not costs:
            raise SplitnetError("no method is possible for this model and these options: see above")
        print_costs(costs, self.settings)

    def _cost(self, method: Method, model: ModelUse) -> Cost:
        if self.head and method is Method.SIDE:
            raise SplitnetError("side networks predict labels with the model's words: leave out --head")
        with tempfile.TemporaryDirectory() as folder:
            settings = replace(self.settings, learning_rate=method.learning_rate)
            one = replace(self, method=method, settings=settings, output=Path(folder))
            encoder = one._encoder(model.checkpoint, model.tokenizer)
            rows, held_out = (encoder.encode_file(each) if each else [] for each in (self.train, self.held_out))
            some = first_rows(rows, settings)
            adapted = one._adapted(model, some)
            run = TuningRun(adapted, some, settings, pad=model.pad, head=self.head, device=model.options.device)
            return measured(method, run, rows, held_out)

    def _fill(self, tuner: SideTuner, folder: TuningFolder, pad: int) -> None:
        """Lets the peers compute the states, and records the cost."""
        began, progress = time.perf_counter(), TuningProgress(self.settings.steps)
        with stop_signals("file of states") as stopped:
            tuner.compute_states(pad, progress.say, stopped)
        sent, received = tuner.training_bytes
        facts: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 4)}
        facts |= {"sent_bytes": sent, "received_bytes": received} | _joules(tuner.training_joules)
        if sent:
            folder.add_metrics({"step": -1, **facts})
        end_if(stopped, "Stopped")

    def _train(
        self, run: TuningRun, held_out: list[Encoded], words: Sequence[int] | None, progress: TuningProgress
    ) -> None:
        folder, steps = TuningFolder(self.output), self.settings.steps

        def save() -> None:
            folder.save_checkpoint(*run.saved_state())
            folder.save_adapter(run.model)

        def save_if_due() -> None:
            if run.done and run.done % self.save_every == 0:
                save()

        def look() -> None:
            done = run.done
            due = done in (0, steps) or (self.eval_every and done % self.eval_every == 0)
            if not held_out or not due:
                return
            if any(line["step"] == done and "eval_loss" in line for line in folder.metrics()):
                return
            with progress.evaluating(len(held_out)) as advance:
                result = evaluate(run, held_out, words, advance)
            if not math.isfinite(result.loss):
                raise run.overflow(f"the loss on held-out examples is {result.loss}")
            folder.add_metrics({"step": done, "eval_loss": result.loss, "eval_accuracy": result.accuracy})
            progress.say(f"step {done}: {_told(result)}")

        def keep() -> None:
            save()
            if has("plot"):
                metrics, title = folder.metrics(), f"{self.method}, {self.train.path.name}"
                folder.save_chart(lambda path: draw_loss_curve(metrics, title, path))

        run.sound = save_if_due  # called before an overflow, so that overflowing parameters replace no checkpoint
        saved = folder.load_checkpoint() if self.resume else None
        told = f"{self.method}: {len(self.train.rows):,} examples"
        take_steps(run, folder, progress, saved, told, look=look, keep=keep)
        evaluations = [line for line in folder.metrics() if "eval_loss" in line]
        if len(evaluations) > 1:
            ends = (evaluations[0], evaluations[-1])
            before, after = (Evaluation(line["eval_loss"], line["eval_accuracy"]) for line in ends)
            typer.echo(f"Before: {_told(before)}. After {run.done} steps: {_told(after)}.")
        if has("plot"):
            typer.echo(f"The adapter, metrics.jsonl and loss.png are in {self.output}.")
        else:
            plot = "For loss.png: `pip install 'splitnet[plot]'`."
            typer.echo(f"The adapter and metrics.jsonl are in {self.output}. {plot}")

    def _encoder(self, checkpoint: Checkpoint, tokenizer: Any) -> Encoder:
        virtual = self.options.virtual_tokens(self.method)
        room = (checkpoint.max_positions or math.inf) - virtual
        wanted = self.max_length or int(min(LONGEST_ROW, max(room, 2)))  # two tokens are the shortest row
        if wanted > room:
            lower = f"--max-length to {room:,}" if room >= 2 else "--tokens"
            raise SplitnetError(
                f"{wanted:,} tokens and {virtual} virtual ones are more than the model's context of "
                f"{checkpoint.max_positions:,}: lower {lower}"
            )
        processor = checkpoint.with_towers.store.processor() if self._has_images else None
        tokenizer.chat_template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        how: dict[str, Any] = {"labels": self._labels, "head": self.head, "processor": processor}
        return Encoder(tokenizer, wanted, template=self.template, **how)

    @property
    def _has_images(self) -> bool:
        return any(each.has_images for each in (self.train, self.held_out) if each)

    @property
    def _labels(self) -> Sequence[str]:
        """All labels; each owner of a joint tuning may have examples with only some of these labels."""
        both = {*self.train.labels, *(self.held_out.labels if self.held_out and self.join_round else ())}
        return sorted(both)

    def _adapted(self, use: ModelUse, rows: Sequence[Encoded]) -> Any:
        """The model with a new adapter. The adapter begins with a text or, like the head, with torch's random numbers.

        rows: all rows of later calls.
        """
        attaching = use.checkpoint, use.swarm, use.options
        if self.method is Method.SIDE:
            if self._has_images:
                raise SplitnetError("side networks read texts alone, and there are images: train with --method lora")
            states = States(TuningFolder(self.output / WORK))
            return SideTuner(attached(*attaching), self.options.width, states, rows, self.states_limit)
        if self.head:
            labels = (None, dict(enumerate(self.train.labels)), None)
            model = attached_classifier(use.checkpoint, use.swarm, labels, use.options)
            model.config.pad_token_id = use.pad  # the classifier uses this id to find the last token of a row
        else:
            # The tower reads the images of each example once.
            model = attached_with_images(*attaching, kept=len(rows)) if self._has_images else attached(*attaching)
        beginning = self._beginning()
        options, source = replace(self.options, init_text=beginning), use.checkpoint.tokenizer_source
        adapted = with_new_adapter(model, self.method, options, use.tokenizer, tokenizer_source=source, head=self.head)
        if self.method is Method.PREFIX and options.projection is None:
            # A classifier uses no caches, but the keys and values of a causal model come from the same blocks.
            causal = model if isinstance(model, RemoteCausalLM) else attached(*attaching)
            ids = use.tokenizer(beginning, return_tensors="pt").input_ids[:, : options.tokens]
            begin_prefix(adapted, causal.keys_and_values(ids))
        return adapted

    def _beginning(self) -> str:
        """The initial text of prompts and prefixes: an instruction that fits the examples."""
        if self.options.init_text is not None:
            return self.options.init_text
        if self.train.form == "classification":
            return f"Tell the label of the text. The labels are {', '.join(self.train.labels)}."
        return "Write what follows in the way of the examples that you have seen."

    def _description(self, fingerprint: str) -> dict[str, Any]:
        """The settings that identify a run."""
        return {
            "model": fingerprint,
            "data": digest(self.train.path),
            "evaluation": digest(self.held_out.path) if self.held_out else None,
            "method": self.method,
            **asdict(self.options),
            **asdict(self.settings),
            "template": self.template,
            "head": self.head,
            "max_length": self.max_length,
            "labels": self._labels,
        }

    def _print_next(self) -> None:
        if self.head:
            typer.echo("Use it: splitnet.AutoModelForSequenceClassification and peft.PeftModel, see docs/tuning.md.")
            return
        command = ["splitnet", "chat" if self.train.form == "chat" else "generate", *self.join_args]
        command += ["--adapter", str(self.output), *(["--image", "FILE"] if self._has_images else [])]
        if self.train.form != "chat":
            text = self.template if self.train.form == "classification" else "{text}"
            command += ["--raw", text.replace("{text}", "...")]
        typer.echo(f"Use it: {shlex.join(command)}")


def take_steps(
    run: TuningRun,
    folder: TuningFolder,
    progress: TuningProgress,
    saved: tuple[dict[str, torch.Tensor], dict[str, Any]] | None,
    told: str,
    *,
    look: Callable[[], None],
    keep: Callable[[], None],
) -> None:
    """Takes the remaining steps of a run, with metrics and progress. Raises SystemExit if it is stopped.

    Args:
        saved: the checkpoint to resume from; None: the run begins.
        told: a description of the run for the user.
        look: evaluates and saves when due; called before the first step and after each step.
        keep: saves everything; called at the end of the run and after an error, but not after an overflow.
    """
    if saved:
        run.restore(*saved)
    folder.metrics(until=run.done if saved else -1)
    since = f", continuing after step {run.done}" if saved else ""
    typer.echo(f"{told}, {run.trained_parameters:,} trained parameters{since}", err=True)
    with progress.bars, stop_signals("step") as stopped:
        run.stopped = stopped
        try:
            look()
            while run.done < run.settings.steps and not stopped:
                _take_step(run, folder, progress)
                look()
        except NotFinite:
            raise  # nothing is saved, because only parameters that pass a step without an overflow are saved
        except BaseException as error:
            if run.done:
                keep()
                if isinstance(error, SplitnetError):
                    typer.echo(f"{run.done} steps are saved; the same command with --resume continues.", err=True)
            raise
        if run.done:
            keep()
    end_if(stopped, f"Stopped after step {run.done}")


def _take_step(run: TuningRun, folder: TuningFolder, progress: TuningProgress) -> None:
    began, moved = time.perf_counter(), getattr(run.model, "training_bytes", None)
    spent = run.model.training_joules if moved is not None else 0.0
    step = run.take_step()
    seconds = time.perf_counter() - began
    facts = asdict(step) | {"seconds": round(seconds, 4)}
    if moved is not None:  # the passes run through blocks of peers
        now = run.model.training_bytes
        facts |= {"sent_bytes": now[0] - moved[0], "received_bytes": now[1] - moved[1]}
        facts |= _joules(run.model.training_joules - spent)
    folder.add_metrics({"step": facts.pop("number"), **facts})
    progress.stepped(step, step.tokens / seconds)


def _joules(spent: float) -> dict[str, float]:
    """Joules for the metrics; empty if some peers do not state their power."""
    return {"joules": round(spent, 4)} if math.isfinite(spent) else {}


@contextmanager
def stop_signals(what: str) -> Iterator[list[int]]:
    """Yields a list for the first signal to stop, so that the running `what` can finish; a second signal ends the
    process at once."""
    stopped: list[int] = []

    def note(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        typer.echo(f"Stopping after this {what}; interrupt again to stop at once.", err=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_if(stopped: Sequence[int], told: str) -> None:
    """Ends the process with the exit code for the signal, if a signal has stopped the run."""
    if stopped:
        typer.echo(f"{told}; nothing is lost. The same command with --resume continues.", err=True)
        raise SystemExit(128 + stopped[0])


def _told(result: Evaluation) -> str:
    accuracy = f", accuracy {result.accuracy:.1%}" if result.accuracy is not None else ""
    return f"held-out loss {result.loss:.4f}{accuracy}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
