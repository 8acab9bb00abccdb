"""Examples as rows of tokens, and a training run over them: each step depends only on its number and the state."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from splitnet.blocks.head import IGNORED
from splitnet.checkpoint.chat_template import render
from splitnet.errors import DataError, NotFinite
from splitnet.images import ImageError, images_of, process_prompt, without_images
from splitnet.serve.answers.call_forms import Forms, forms_of, history_for_template
from splitnet.tools.tune.data import Example, Examples
from splitnet.tools.tune.methods import TrainingSettings


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row of training."""

    ids: list[int]
    targets: list[int]  # the token to learn at each position, or IGNORED
    choice: int | None = None  # the index of the row's label, in a classification
    pixels: Mapping[str, Any] = field(default_factory=dict[str, Any])  # see `Prompt`; a row with pixels runs alone

    @property
    def learned(self) -> int:
        return sum(target != IGNORED for target in self.targets)


@dataclass(frozen=True)
class Encoder:
    """Converts examples to rows."""

    tokenizer: Any
    max_length: int  # maximum number of tokens per row
    template: str = "{text}"  # the text before the label, in a classification
    labels: Sequence[str] = ()  # all labels, in a classification
    head: bool = False  # whether a trained head predicts labels, instead of the model's words
    processor: Any = None  # transformers' processor of texts and images, if some examples have images

    @property
    def _end_tokens(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def encode_file(self, examples: Examples) -> list[Encoded]:
        """All rows of a file. Plain text that is too long becomes several rows.

        Raises DataError if an example cannot be encoded, is too long, or has an unknown label.
        """
        rows: list[Encoded] = []
        for example in examples.rows:
            match examples.form:
                case "text":
                    made = self._text(example)
                case "completion":
                    made = [self._completion(example.fields["prompt"], example.fields["completion"])]
                case "chat":
                    made = self._chat(examples, example)
                case "classification":
                    made = [self._classified(examples, example)]
                case "prompt":
                    examples.fail(example, "a prompt alone teaches nothing: add its 'completion'")
            for row in made:
                if len(row.ids) > self.max_length:
                    many = f"{len(row.ids):,} tokens are more than {self.max_length:,}"
                    examples.fail(example, f"{many}: shorten it or raise --max-length")
                if not self.head and not row.learned:
                    examples.fail(example, "there is nothing to learn, because the text has only one token")
            rows += made
        return rows

    def words(self) -> list[int]:
        """The first token of each label, which identifies the label. Raises DataError if two labels begin alike."""
        first = [self.ids_of(" " + label)[0] for label in self.labels]
        for number, token in enumerate(first):
            if token in first[:number]:
                other = self.labels[first.index(token)]
                raise DataError(
                    f"the labels {other!r} and {self.labels[number]!r} begin with the same token, so the model's "
                    "words cannot tell them apart: rename one, or train a head with --head"
                )
        return first

    def _text(self, example: Example) -> list[Encoded]:
        ids = self.tokenizer(example.fields["text"])["input_ids"] + self._end_tokens
        pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        if len(pieces) > 1 and len(pieces[-1]) == 1:
            pieces.pop()  # a row with a single token has no token to learn
        return [_row([(piece, True)]) for piece in pieces]

    def _completion(self, prompt: str, completion: str) -> Encoded:
        return _row([(self.tokenizer(prompt)["input_ids"], False), (self.ids_of(completion) + self._end_tokens, True)])

    def _classified(self, examples: Examples, example: Example) -> Encoded:
        text, label = example.fields["text"], example.fields["label"]
        if label not in self.labels:
            examples.fail(example, f"the label {label!r} is not in the training data: {', '.join(self.labels)}")
        choice = self.labels.index(label)
        prompt = self.template.replace("{text}", text)
        if self.head:
            ids = self.tokenizer(prompt)["input_ids"]
            return Encoded(ids, [IGNORED] * len(ids), choice)
        row = self._completion(prompt, " " + label)
        return Encoded(row.ids, row.targets, choice)

    def _chat(self, examples: Examples, example: Example) -> list[Encoded]:
        """Rows of a chat in the format of the model's template, with loss on the answers and their end tokens.

        Answers are encoded separately from the text before the answer, as in generation. Each answer follows the
        history in its prompt: if the template rewrites the history, for example without earlier reasoning, a new row
        begins. In a file with images, each answer is a row.
        """
        messages = self.turns(examples, example)
        tools = [tool["function"]["name"] for tool in example.fields.get("tools", ())]
        rows: list[list[tuple[list[int], bool]]] = []
        seen: list[Encoded] = []
        done = ""
        for end, message in enumerate(messages, start=1):
            if message["role"] != "assistant" or not message.get("weight", 1):
                continue
            before = self.rendered(examples, example, messages[: end - 1], True)
            after = self.rendered(examples, example, messages[:end], False)
            if not after.startswith(before):
                fix = "give its reasoning, or tune another model"
                examples.fail(
                    example, f"the chat template begins answers with {before[-20:]!r}, but not in a history: {fix}"
                )
            answer = after.removeprefix(before)
            calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
            said = [message["content"], message.get("reasoning_content") or "", *calls]
            others = [part for one in messages[: end - 1] if one["role"] != "assistant" for part in _parts(one)]
            read = [part["text"] for part in others if "text" in part] + tools
            left_out = _left_out(before, read) or _left_out(answer, said)
            if left_out is not None:
                lost = f"the model's chat template leaves out {left_out[:40]!r}"
                examples.fail(example, f"{lost}: remove it, or tune a model whose template has it")
            if self.processor is not None:
                images = [part["data"] for part in images_of(messages[: end - 1])]
                try:
                    seen.append(self._with_images(before, answer, images))
                    continue
                except ImageError as error:
                    examples.fail(example, str(error))
            if not rows or not before.startswith(done):
                rows, done = [*rows, []], ""
            rows[-1] += [(self.ids_of(before.removeprefix(done)), False), (self.ids_of(answer), True)]
            done = after
        return seen or [_row(pieces) for pieces in rows]

    def _with_images(self, before: str, answer: str, images: Sequence[str]) -> Encoded:
        """The row of an answer. Raises ImageError: an image, or the processor refuses it."""
        mark = next(mark for mark in map(chr, range(0xE000, 0x110000)) if mark not in before + answer)
        prompt = process_prompt(self.processor, before + mark + answer, mark, images)
        begin = len(prompt.tokens) - len(self.ids_of(answer))
        row = _row([(prompt.tokens[:begin], False), (prompt.tokens[begin:], True)])
        return replace(row, pixels=prompt.pixels)

    def turns(self, examples: Examples, example: Example) -> list[dict[str, Any]]:
        """The messages of a chat for the model's template. Raises DataError if the model has no template."""
        if not self.tokenizer.chat_template:
            examples.fail(example, 'this model has no chat template: use "prompt" and "completion", not "messages"')
        return history_for_template(example.fields["messages"], self._forms)

    @cached_property
    def _forms(self) -> Forms:
        return forms_of(self.tokenizer)

    def rendered(self, examples: Examples, example: Example, messages: list[dict[str, Any]], answer: bool) -> str:
        """The text of messages. Raises DataError if the model's chat template refuses them."""
        from jinja2 import TemplateError

        shown = [{name: value for name, value in one.items() if name != "weight"} for one in messages]
        if self.processor is not None:
            shown = without_images([{**one, "content": _parts(one)} for one in shown])
        try:
            return render(self.tokenizer, shown, answer=answer, tools=example.fields.get("tools"))
        except (TemplateError, RecursionError) as error:
            examples.fail(example, f"the model's chat template refuses the messages ({error})")

    def ids_of(self, text: str) -> list[int]:
        """The tokens of a text that is part of a longer text, without added special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _left_out(text: str, parts: Sequence[str]) -> str | None:
    """The first of `parts` that a template has left out of `text`; None: all parts are in the text.

    Templates may change white space, or write parts as JSON.
    """
    left = "".join(text.split())
    # The longest first, so that no part is found within a longer one.
    for part in sorted(parts, key=lambda each: len("".join(each.split())), reverse=True):
        forms = ("".join(form.split()) for form in (part, json.dumps(part, ensure_ascii=False)[1:-1]))
        found = next((form for form in forms if form in left), None)
        if found is None:
            return part
        left = left.replace(found, "", 1)
    return None


def _row(pieces: list[tuple[list[int], bool]]) -> Encoded:
    ids = [token for piece, _ in pieces for token in piece]
    targets = [token if learn else IGNORED for piece, learn in pieces for token in piece]
    # The first token is not learned, because no token precedes it. A soft prompt would precede it, but then the losses
    # of different methods would be over different tokens.
    return Encoded(ids, [IGNORED, *targets[1:]])


def pad_of(tokenizer: Any) -> int:
    """The id of the token that pads shorter rows in a batch."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def collate(
    rows: Sequence[Encoded], pad: int, *, head: bool = False, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """A batch for the model, padded on the right: `input_ids`, `attention_mask` and `labels`, on `device`.

    Labels are `[batch, seq]`; with a head, `[batch]`.
    """
    longest = max(len(row.ids) for row in rows)
    columns = {
        "input_ids": [row.ids + [pad] * (longest - len(row.ids)) for row in rows],
        "attention_mask": [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows],
        "labels": [row.choice if head else row.targets + [IGNORED] * (longest - len(row.ids)) for row in rows],
    }
    pixels = {name: value for row in rows for name, value in row.pixels.items()}
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in pixels.items()}
    return {name: torch.tensor(values, device=device) for name, values in columns.items()} | moved


