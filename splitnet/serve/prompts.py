"""Makes the token ids of a prompt from the texts and messages of a request."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from inspect import signature
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from splitnet.checkpoint.chat_template import begin, render, variables_of
from splitnet.images import Prompt, process_prompt, start_reader
from splitnet.serve import infill
from splitnet.serve.answers.call_forms import PROBE_TOOL, Forms, forms_of, history_for_template
from splitnet.serve.answers.text import INCOMPLETE
from splitnet.serve.failures import ApiError
from splitnet.serve.infill import InfillMarks

KEPT_TEXTS = 2**16  # Number of cached texts of tokens: logprobs need the texts of up to 20 alternatives to each token

SLICE = 2**16
"""Characters that are tokenized at a time to check a text's length, so that a too long text needs little memory."""

LONGEST_TOKEN = 256  # Characters of the longest token, such as white space in some vocabularies
LONGEST_CHARACTER = 16  # Maximum number of tokens that are joined until they form a whole character
CUT_TIMES = 16  # Maximum length, in contexts of the model, of texts that are cut to their last tokens
CUT_TOKENS = 128  # Tokens that each cut between slices may add to the length of a text
LAST_TOKENS = 8  # Number of last tokens of a prompt that are searched for marks that begin the answer
GAP_TOKENS = 256  # Tokens that are left free for the text of a gap if the request sets no maximum
PROBE_TEXT = "splitnet-probe"  # A text that a chat template must show
DEFAULT_MAX_TOKENS = 4096  # Maximum tokens of an answer if neither the request nor the model sets a maximum


