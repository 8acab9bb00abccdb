"""Grammars of answers: JSON schemas, other grammars and schemas of functions decide which tokens may come next."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import llguidance.hf
import numpy as np
import torch

from splitnet.bounded import BoundedProcess
from splitnet.bounded_program import GRAMMAR_LIMITS
from splitnet.drafts.drafter import shared
from splitnet.serve.answers.call_forms import FORMS, PLAIN, Form, Forms
from splitnet.serve.answers.calls import GrammarRules
from splitnet.serve.failures import ApiError


@dataclass(frozen=True)
class Grammar:
    """A checked grammar of an answer. param: the parameter of the request that defines the grammar."""

    matcher: llguidance.LLMatcher  # in the state before the first token
    param: str | None


class Function(Protocol):
    """A function that the model may call. parameters: JSON schema of its arguments. strict: calls must fit them."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


@dataclass(frozen=True)
class AnswerConstraints:
    """The constraints that an answer must match; by default an answer is unconstrained."""

    # Functions that may be called. Arguments must fit the schema of a function if it is strict or a call is required.
    functions: Sequence[Function] = ()
    required: bool = False  # the answer is one call of a function, without text
    several: bool = True  # the answer may have more calls or text after a call
    schema: Mapping[str, Any] | None = None  # an answer that is not a call is JSON that fits this schema
    rule: str | None = None  # an answer that is not a call matches this grammar, in llguidance's Lark syntax
    param: str = "response_format"  # the parameter of the request that gives `schema` or `rule`

    @property
    def text_is_bound(self) -> bool:
        return self.schema is not None or self.rule is not None


class Grammars:
    """Makes grammars for a tokenizer. vocabulary: number of the model's tokens. end_tokens: tokens that end answers."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = end_tokens
        self._process = BoundedProcess("grammar", self._setup)

    def of_answer(self, bounds: AnswerConstraints, forms: Forms = PLAIN, *, thinks: bool = False) -> Grammar:
        """The grammar of an answer in the forms of a model. thinks: the prompt ends within the answer's reasoning.

        Raises ApiError if a schema is not supported, or if parameters of a function are not a schema of an object.
        """
        if bounds.rule is not None and bounds.functions and forms.calls is not None and forms.calls.is_answer:
            raise ApiError(400, f"with this model, tools and {bounds.param} cannot go together", param="tools")
        rules = GrammarRules(self._literal)
        form, param = forms.calls or FORMS["hermes"], "tools" if bounds.functions else bounds.param
        try:
            says = [self._calls(rules, bounds, form)] if bounds.functions else []
            if bounds.schema is not None and form.is_answer and bounds.functions:
                says = [rules.json({"anyOf": [bounds.schema, *map(_call_as_json, bounds.functions)]})]
            elif bounds.text_is_bound:
                text = rules.json(bounds.schema) if bounds.schema is not None else f"%lark {{\n{bounds.rule}\n}}"
                says.append(f"{rules.literal(form.lead) if form.lead else ''} {text}")
            start = f"start: {self._thought(rules, forms, thinks)} ({' | '.join(says)})"
            text = llguidance.LLMatcher.grammar_from_lark("\n".join([*rules.lines, start]))
        except (ValueError, TypeError, RecursionError) as error:  # a schema is too deep, or has values of wrong types
            raise _unsupported_grammar(error, param) from None
        tokens = self._tokens
        wrong = self._process.ask(text)[1]
        if wrong:
            raise _unsupported_grammar(wrong, param)
        limits = llguidance.LLParserLimits(**GRAMMAR_LIMITS)
        return Grammar(llguidance.LLMatcher(tokens, text, log_level=0, limits=limits), param)

    def read_tokenizer(self) -> None:
        """Reads the tokenizer before the first request, because reading stops all other threads for about a second."""
        with suppress(ApiError):  # the error is raised again for requests that need a grammar
            _ = self._tokens

    def close(self) -> None:
        self._process.kill_process()

    def _setup(self) -> dict[str, Any]:
        fast = copy(self._tokenizer.backend_tokenizer)
        fast.no_padding()
        fast.no_truncation()
        return {
            "tokenizer": fast.to_str(),
            "vocabulary": self._vocabulary,
            "end_tokens": sorted(self._end_tokens),
        }

    def _thought(self, rules: GrammarRules, forms: Forms, thinks: bool) -> str:
        reasoning = forms.reasoning
        if reasoning is None:
            return ""
        after = f"/[ \\n]{{0,2}}/ {rules.literal(reasoning.resumes) if reasoning.resumes else ''}"
        rest = f"{rules.text_until(reasoning.closing)} {after}"
        return rest if thinks else f"({rules.literal(reasoning.opening)} {rest})?"

    def _calls(self, rules: GrammarRules, bounds: AnswerConstraints, form: Form) -> str:
        schemas = [(one.name, _of_arguments(one, bound=bounds.required)) for one in bounds.functions]
        names = [rules.add_rule(form.syntax.call_rule(rules, *each)) for each in schemas]
        call = rules.add_rule(f"({' | '.join(names)}) {self._closing(rules, form)}")
        opening = "" if form.is_answer else rules.literal(form.opening)
        begin, end = (rules.literal(mark) if mark else '""' for mark in form.around)
        if bounds.required or bounds.text_is_bound:
            between = rules.literal(form.between) if form.between else ""
            more = f"({between} {opening} {call})*" if bounds.several and not bounds.required and opening else ""
            return f"{begin} {opening} {call} {more} {end}"
        if form.is_answer:
            return f"{call} | {rules.add_rule(_other_than(form.openings))}"
        if form.lead:
            asides = " ".join(["(", rules.literal(form.aside[0]), rules.text_until(form.aside[1]), ")*"])
            return f"{asides} ({rules.literal(form.lead)} TEXT | {opening} {call})"
        # A model may write the mark with ordinary tokens although it has a special token for the mark.
        spelled = rules.add_rule(f"TEXT {json.dumps(form.opening)}", "[lazy]")
        begins = rules.add_rule(f"{spelled} | TEXT ({begin})? {opening}")
        return f"TEXT | ({begins} {call})+ ({end})? TEXT" if bounds.several else f"{begins} {call} ({end})? | TEXT"

    def _closing(self, rules: GrammarRules, form: Form) -> str:
        ids = self._tokenizer(form.closing, add_special_tokens=False).input_ids if form.closing else []
        return "" if not ids or set(ids) <= set(self._end_tokens) else rules.literal(form.closing)

    def _literal(self, text: str) -> str:
        """An expression that matches a text; special tokens are written as ids, because llguidance requires that."""
        parts = re.split(f"({self._special})", text) if self._special else [text]
        literals = (
            json.dumps(part) if number % 2 == 0 else f"<[{self._tokenizer.convert_tokens_to_ids(part)}]>"
            for number, part in enumerate(parts)
            if part
        )
        return " ".join(literals)

    @cached_property
    def _special(self) -> str:
        held = self._tokens
        added = self._tokenizer.added_tokens_decoder.items()
        names = (token.content for number, token in added if held.is_special_token(number))
        return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        try:
            return llguidance.hf.from_tokenizer(self._tokenizer, self._vocabulary, eos_token=sorted(self._end_tokens))
        except ValueError as error:
            raise ApiError(400, f"this model's answers cannot be bound to JSON ({error}): ask for text") from None


def _of_arguments(tool: Function, *, bound: bool) -> dict[str, Any]:
    """The schema that the arguments of a call must fit. bound: the tool's schema applies even if it is not strict."""
    given = tool.parameters if bound or tool.strict else None
    schema: dict[str, Any] = {"type": "object"} | (given or {})
    if schema["type"] != "object":
        wrong = f"the arguments of {tool.name} must be an object: give its parameters the type object"
        raise ApiError(400, wrong, param="tools")
    return schema


