"""A stand-in for `splitnet/serve/generation.py`, which calls the model: the stand-in answers with texts of a
function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from starlette.testclient import TestClient

from splitnet.serve.admission import Admission
from splitnet.serve.answers.grammars import AllowedTokens, Grammars
from splitnet.serve.gateway import Gateway
from splitnet.serve.generation import Ended, GenerationRequest, Generations, Listener, TextDelta, TokenCollector
from splitnet.serve.progress import ProgressLog
from splitnet.serve.prompts import Prompts
from splitnet.serve.request_gate import ApiKeys
from splitnet.serve.responses import ServedModel
from splitnet.serve.server import make_app

MODEL = "small"
POSITIONS = 4096
TEMPLATE = (
    "{{ tools or '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Writes = Callable[[str], Sequence[str]]
"""Returns the answers that a model may write to a prompt, the likeliest first; a grammar may exclude some of them."""


class Writer(Generations):
    """Answers with the first text of `writes` that the grammar allows; records requests in `asked`."""

    def __init__(self, tokenizer: Any, prompts: Prompts, writes: Writes) -> None:
        config = SimpleNamespace(model_type="llama", get_text_config=lambda: SimpleNamespace(vocab_size=len(tokenizer)))
        facts = SimpleNamespace(max_positions=POSITIONS, hidden_size=8, num_blocks=2)
        self.model: Any = SimpleNamespace(headless=False, config=config, swarm=SimpleNamespace(facts=facts))
        self.decode, self.progress, self.draining = prompts.decode, ProgressLog(), False
        self.ropes_vary = False
        self.end_tokens = {tokenizer.eos_token_id}
        self.asked: list[GenerationRequest] = []
        self._tokenizer, self._prompts, self._writes = tokenizer, prompts, writes

    def start(self, ask: GenerationRequest, listener: Listener, answer: str = "") -> Any:
        self.asked.append(ask)
        ends = {*ask.stop_tokens, *(() if ask.ignores_ends else self.end_tokens)}
        choice = TokenCollector(0, self.decode, ask.max_tokens, ends, ask.stop_strings, (), ask.unstopped_parts)
        for token in next(self._allowed(ask)) if ask.max_tokens else ():
            if not choice.finished:
                listener(choice.push_token(token, None))
        if not ask.max_tokens:
            listener(TextDelta(0, "", (), "length"))
        listener(Ended(len(ask.prompt), 0, choice.tokens, ask.prompt))
        return SimpleNamespace(cancel=lambda: None, progress=SimpleNamespace(routes=lambda: ()))

    def decode_prompt(self, number: int) -> str:
        """The prompt of a request, with its special tokens."""
        return self._prompts.decode_all(self.asked[number].prompt)

    def _allowed(self, ask: GenerationRequest) -> Iterator[list[int]]:
        """Yields the answers that the grammar of a request allows, as tokens with an end token."""
        for text in self._writes(self._prompts.decode_all(ask.prompt)):
            tokens = [*self._tokenizer(text, add_special_tokens=False).input_ids, min(self.end_tokens)]
            with suppress(RuntimeError):  # the answer has a token that the grammar excludes
                allowed = AllowedTokens(ask.grammar) if ask.grammar is not None else None
                for length, token in enumerate(tokens if allowed else ()):
                    scores = torch.zeros(len(self._tokenizer), dtype=torch.float32)
                    allowed.forbid_others(tokens[:length], scores)  # pyright: ignore[reportOptionalMemberAccess]
                    if not scores[token].isfinite():
                        raise RuntimeError
                yield tokens

    def end_requests(self) -> None:
        pass

    def close(self) -> None:
        pass


def served(tokenizer: Any, writes: Writes, grammars: Grammars | None = None) -> tuple[Any, Writer]:
    """The app of a gateway with the stand-in as its model, and the stand-in."""
    tokenizer.chat_template = TEMPLATE
    prompts = Prompts(tokenizer, len(tokenizer), POSITIONS)
    writer = Writer(tokenizer, prompts, writes)
    grammars = grammars or Grammars(tokenizer, len(tokenizer), writer.end_tokens)
    return make_app(Gateway(ServedModel(MODEL, writer, prompts, grammars, Admission(4, 4))), ApiKeys({})), writer


def client(tokenizer: Any, writes: Writes, grammars: Grammars | None = None) -> tuple[TestClient, Writer]:
    """A client of this app within this process, and the stand-in."""
    app, writer = served(tokenizer, writes, grammars)
    return TestClient(app, base_url="http://localhost"), writer
