"""Examples as token ids, with what is to be learned of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from splitnet.blocks.loss import IGNORED
from splitnet.checkpoint.chat_template import render
from splitnet.errors import DataError
from splitnet.tools.tune.data import Example, Examples


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row of training.

    Attributes:
        ids: token ids.
        targets: of each position the token to learn there, or IGNORED.
        choice: number of the label, in a classification.
    """

    ids: list[int]
    targets: list[int]
    choice: int | None = None

    @property
    def learned(self) -> int:
        """Positions with a loss."""
        return sum(target != IGNORED for target in self.targets)


class Encoder:
    """Makes rows of examples.

    Args:
        max_length: tokens per row at most.
        template: of a classification, with `{text}` where the text goes; the label is the word that comes after.
        labels: of a classification.
        head: whether labels are told by a trained head, rather than by words.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        template: str = "{text}",
        labels: Sequence[str] = (),
        head: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._template = template
        self._labels = list(labels)
        self._head = head
        end = tokenizer.eos_token_id
        self._end: list[int] = [] if end is None else [end]

    def encode(self, examples: Examples) -> list[Encoded]:
        """All rows of a file. Plain text that is too long becomes several.

        Raises:
            DataError: an example cannot be encoded, is too long, or has a label that is not known.
        """
        rows: list[Encoded] = []
        for example in examples.rows:
            match examples.form:
                case "text":
                    made = self._text(example)
                case "completion":
                    made = [self._completion(example.fields["prompt"], example.fields["completion"])]
                case "chat":
                    made = [self._chat(examples, example)]
                case "classification":
                    made = [self._classified(examples, example)]
            for row in made:
                if len(row.ids) > self._max_length:
                    examples.fail(
                        example,
                        f"{len(row.ids):,} tokens are more than {self._max_length:,}: shorten it or raise --max-length",
                    )
                if not self._head and not row.learned:
                    examples.fail(example, "nothing to learn: one token has none before it to be told from")
            rows += made
        return rows

    def words(self) -> list[int]:
        """The first token of each label, by which words tell labels apart.

        Raises:
            DataError: two labels begin with the same token.
        """
        first = [self._ids(" " + label)[0] for label in self._labels]
        for number, token in enumerate(first):
            if token in first[:number]:
                other = self._labels[first.index(token)]
                raise DataError(
                    f"the labels {other!r} and {self._labels[number]!r} begin with the same token, so the model's "
                    "words cannot tell them apart: rename one, or train a head with --head"
                )
        return first

    def _text(self, example: Example) -> list[Encoded]:
        ids = self._tokenizer(example.fields["text"])["input_ids"] + self._end
        pieces = [ids[start : start + self._max_length] for start in range(0, len(ids), self._max_length)]
        if len(pieces) > 1 and len(pieces[-1]) == 1:
            pieces.pop()  # the end alone teaches nothing
        return [_row([(piece, True)]) for piece in pieces]

    def _completion(self, prompt: str, completion: str) -> Encoded:
        return _row([(self._tokenizer(prompt)["input_ids"], False), (self._ids(completion) + self._end, True)])

    def _classified(self, examples: Examples, example: Example) -> Encoded:
        text, label = example.fields["text"], example.fields["label"]
        if label not in self._labels:
            examples.fail(example, f"the label {label!r} is none of the training data's: {', '.join(self._labels)}")
        choice = self._labels.index(label)
        prompt = self._template.replace("{text}", text)
        if self._head:
            ids = self._tokenizer(prompt)["input_ids"]
            return Encoded(ids, [IGNORED] * len(ids), choice)
        row = self._completion(prompt, " " + label)
        return Encoded(row.ids, row.targets, choice)

    def _chat(self, examples: Examples, example: Example) -> Encoded:
        """The chat as the model's template writes it, with loss on the answers and on what ends them.

        Answers are encoded apart from what is before them, as when they are generated.
        """
        if not self._tokenizer.chat_template:
            examples.fail(example, 'this model has no chat template: use "prompt" and "completion", not "messages"')
        messages = example.fields["messages"]
        pieces: list[tuple[list[int], bool]] = []
        done = ""
        for end, message in enumerate(messages, start=1):
            if message["role"] != "assistant":
                continue
            before = self._rendered(examples, example, messages[: end - 1], True)
            after = self._rendered(examples, example, messages[:end], False)
            if not before.startswith(done) or not after.startswith(before):
                examples.fail(
                    example,
                    "the model's chat template changes earlier messages when later ones come: give one answer only",
                )
            pieces += [(self._ids(before[len(done) :]), False), (self._ids(after[len(before) :]), True)]
            done = after
        return _row(pieces)

    def _rendered(self, examples: Examples, example: Example, messages: list[dict[str, str]], answer: bool) -> str:
        from jinja2 import TemplateError

        try:
            return render(self._tokenizer, messages, answer=answer)
        except TemplateError as error:
            examples.fail(example, f"the model's chat template refuses the messages ({error})")

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _row(pieces: list[tuple[list[int], bool]]) -> Encoded:
    ids = [token for piece, _ in pieces for token in piece]
    targets = [token if learn else IGNORED for piece, learn in pieces for token in piece]
    # Nothing predicts the first token. A soft prompt would, and then its loss would count with some methods only.
    return Encoded(ids, [IGNORED, *targets[1:]])


def collate(
    rows: Sequence[Encoded], pad: int, *, head: bool = False, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """A batch for the model, padded on the right: `input_ids`, `attention_mask` and `labels`, on `device`.

    Labels are `[batch, seq]`, or with a head `[batch]`.
    """
    longest = max(len(row.ids) for row in rows)
    batch = {
        "input_ids": [row.ids + [pad] * (longest - len(row.ids)) for row in rows],
        "attention_mask": [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows],
    }
    labels = [row.targets + [IGNORED] * (longest - len(row.ids)) for row in rows]
    tensors = {name: torch.tensor(values, device=device) for name, values in batch.items()}
    tensors["labels"] = torch.tensor([row.choice for row in rows] if head else labels, device=device)
    return tensors