def _call_as_json(function: Function) -> dict[str, Any]:
    """The schema of a call that is written as a JSON object."""
    schema = _of_arguments(function, bound=False)
    if '"$ref"' in json.dumps(schema):
        wrong = f"with this model, parameters of {function.name} cannot have a $ref beside a response_format"
        raise ApiError(400, wrong, param="tools")
    named = {"name": {"const": function.name}, "parameters": schema}
    return {"type": "object", "properties": named, "required": [*named], "additionalProperties": False}


_SCHEMAS = ("tools", "response_format", None)


def _unsupported_grammar(why: object, param: str | None) -> ApiError:
    # The lines of the error after the first one show the grammar.
    reason = str(why).partition("\n")[0].rpartition("failed to compile JSON schema: ")[2]
    return ApiError(
        400,
        f"{'the JSON schema' if param in _SCHEMAS else param} cannot be kept to: {reason}: use a simpler one",
        param=param,
    )


def _other_than(openings: Collection[str]) -> str:
    """A regular expression for texts that do not begin with an opening, with or without white space before it."""

    def rest(endings: Collection[str], but: str) -> str:
        heads = dict.fromkeys(ending[0] for ending in endings)
        parts = [f"[^{but}{''.join(map(re.escape, heads))}](.|\\n)*"]
        for head in heads:
            tails = [ending[1:] for ending in endings if ending[0] == head]
            parts += [] if "" in tails else [re.escape(head) + rest(tails, "")]
        return f"({'|'.join(parts)})?"

    space = r" \n"
    return f"/[{space}]*{rest(openings, space)}/"


# Maximum processor time for the masks of an answer, in s: `MASKS_S` plus `MASK_S` for each token
MASKS_S, MASK_S = 10.0, 0.02
_NO_TOKEN = "doesn't satisfy the grammar"  # Text in an error of llguidance; its other errors report exceeded limits


class AllowedTokens:
    """The tokens that may come next in one answer with a grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self._matcher = grammar.matcher.deep_copy()
        self._param = grammar.param
        self._taken: list[int] = []
        self._spent_s = 0.0

    def forbid_others(self, answer: list[int], scores: torch.Tensor) -> None:
        """Sets the scores `[vocabulary]` of all tokens that cannot follow `answer` to -inf, in place.

        Raises ApiError if the grammar takes too much time or memory with this answer.
        """
        began = time.thread_time()
        # While drafts are verified, an answer may be shorter than the answer of the last call, or differ from it.
        same = shared(answer, self._taken)
        self._matcher.rollback(len(self._taken) - same)
        del self._taken[same:]
        for token in answer[same:]:
            if self._matcher.is_stopped():  # this answer has ended, but other answers of the batch have not
                break
            if self._matcher.consume_token(token):
                self._taken.append(token)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if error := self._matcher.get_error():
            if _NO_TOKEN in error:
                raise RuntimeError("a token that was allowed does not match the grammar")
            raise _unsupported_grammar(error, self._param)
        self._spent_s += time.thread_time() - began
        if self._spent_s > MASKS_S + MASK_S * len(answer):
            raise _unsupported_grammar(f"the tokens of this answer take {self._spent_s:.0f} s to find", self._param)
        possible = torch.from_numpy(np.unpackbits(mask, count=len(scores), bitorder="little"))
        scores.masked_fill_(possible.to(scores.device) == 0, -torch.inf)