def rows_at_once(rows: Sequence[Encoded], wanted: int) -> int:
    """How many of these rows run in one call of the model: 1 if there are images, which processors batch by family."""
    return 1 if any(row.pixels for row in rows) else wanted


_SEEDS = 2**63 - 1
PACKED = 2**26  # Maximum number of logits, and of values of hidden states, if one call takes many prompts


@torch.no_grad()
def estimate_gradients(
    parameters: Iterable[torch.nn.Parameter],  # parameters without gradients stay unchanged
    loss: Callable[[], Any],  # returns the loss of the model with its present parameters
    *,
    seed: int,  # determines the directions; must differ between steps
    directions: int = 1,  # number of directions whose estimates are averaged; takes one more forward pass than this
    eps: float = 1e-3,  # distance along a direction
    losses: Callable[[list[Any]], Iterable[Any]] | None = None,  # converts the results of `loss` to losses
) -> float:
    """Sets `grad` of the trained parameters to an estimate, for any torch optimizer.

    For one random direction, the loss is computed at a small distance along the direction and against the direction;
    the slope times the direction is the estimate of SPSA (Spall, 1992). With plain SGD this is MeZO (Malladi et al.,
    "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333, algorithm 1), and with Adam
    the variant of MeZO in appendix B. For several directions, losses are computed only along each direction, and all
    directions share the loss at the origin, as in FZOO (arXiv:2506.09034): N directions take N + 1 passes instead of
    2 N. Directions are held in memory, each as large as the trained parameters.

    Returns the loss at the origin; for one direction, the mean of the two losses. Raises the errors of `loss` and
    `losses`; then parameters and gradients are unchanged.
    """
    if directions < 1 or eps <= 0:
        raise ValueError(f"directions must be at least 1 and eps above 0, got {directions} and {eps}")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    before = [parameter.clone() for parameter in trained]
    generator = torch.Generator().manual_seed(seed % _SEEDS)
    drawn = [[torch.randn(one.shape, generator=generator).to(one) for one in trained] for _ in range(directions)]
    start = -eps if directions == 1 else 0.0  # the distance at which the slope along each direction begins

    def loss_at(direction: list[torch.Tensor], distance: float) -> Any:
        for parameter, value, along in zip(trained, before, direction, strict=True):
            parameter.copy_(value).add_(along, alpha=distance)
        return loss() if losses else float(loss())

    try:
        found = [*(loss_at(direction, eps) for direction in drawn), loss_at(drawn[0], start)]
        *ahead, behind = map(float, losses(found) if losses else found)
    finally:
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
    for index, parameter in enumerate(trained):
        parameter.grad = estimate = torch.zeros_like(parameter)
        for value, direction in zip(ahead, drawn, strict=True):
            estimate.add_(direction[index], alpha=(value - behind) / ((eps - start) * directions))
    return (ahead[0] + behind) / 2 if directions == 1 else behind


