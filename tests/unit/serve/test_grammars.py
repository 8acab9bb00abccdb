"""Tokens that may come next in answers with a grammar, and grammars that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import AddedToken

import splitnet
from splitnet.serve.answers.call_forms import FORMS
from splitnet.serve.answers.grammars import AllowedTokens, AnswerConstraints, Grammar, Grammars
from splitnet.serve.answers.sampling import Sampling, TokenChooser
from splitnet.serve.apis.openai_requests import FunctionDefinition
from splitnet.serve.failures import ApiError
from splitnet.serve.prompts import Prompts

HERMES = FORMS["hermes"]


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Path) -> Any:
    return splitnet.AutoTokenizer.from_pretrained(demo_checkpoint)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, 49152, {2})


def possible(allowed: AllowedTokens, answer: list[int]) -> set[int]:
    scores = torch.zeros(49154)
    allowed.forbid_others(answer, scores)
    return set(scores.isfinite().nonzero().flatten().tolist())


def test_allowed_tokens_take_answers_in_any_order(grammars: Grammars, tokenizer: Any) -> None:
    allowed = AllowedTokens(grammars.of_answer(AnswerConstraints(schema={"enum": ["red", "rose", "blue"]})))
    red, blue = (tokenizer(text).input_ids for text in ('"red"', '"blue"'))
    for answer in (red, blue):
        assert all(token in possible(allowed, answer[:length]) for length, token in enumerate(answer))
    assert possible(allowed, red) == {2}, "only the end"
    assert set(tokenizer.batch_decode([[token] for token in possible(allowed, [])])) <= {'"', '"r', '"b'}
    assert possible(allowed, blue) == {2}


def test_only_allowed_tokens_are_chosen(grammars: Grammars, tokenizer: Any) -> None:
    allowed = AllowedTokens(grammars.of_answer(AnswerConstraints(schema={"const": 7})))
    scores = torch.randn(1, 49152, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    chooser = TokenChooser(Sampling(1.0, 1.0, seed=1), 1, begins=3, allowed=[allowed])
    (chosen,) = chooser(torch.zeros(1, 3, dtype=torch.long), scores).argmax(dim=-1).tolist()
    assert tokenizer.decode([chosen]) == "7"
    # The grammar does not change the score of the chosen token.
    assert torch.equal(scores, before)
    assert chooser.scored[0, 3].logprob == pytest.approx(float(scores.log_softmax(-1)[0, chosen]))


@pytest.mark.parametrize("schema", [{"type": "rope"}, {"$ref": "#/none"}, {"minimum": "a"}])
def test_unsupported_schemas_are_refused(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="cannot be kept to"):
        grammars.of_answer(AnswerConstraints(schema=schema))


def unfolding(kind: str, depth: int) -> dict[str, Any]:
    """A schema with two references at each level, which unfolds to `2 ** depth` parts."""
    parts = {f"d{n}": {kind: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": parts | {f"d{depth}": {"type": "string", "pattern": "a+"}}}


@pytest.mark.parametrize(
    "bounds",
    [
        AnswerConstraints(schema=unfolding("allOf", 24)),
        AnswerConstraints(schema={"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(40)]}),
        AnswerConstraints(rule=f"start: %json {json.dumps(unfolding('allOf', 24))}", param="guided_grammar"),
        AnswerConstraints(rule="start: /(a{1000}){1000}/", param="guided_grammar"),
        AnswerConstraints(
            rule="\n".join(["start: r0", *(f"r{n}: r{n + 1} r{n + 1}" for n in range(255)), 'r255: "a"'])
        ),
        AnswerConstraints(schema={"properties": {f"p{n}": {"type": "integer"} for n in range(3000)}, "type": "object"}),
    ],
    ids=["references", "patterns", "schema in a grammar", "repeats", "rules", "properties"],
)
def test_expensive_grammars_are_refused_without_cost_for_this_process(
    grammars: Grammars, bounds: AnswerConstraints
) -> None:
    assert grammars.of_answer(AnswerConstraints(schema={"const": 7}))
    process, before = grammars._process._running, psutil.Process().memory_info().rss
    with pytest.raises(ApiError, match="cannot be kept to") as refused:
        grammars.of_answer(bounds)
    assert refused.value.status == 400
    assert psutil.Process().memory_info().rss - before < 32 << 20
    assert grammars.of_answer(AnswerConstraints(schema={"const": 7}))
    assert grammars._process._running is process, "a refused grammar must not end the grammar process"


def test_an_answer_that_exceeds_the_grammars_bounds_is_an_error(grammars: Grammars, tokenizer: Any) -> None:
    allowed = AllowedTokens(grammars.of_answer(AnswerConstraints(schema={"type": "string", "pattern": ".*a.{400}"})))
    answer = tokenizer('"' + "ab " * 300, add_special_tokens=False).input_ids
    with pytest.raises(ApiError, match="the JSON schema cannot be kept to: lexer error"):
        for length in range(len(answer)):
            possible(allowed, answer[:length])


TOWN = {"properties": {"name": {"enum": ["Paris", "Rome"]}}, "required": ["name"], "type": "object"}
TRIP = {"$defs": {"Town": TOWN}, "properties": {"to": {"$ref": "#/$defs/Town"}}, "required": ["to"], "type": "object"}
LIST = {"properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]}


CITY = {"type": "object", "properties": {"name": {"const": "Rome"}}, "required": ["name"]}


@pytest.mark.parametrize(
    ("schema", "answer", "kept"),
    [
        (CITY, {"name": "Rome"}, True),
        (CITY, {"name": "Rome", "x": 1}, False),
        (CITY | {"additionalProperties": True}, {"name": "Rome", "x": 1}, True),
        (CITY | {"required": ["x"]}, {"name": "Rome", "x": 1}, True),
        (CITY | {"patternProperties": {"x": {"type": "integer"}}}, {"name": "Rome", "x": 1}, True),
        ({"type": "object"}, {"x": 1}, True),
        ({"type": "array", "items": CITY}, [{"name": "Rome"}, {"name": "Rome", "x": 1}], False),
        ({"$defs": {"city": CITY}, "anyOf": [{"$ref": "#/$defs/city"}]}, {"name": "Rome", "x": 1}, False),
        (
            {"allOf": [CITY, {"properties": {"x": {"type": "integer"}}, "required": ["x"]}]},
            {"name": "Rome", "x": 1},
            True,
        ),
        (CITY | {"anyOf": [{"properties": {"x": {"type": "integer"}}}]}, {"name": "Rome", "x": 1}, True),
    ],
)
def test_objects_have_the_properties_that_a_schema_names(
    grammars: Grammars, tokenizer: Any, schema: Any, answer: Any, kept: bool
) -> None:
    assert is_kept_to(grammars.of_answer(AnswerConstraints(schema=schema)), tokenizer, json.dumps(answer)) == kept


def tools(**parameters: Any) -> list[FunctionDefinition]:
    return [
        FunctionDefinition(name=name, parameters=schema, strict=name != "any") for name, schema in parameters.items()
    ]


def call(name: str, arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


@pytest.fixture(scope="module", params=[None, False, True], ids=["spelled", "token", "special"])
def tags(request: pytest.FixtureRequest, demo_checkpoint: Path) -> tuple[Grammars, Any]:
    """Grammars and their tokenizer, by parameter: one that spells the tags of calls in several tokens, one with an
    ordinary token for each tag, or one with a special token for each, as Qwen and Hermes have."""
    tokenizer = splitnet.AutoTokenizer.from_pretrained(demo_checkpoint)
    if request.param is not None:
        added = [AddedToken(tag, special=request.param, normalized=False) for tag in (HERMES.opening, HERMES.closing)]
        tokenizer.add_tokens(added, special_tokens=request.param)
        assert len(tokenizer(HERMES.opening).input_ids) == 1
    return Grammars(tokenizer, 49154, {2}), tokenizer


def is_kept_to(grammar: Grammar, tokenizer: Any, text: str) -> bool:
    """Whether a grammar allows a text as a whole answer."""
    answer = tokenizer(text, add_special_tokens=False).input_ids
    allowed = AllowedTokens(grammar)
    return all(token in possible(allowed, answer[:length]) for length, token in enumerate([*answer, 2]))


@pytest.mark.parametrize(
    ("name", "arguments", "fits"),
    [
        ("trip", {"to": {"name": "Rome"}}, True),
        ("trip", {"to": {"name": "Oslo"}}, False),
        ("chain", {"next": {"next": None}}, True),
        ("chain", {"next": 1}, False),
        ("any", {"to": 1}, False),
        ("any", {"to": {"name": "Rome"}}, True),
        ("none", {}, True),
        ("none", 7, False),
        ("other", {}, False),
    ],
)
def test_references_in_parameters_are_relative_to_the_parameters(
    tags: tuple[Grammars, Any], name: str, arguments: Any, fits: bool
) -> None:
    grammars, tokenizer = tags
    grammar = grammars.of_answer(AnswerConstraints(tools(trip=TRIP, chain=LIST, any=TRIP, none=None), required=True))
    assert is_kept_to(grammar, tokenizer, call(name, arguments)) == fits


ROME, OSLO = (call("trip", {"to": {"name": name}}) for name in ("Rome", "Oslo"))


@pytest.mark.parametrize(
    ("text", "one", "several"),
    [
        ("Hello, 1 < 2.", True, True),
        ("Let me look.\n" + ROME, True, True),
        (OSLO, False, False),
        (call("any", {"to": 1}), True, True),
        (call("any", 1), False, False),
        (call("other", {}), False, False),
        (ROME + "\n" + ROME, False, True),
        (ROME + " There.", False, True),
        (ROME + OSLO, False, False),
    ],
)
def test_optional_calls_are_bound_by_strict_and_several(
    tags: tuple[Grammars, Any], text: str, one: bool, several: bool
) -> None:
    grammars, tokenizer = tags
    for allowed, fits in ((False, one), (True, several)):
        grammar = grammars.of_answer(AnswerConstraints(tools(trip=TRIP, any=TRIP), several=allowed))
        assert is_kept_to(grammar, tokenizer, text) == fits


def test_a_tag_in_ordinary_tokens_begins_a_call(tags: tuple[Grammars, Any]) -> None:
    grammars, tokenizer = tags
    spelled = [
        number
        for part in ("<", "tool_call", ">", ROME.removeprefix(HERMES.opening))
        for number in tokenizer(part, add_special_tokens=False).input_ids
    ]
    assert tokenizer.decode(spelled) == ROME
    allowed = AllowedTokens(grammars.of_answer(AnswerConstraints(tools(trip=TRIP), several=False)))
    assert all(token in possible(allowed, spelled[:length]) for length, token in enumerate([*spelled, 2]))


def test_a_token_that_the_grammar_excludes_is_an_error(tags: tuple[Grammars, Any]) -> None:
    grammars, tokenizer = tags
    allowed = AllowedTokens(grammars.of_answer(AnswerConstraints(tools(trip=TRIP), required=True)))
    with pytest.raises(RuntimeError, match="does not match the grammar"):
        possible(allowed, tokenizer("x").input_ids)


def test_special_tags_of_calls_stay_in_the_text(tags: tuple[Grammars, Any]) -> None:
    _, tokenizer = tags
    text = ROME + "<|im_end|>"
    assert Prompts(tokenizer, 49154, None).decode(tokenizer(text, add_special_tokens=False).input_ids) == ROME


def test_parameters_must_be_an_object(grammars: Grammars) -> None:
    with pytest.raises(ApiError, match="the arguments of f must be an object"):
        grammars.of_answer(AnswerConstraints(tools(f={"type": "integer"}), required=True))


def test_an_unsuitable_tokenizer_is_refused() -> None:
    with pytest.raises(ApiError, match="ask for text"):
        Grammars(object(), 10, {2}).of_answer(AnswerConstraints(schema={"type": "object"}))
