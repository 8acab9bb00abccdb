"""Answers that keep to a JSON schema: which tokens may come next, as llguidance finds out."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import llguidance.hf
import numpy as np
import torch

from splitnet.drafts.drafter import shared
from splitnet.serve.failures import ApiError
from splitnet.serve.text import CLOSING, OPENING

ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written: where white space is free, small models write nothing else until their context is full."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must keep to; checked already."""

    text: str
    tokens: llguidance.LLTokenizer


class Function(Protocol):
    """A function that the model may call; `parameters`: a JSON schema of its arguments, to which strict ones keep."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class Grammars:
    """Makes grammars for a tokenizer, whose model knows so many tokens and ends answers with some."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = end_tokens

    def of_schema(self, schema: dict[str, Any], param: str | None = None) -> Grammar:
        """The grammar of JSON that fits the schema in `param` of a request. Raises ApiError if it is not supported."""
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=ONE_LINE)
        except ValueError as error:  # it is nested too deep
            raise _not_kept_to(error, param) from None
        return self._checked(text, param)

    def of_calls(self, tools: Sequence[Function], *, required: bool, several: bool = False) -> Grammar:
        """The grammar of an answer that may call some tools, or of one call of one of them.

        A `required` call fits the parameters of its tool. Otherwise the answer is text, calls in it fit those of tools
        that are strict, and with `several` it may go on after a call.

        Raises ApiError if the parameters of a tool are no schema of an object, or one that is not supported.
        """
        opening, closing = self._tag(OPENING), self._tag(CLOSING)
        rules = [f'call: "\\n" ({" | ".join(f"call_{number}" for number in range(len(tools)))}) "\\n" {closing}']
        # Each schema stands alone, as its references are to places in itself.
        for number, tool in enumerate(tools):
            begins = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
            schema = json.dumps(_of_arguments(tool, bound=required) | {"x-guidance": ONE_LINE})
            rules.append(f'call_{number}: {begins} %json {schema} "}}"')
        if required:
            rules.append(f"start: {opening} call")
        else:
            rules.append("start: (begins call)* TEXT" if several else "start: begins call | TEXT")
            # A model may spell the tag although it has a token for it.
            rules += [f"begins: spelled | TEXT {opening}", f'spelled[lazy]: TEXT "{OPENING}"', r"TEXT: /(.|\n)*/"]
        return self._checked(llguidance.LLMatcher.grammar_from_lark("\n".join(rules)), "tools")

    def _tag(self, text: str) -> str:
        """A tag as a rule matches it: many tokenizers have a token for it, which llguidance takes for no text."""
        held = self._tokens
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return f"<[{ids[0]}]>" if len(ids) == 1 and held.is_special_token(ids[0]) else json.dumps(text)

    def _checked(self, text: str, param: str | None) -> Grammar:
        tokens = self._tokens
        wrong = llguidance.LLMatcher.validate_grammar(text, tokens)
        if wrong:
            raise _not_kept_to(wrong, param)
        return Grammar(text, tokens)

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        try:
            return llguidance.hf.from_tokenizer(self._tokenizer, self._vocabulary, eos_token=sorted(self._end_tokens))
        except ValueError as error:
            raise ApiError(400, f"this model's answers cannot be bound to JSON ({error}): ask for text") from None


def _of_arguments(tool: Function, *, bound: bool) -> dict[str, Any]:
    """The schema that the arguments of a call fit; `bound`: the tool's own, strict or not."""
    given = tool.parameters if bound or tool.strict else None
    schema: dict[str, Any] = {"type": "object"} | (given or {})
    if schema["type"] != "object":
        wrong = f"the arguments of {tool.name} are an object: give its parameters that type"
        raise ApiError(400, wrong, param="tools")
    return schema


def _not_kept_to(why: object, param: str | None) -> ApiError:
    return ApiError(400, f"the JSON schema cannot be kept to: {why}: use a simpler one", param=param)


class AllowedTokens:
    """What may come next in one answer."""

    def __init__(self, grammar: Grammar) -> None:
        self._matcher = llguidance.LLMatcher(grammar.tokens, grammar.text)
        self._taken: list[int] = []

    def forbid_others(self, answer: list[int], scores: torch.Tensor) -> None:
        """Sets the scores `[vocabulary]` of all tokens that cannot follow to -inf; `answer`: the tokens so far."""
        # Where several positions are looked at in one step, an answer may be shorter or another one than before.
        same = shared(answer, self._taken)
        self._matcher.rollback(len(self._taken) - same)
        del self._taken[same:]
        for token in answer[same:]:
            if self._matcher.is_stopped():  # the answer has ended, others of its batch have not
                break
            if not self._matcher.consume_token(token):
                raise RuntimeError("a token that was allowed is none of the grammar")
            self._taken.append(token)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        possible = torch.from_numpy(np.unpackbits(mask, count=len(scores), bitorder="little"))
        scores.masked_fill_(possible.to(scores.device) == 0, -torch.inf)