@dataclass(frozen=True, slots=True)
class TuningStep:
    """The result of one step, counted from 1."""

    number: int
    loss: float  # mean before the step, over the learned tokens, or with a head over the rows
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens: int  # number of tokens in one pass through the model, without padding


class TuningRun:
    """Trains the trainable parameters of a PEFT model on rows, which are repeated in a new order in each epoch.

    pad: the token id of padding. head: rows have one label each.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Encoded],
        settings: TrainingSettings,
        *,
        pad: int,
        head: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.settings = settings
        self.done = 0
        self.stopped: Sequence[int] = ()  # received signals to stop
        self.sound: Callable[[], None] = lambda: None  # called in a step when the loss and the gradient are finite
        self._rows = rows
        self.pad = pad
        self.head = head
        self.device = device
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self.trained.values(), settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._random = torch.get_rng_state()  # state of torch's random numbers after the last step

    @property
    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.trained.values())

    def take_step(self) -> TuningStep:
        """Takes the next step.

        Raises NotFinite if the loss or the gradient is not finite although all values from peers are finite, and the
        errors of the model. After an error, the run is unchanged.
        """
        number, settings = self.done, self.settings
        rows = self._rows_of(number)
        try:
            loss, norm = self._gradient(rows)
        except NotFinite as error:
            raise self.overflow(str(error)) from error
        self.sound()
        self._descend()
        self._random = torch.get_rng_state()
        tokens = sum(len(row.ids) for row in rows)
        return TuningStep(number + 1, loss, settings.learning_rate_at(number), norm, tokens)

    def overflow(self, what: str) -> NotFinite:
        """Makes the error for values of the run itself that are not finite."""
        # Before the first step, the learning rate has had no effect.
        advice = "start again with a lower --lr" if self.done else "serve the model with --weights float32"
        return NotFinite(f"step {self.done + 1} has overflowed: {advice} ({what})")

    def _gradient(self, rows: Sequence[Encoded]) -> tuple[float, float]:
        """Sets `grad` of the trained parameters. Returns the loss and the norm of the gradient. Raises NotFinite."""
        number, settings = self.done, self.settings
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(number)
        self.model.train()
        self._optimizer.zero_grad()
        if settings.zeroth_order:
            packs = self._packs
            sizes = torch.cat([parameter.detach().flatten() for parameter in self.trained.values()])
            loss = estimate_gradients(
                self.trained.values(),
                lambda: self.model.get_prompt(batch_size=1) if packs else self._loss(rows, backward=False),
                seed=settings.seed * 1_000_003 + number,
                directions=settings.directions,
                # The largest distance at which slopes stay about the same, so that errors of codecs matter less.
                eps=min(max(1e-3, float(sizes.square().mean().sqrt()) / 20), 1e-2),
                losses=(lambda prompts: self._losses(rows, prompts)) if packs else None,
            )
        else:
            loss = self._loss(rows, backward=True)
        norm = float(
            torch.nn.utils.get_total_norm([each.grad for each in self.trained.values() if each.grad is not None])
        )
        return loss, self._finite(norm, "norm of the gradient")

    def _descend(self) -> None:
        """Takes the step of the optimizer with the present gradients."""
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.settings.clip or math.inf)
        self._optimizer.step()
        self.done += 1

    def saved_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that determines the next step: tensors, and JSON-compatible facts."""
        tensors = {f"parameter.{name}": parameter.detach().clone() for name, parameter in self.trained.items()}
        numbers: dict[str, dict[str, Any]] = {}
        optimizer = self._optimizer.state_dict()
        for index, values in optimizer["state"].items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    numbers.setdefault(str(index), {})[key] = value
        tensors["random"] = self._random
        groups = optimizer["param_groups"]
        return tensors, {"step": self.done, "optimizer": {"numbers": numbers, "groups": groups}}

    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Restores a result of `saved_state`. Raises DataError if the result is from another model or method."""
        try:
            for name, parameter in self.trained.items():
                saved = tensors[f"parameter.{name}"]
                if saved.shape != parameter.shape:
                    raise KeyError(name)
            state: dict[int, dict[str, Any]] = {}
            for name, tensor in tensors.items():
                kind, _, rest = name.partition(".")
                if kind == "optimizer":
                    index, _, key = rest.partition(".")
                    state.setdefault(int(index), {})[key] = tensor
            for index, numbers in facts["optimizer"]["numbers"].items():
                state.setdefault(int(index), {}).update(numbers)
            self._optimizer.load_state_dict({"state": state, "param_groups": facts["optimizer"]["groups"]})
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(tensors[f"parameter.{name}"])
            self._random = tensors["random"]
            torch.set_rng_state(self._random)
            self.done = int(facts["step"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"the checkpoint is not of this run ({error}): give another --output") from error

    def _rows_of(self, step: int) -> list[Encoded]:
        count, size = len(self._rows), self.settings.batch_size
        numbers = range(step * size, (step + 1) * size)
        rows: list[Encoded] = []
        for epoch, group in itertools.groupby(numbers, key=lambda number: number // count):
            order = self._order(epoch)
            rows += [self._rows[order[number % count]] for number in group]
        return rows

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return torch.randperm(len(self._rows), generator=generator).tolist()

    def _loss(self, rows: Sequence[Encoded], *, backward: bool) -> float:
        """The loss of all rows, computed in parts. The gradients of the parts add up to the gradient of all rows."""
        weights = [1 if self.head else row.learned for row in rows]
        whole = sum(weights)
        size = rows_at_once(rows, math.ceil(len(rows) / self.settings.accumulate))
        # The logits are not used, and would be by far the largest tensors.
        spared = {"logits_to_keep": 1} if not self.head and getattr(self.model, "loss_in_parts", False) else {}
        total = 0.0
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size], self.pad, head=self.head, device=self.device)
            share = sum(weights[start : start + size]) / whole
            with torch.set_grad_enabled(backward):
                loss = self.model(**batch, **spared).loss * share
            value = self._finite(loss.item())
            if backward:
                loss.backward()
            total += value
        return total

    @staticmethod
    def _finite(value: float, what: str = "loss") -> float:
        if not math.isfinite(value):
            raise NotFinite(f"the {what} is {value}, although all values from the peers are finite")
        return value

    @property
    def _packs(self) -> bool:
        """Whether one call of the model can take many soft prompts, each with separate rows."""
        kind = getattr(getattr(self.model, "active_peft_config", None), "peft_type", None)
        return (
            not self.head
            and rows_at_once(self._rows, 2) > 1
            and kind in ("PROMPT_TUNING", "P_TUNING")
            and getattr(self.model, "loss_in_parts", False)
        )

    def _losses(self, rows: Sequence[Encoded], prompts: list[torch.Tensor]) -> list[float]:
        """The loss of all rows for each soft prompt `[1, virtual tokens, hidden]`, as the mean over the learned tokens.

        One call of the model takes as many prompts as `PACKED` allows, as in P-RGE (arXiv:2409.15520).
        """
        batch = collate(rows, self.pad, device=self.device)
        labels = batch.pop("labels")
        places = (labels != IGNORED).any(0).nonzero().flatten()
        targets, config = labels[:, places], self.model.config.get_text_config()
        size = max(targets.numel() * config.vocab_size, labels.numel() * config.hidden_size)
        most = max(1, PACKED // size)
        found: list[float] = []
        for some in (prompts[start : start + most] for start in range(0, len(prompts), most)):
            given = {name: tensor.repeat(len(some), 1) for name, tensor in batch.items()}
            self.model.get_prompt = lambda some=some, **_: torch.cat(some).repeat_interleave(len(rows), dim=0)
            try:
                output = self.model(**given, logits_to_keep=places - 1 - labels.shape[1], use_cache=False)
            finally:
                del self.model.get_prompt
            logits = output.logits.float().transpose(1, 2)  # [prompts * rows, vocabulary, places]
            entropy = torch.nn.functional.cross_entropy(logits, targets.repeat(len(some), 1), reduction="none")
            found += (entropy.view(len(some), -1).sum(1) / (targets != IGNORED).sum()).tolist()
        return [self._finite(loss) for loss in found]