class Prompts:
    """Makes prompts with a model's tokenizer and chat template.

    max_positions: the model's context; None: no bound. processor: transformers' processor of a model that sees images;
    None: the model reads text alone.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, max_positions: int | None, processor: Any = None) -> None:
        self._tokenizer = tokenizer
        self.processor = processor
        if processor is not None:
            start_reader()
            tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
        if tokenizer.chat_template:
            begin()
        self._vocabulary = vocabulary
        self.max_positions = max_positions
        self._some_text: list[int] = tokenizer("a", add_special_tokens=False).input_ids
        self.text_of = lru_cache(KEPT_TEXTS)(self._text_of)
        """The text of a token inside a text; at the start of a text, some tokenizers drop the token's space."""
        added = tokenizer.added_tokens_decoder.values()
        special = [re.escape(token.content) for token in added if token.special or token.content in infill.KNOWN]
        self._special = re.compile("|".join(sorted(special, key=len, reverse=True)) or r"(?!)")

    @cached_property
    def forms(self) -> Forms:
        """The forms of the model's calls and reasoning, determined from its chat template and its tokens."""
        return forms_of(self._tokenizer)

    @property
    def template(self) -> str:
        """The chat template; empty: the model has no chat template."""
        return self._tokenizer.get_chat_template(tools=[PROBE_TOOL]) if self._tokenizer.chat_template else ""

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the chat template shows the text of messages only if their contents are lists of parts."""
        if self.processor is None:
            return False
        try:
            shown = render(self._tokenizer, [{"role": "user", "content": PROBE_TEXT}], answer=False)
        except TemplateError:
            return True
        return PROBE_TEXT not in shown

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return "tools" in self.template

    @cached_property
    def _hidden(self) -> set[int]:
        # Special tokens that are marks stay in the text of an answer, where the parser looks for them.
        marks, added = self.forms.marks, self._tokenizer.added_tokens_decoder
        return {number for number, token in added.items() if token.special and token.content not in marks}

    def begun(self, prompt: Sequence[int]) -> str:
        """The mark at the end of a prompt that begins an answer or its reasoning; empty: there is no such mark."""
        forms = self.forms
        noise = forms.calls.noise if forms.calls is not None else ()
        marks = [*noise, *([forms.reasoning.opening] if forms.reasoning is not None else ())]
        return next((mark for mark in marks if self.ends_with(prompt, mark)), "")

    def ends_with(self, prompt: Sequence[int], mark: str) -> bool:
        return self.decode_all(list(prompt[-LAST_TOKENS:])).rstrip().endswith(mark.rstrip())

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer's tokens, without special tokens that are not marks."""
        return self.decode_all([token for token in tokens if token not in self._hidden])

    def decode_all(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _text_of(self, token: int) -> str:
        return self.decode_all([*self._some_text, token])[len(self.decode_all(self._some_text)) :]

    def tokens_of_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        parameters: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        *,
        answer: bool = True,
        goes_on: bool = False,
        last: int | None = None,
    ) -> list[int]:
        """The tokens of a chat.

        Messages and tools have the form that chat templates expect: text in one piece, arguments of calls as objects.
        parameters: more variables for the template, by the parameter of the request that gives them; a later value
        replaces an earlier value. answer: the prompt ends with the marks that begin an answer. goes_on: the answer
        continues the last message. last: how many last tokens are kept. Raises ApiError as `_rendered`.
        """
        text, mark = self._rendered(messages, tools, parameters, answer, goes_on, last)
        return [id for piece in (text.split(mark) if mark else [text]) for id in self.ids(piece)][
            -last if last else None :
        ]

    def of_chat_with_images(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[str],
        tools: Sequence[dict[str, Any]],
        parameters: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        *,
        answer: bool = True,
        goes_on: bool = False,
    ) -> Prompt:
        """As `tokens_of_chat`, of messages whose contents may be lists of parts; images: base64, in their order.

        Raises ApiError as `_rendered`, and ImageError if an image cannot be read or the processor refuses it.
        """
        text, mark = self._rendered(messages, tools, parameters, answer, goes_on, None)
        return process_prompt(self.processor, text, mark, images)

    def _rendered(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        parameters: Mapping[str, Mapping[str, Any]],
        answer: bool,
        goes_on: bool,
        last: int | None,
    ) -> tuple[str, str]:
        """The text of a chat, and the mark that separates its pieces, which are tokenized one by one; empty: none.

        Special tokens come from the template alone: names of special tokens in messages and tools stay text. So the
        text of a message cannot end the message and begin a message of another role.

        Raises ApiError if the model has no chat template for the request, the template refuses the messages, or they
        are longer than the context.
        """
        if not self._tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template: have it continue a bare text", param="messages")
        described = list(tools) or None
        if described and not self.takes_tools:
            raise ApiError(400, "this model's chat template has no place for tools: leave them out", param="tools")
        if described and self.forms.calls is None:
            raise ApiError(400, "splitnet does not know how this model writes calls: leave out tools", param="tools")
        variables = {name: value for given in parameters.values() for name, value in given.items()}
        if variables:
            self._check_variables(parameters, described)
        if not self.forms.shows_calls and any(message.get("tool_calls") for message in messages):
            raise ApiError(400, "this model's chat template shows no calls of earlier messages", param="messages")
        said = history_for_template(messages, self.forms)
        if self._wants_parts:
            said = [{**one, "content": _as_parts(one["content"])} for one in said]
        text = json.dumps([said, described, variables], ensure_ascii=False)
        times = 1 if last is None else CUT_TIMES
        contents = [text for message in said for text in _texts_of(message["content"])]
        self._check_length(contents, times)
        self._check_length([text], 2 * times)  # a template may leave out parts, or write them shorter
        templated = partial(self._templated, answer=answer and not goes_on, goes_on=goes_on)
        if self._special.search(text) is None:
            rendered = templated(said, described, variables)
            self._check_length([rendered], times)
            return rendered, ""
        mark = next(mark for mark in map(chr, range(0xE000, 0x110000)) if mark not in text)
        marked = templated(*(self._as_text(each, mark) for each in (said, described, variables)))
        self._check_length([marked], 2 * times)  # the marks count, too
        return marked, mark

    def checked_ids(self, text: str) -> list[int]:
        """The tokens of a text. Raises ApiError if the text is longer than the context."""
        self._check_length([text])
        return self.ids(text)

    def text_of_ids(self, tokens: list[int]) -> str:
        """The text of tokens. Raises ApiError if a token is unknown or there are more tokens than the context holds."""
        if self.max_positions is not None and len(tokens) > self.max_positions:
            raise self._too_long(f"{len(tokens)} tokens are more than", "send fewer at once")
        self.check_known(tokens, "tokens")
        return self.decode_all(tokens)

    def ids(self, text: str) -> list[int]:
        """The tokens of a piece of a text; names of special tokens become special tokens."""
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def variables(self, tools: Any = None) -> set[str]:
        """Names of the chat template's variables that requests may give; `tools`: the request's tools, if any."""
        if not self._tokenizer.chat_template:
            return set()
        try:
            used = variables_of(self._tokenizer.get_chat_template(tools=tools))
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template cannot be read ({error})", param="messages") from None
        used -= self._tokenizer.special_tokens_map.keys()
        return used - signature(self._tokenizer.apply_chat_template).parameters.keys()

    def plain(self, text: str, most: int | None = None) -> list[int]:
        """The tokens of a piece of a text, at most the first `most`; names of special tokens stay text."""
        if most is None:
            self._check_length([text])
        mark = next(mark for mark in map(chr, range(0xE000, 0x110000)) if mark not in text)
        marked = self._as_text(text if most is None else text[: most * LONGEST_TOKEN], mark)
        return [id for piece in marked.split(mark) for id in self.ids(piece)][:most]

    def token_of(self, text: str) -> int | None:
        """The id of the token with this text; None: the model has no such token."""
        token = self._tokenizer.convert_tokens_to_ids(text)
        is_known = token is not None and token < self._vocabulary
        return token if is_known and self._tokenizer.convert_ids_to_tokens(token) == text else None

    @cached_property
    def marks(self) -> InfillMarks | None:
        """The marks of a gap that the model can fill, by its file or its tokens; None: the model has no such marks."""
        return infill.marks_of(self.token_of, getattr(self._tokenizer, "infill_marks", ()))

    @cached_property
    def infill_ends(self) -> set[int]:
        """Tokens that end the text that the model writes into a gap."""
        own = getattr(self._tokenizer, "infill_marks", ())
        return {token for text in {*infill.KNOWN, *own} if (token := self.token_of(text)) is not None}

    def tokens_of_gap(
        self, prefix: str, suffix: str, files: Sequence[tuple[str, str]] = (), max_tokens: int | None = None
    ) -> list[int]:
        """The prompt that asks a model for the text between `prefix` and `suffix`; marks in these texts stay text.

        files: names and texts of other files; their last tokens are used, as far as `max_tokens` leaves room.
        Raises ApiError if the model has no marks for gaps, or a text is longer than the context.
        """
        if self.marks is None:
            raise ApiError(400, "this model has no marks for a text before a suffix: leave out suffix", param="suffix")
        self._check_length([text for _, text in files], CUT_TIMES)
        parts = [self._marked(self.marks.prefix, prefix), self._marked(self.marks.suffix, suffix, behind=True)]
        if self.marks.suffix_first:
            parts.reverse()
        repository, file = (next(filter(self.token_of, names), "") for names in (infill.REPOSITORIES, infill.FILES))
        others = self._marked(repository, "myproject\n") if files and repository else []
        for name, text in [*files, ("filename", "")] if files and file else files:
            others += self._marked(file, f"{name}\n{text}") if file else self.plain(infill.SNIPPET + text)
        begin = self._tokenizer("a").input_ids
        begin, asked = (
            begin[: begin.index(self._some_text[0])],
            [*parts[0], *parts[1], *self._marked(self.marks.middle)],
        )
        room = (self.max_positions or sys.maxsize) - len(begin) - len(asked) - (max_tokens or GAP_TOKENS)
        return [*begin, *others[max(0, len(others) - max(0, room)) :], *asked]

    def _marked(self, mark: str, text: str = "", *, behind: bool = False) -> list[int]:
        """The tokens of a mark and a text. behind: the text continues other text, so it begins without a space."""
        tokens = self.plain(text)
        if behind and self._tokenizer.convert_ids_to_tokens(self._some_text[0]).startswith("\u2581"):
            # This tokenizer begins each text with a space.
            tokens = self.plain(f"\u263a{text}")[len(self.ids("\u263a")) :]
        token = self.token_of(mark)
        return tokens if token is None else [token, *tokens]

    def _check_variables(self, parameters: Mapping[str, Mapping[str, Any]], tools: Any) -> None:
        """Raises ApiError for a variable that the chat template does not use, or that the server sets."""
        used = self.variables(tools)
        for param, name in ((param, name) for param, given in parameters.items() for name in given if name not in used):
            raise ApiError(400, f"this model's chat template has no place for {name!r}: leave it out", param=param)

    def _templated(
        self, said: Any, tools: Any, variables: Mapping[str, Any], *, answer: bool = True, goes_on: bool = False
    ) -> str:
        variables = {**variables, "continue_final_message": True} if goes_on else variables
        try:
            return render(self._tokenizer, said, answer=answer, tools=tools, variables=variables)
        except TemplateError as error:
            refusal = f"the model's chat template refuses these messages ({error}): change them"
            raise ApiError(400, refusal, param="messages") from None

    def _as_text(self, said: Any, mark: str) -> Any:
        """A JSON value in which `mark` separates the characters of all names of special tokens.

        The text is later split at `mark` and tokenized piece by piece, so that these names stay text.
        """
        if isinstance(said, str):
            return self._special.sub(lambda match: mark.join(match[0]), said)
        if isinstance(said, list):
            return [self._as_text(each, mark) for each in said]
        if isinstance(said, dict):
            return {self._as_text(name, mark): self._as_text(value, mark) for name, value in said.items()}
        return said

    def tokens_of_text(
        self, prompt: str | list[int], param: str = "prompt", most: int | None = None, last: int | None = None
    ) -> list[int]:
        """The tokens of a bare prompt, including special tokens that the tokenizer adds.

        most: how many first tokens are kept, including special tokens that the tokenizer adds at the end. last: how
        many last tokens are kept. Raises ApiError if there are no tokens, a token is unknown, or the text is longer
        than the context.
        """
        if isinstance(prompt, str) and last:
            end = prompt[-last * LONGEST_TOKEN :]
            self._check_length([end], CUT_TIMES)
            tokens = self._tokenizer(end).input_ids
        else:
            tokens = prompt if isinstance(prompt, list) else self._tokenized(prompt, most)
        tokens = tokens[:most] if last is None else tokens[-last:]
        if not tokens and self._tokenizer.bos_token_id is not None:
            tokens = [self._tokenizer.bos_token_id]
        if not tokens:
            raise ApiError(400, f"the {param} is empty: give some text", param=param)
        self.check_known(tokens, param)
        return tokens

    def _tokenized(self, text: str, most: int | None) -> list[int]:
        if most is None:
            self._check_length([text])
            return self._tokenizer(text).input_ids
        tokens = self._tokenizer(text[: most * LONGEST_TOKEN]).input_ids
        # The tokenizer's own truncation is not used, because it is a setting that applies to all threads.
        some = self._tokenizer("a").input_ids
        added = some[len(some) - some[::-1].index(self._some_text[-1]) :]
        return [*tokens[: max(0, most - len(added))], *added] if len(tokens) > most else tokens

    def begins(self, tokens: Sequence[int], text: str) -> list[int]:
        """The index in `text` at which each token of a bare prompt begins; 0 for tokens added before the text."""
        begins: list[int] = []
        at, part = 0, [*self._some_text]
        for token in tokens:
            begins.append(at)
            part.append(token)
            alone = len(part) == len(self._some_text) + 1
            new = self.text_of(token) if alone else self.decode_all(part)[len(self.decode_all(self._some_text)) :]
            if not new.endswith(INCOMPLETE) or len(part) > LONGEST_CHARACTER:
                at, part = at + len(new), [*self._some_text]
        return [max(0, begin - max(0, at - len(text))) for begin in begins]

    def _check_length(self, texts: Sequence[str], times: int = 1) -> None:
        """Raises ApiError if the texts together exceed `times` contexts; tokenizes no further once that is certain."""
        if self.max_positions is None or sum(map(len, texts)) <= SLICE:
            return
        tokens = 0
        for text in texts:
            for start in range(0, len(text), SLICE):
                tokens += len(self._tokenizer(text[start : start + SLICE], add_special_tokens=False).input_ids)
                if tokens > times * self.max_positions + CUT_TOKENS * (start // SLICE):
                    raise self._too_long("the prompt has more tokens than", "shorten the prompt")

    def check_known(self, tokens: Iterable[int], param: str) -> None:
        if any(token >= self._vocabulary for token in tokens):
            raise ApiError(400, f"the model knows the tokens 0 to {self._vocabulary - 1} only", param=param)

    def last(self, count: int | None, max_tokens: int | None) -> int | None:
        """How many last tokens of a prompt to keep; None: all.

        count: the number that the request gives; -1: as many as leave room for the answer.
        """
        if count != -1 or self.max_positions is None:
            return None if count == -1 else count
        return max(1, self.max_positions - (1 if max_tokens is None else max_tokens))

    def room_for(self, prompt: list[int], max_tokens: int | None, *, fits: bool = True) -> int:
        """How many tokens an answer may have. max_tokens: the request's maximum; None: as many as the context allows.

        fits: `max_tokens` must fit into the context; if False, the maximum is lowered to what fits. Raises ApiError if
        there is no room.
        """
        if self.max_positions is None:
            return max_tokens if max_tokens is not None else DEFAULT_MAX_TOKENS
        room = self.max_positions - len(prompt)
        if room < (max_tokens if max_tokens is not None and fits else 1):
            answer = f" and an answer of {max_tokens}" if max_tokens is not None else ""
            what = f"a prompt of {len(prompt)} tokens{answer} is more than"
            raise self._too_long(what, "shorten the prompt or lower max_tokens")
        return room if max_tokens is None else min(room, max_tokens)

    def _too_long(self, what: str, fix: str) -> ApiError:
        message = f"{what} the model's context of {self.max_positions}: {fix}"
        return ApiError(400, message, code="context_length_exceeded")


def _as_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts_of(content: str | list[dict[str, Any]]) -> list[str]:
    return [part["text"] for part in _as_parts(content) if part["type"] == "text"]
