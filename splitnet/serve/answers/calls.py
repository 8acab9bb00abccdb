"""Syntaxes in which models write function calls: each can be read, written, and described as grammar rules."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from keyword import iskeyword
from typing import Any, Protocol

ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Options of llguidance that fix the white space of JSON. With free white space, small models write only white space
until their context is full."""

_ANY = r"(.|\n)*"

MOST_RULES, MOST_SIZE = 1000, 2**20  # Maximum number of rules of a grammar, and of their characters
# Maximum number of references that are followed (or of alternatives), and of items in minItems or maxItems
MOST_REFERENCES, MOST_PROPERTIES = 256, 256
MOST_NAMES = 2**13  # Maximum number of names in the schemas that are merged into one

Schema = Mapping[str, Any]
Read = list[tuple[str, dict[str, Any]]]  # names and arguments


class NoCall(Exception):
    """A text is not a call. goes_on: the text ends inside a string, so the call may continue after the closing mark."""

    def __init__(self, goes_on: bool = False) -> None:
        super().__init__()
        self.may_continue = goes_on


class GrammarRules:
    """Collects rules of a grammar in llguidance's Lark syntax. literal: returns an expression that matches a text."""

    def __init__(self, literal: Callable[[str], str]) -> None:
        self.literal = literal
        self.lines = [r"TEXT: /(.|\n)*/"]
        self._size = 0

    def add_rule(self, expression: str, attributes: str = "") -> str:
        """Adds a rule and returns its name. Raises ValueError if the grammar becomes too large."""
        name = f"rule_{len(self.lines)}"
        self.lines.append(f"{name}{attributes}: {expression}")
        self._size += len(expression)
        if self._size > MOST_SIZE or len(self.lines) > MOST_RULES:
            raise ValueError("it is too large")
        return name

    def json(self, schema: Schema) -> str:
        # If the parts of an `allOf` were closed, each part would forbid the properties of the other parts.
        kept = schema if '"allOf"' in json.dumps(schema) else close_objects(schema)
        return f"%json {json.dumps({**kept, 'x-guidance': ONE_LINE})}"

    def text_until(self, end: str) -> str:
        """Returns the name of a rule that matches any text up to and including the first `end`."""
        literal = self.literal(end)
        return (
            self.add_rule(f"TEXT {literal}", "[lazy]")
            if literal == json.dumps(end)
            else self.add_rule(f"TEXT {literal}")
        )

    def some_of(self, items: Sequence[tuple[str, bool]], separator: str) -> str:
        """Returns the name of a rule that matches `items` in their order, with `separator` between them.

        items: an expression for each item, and whether the item is required; other items may be missing.
        """
        first = after = self.add_rule('""')
        for item, required in reversed(items):
            tail, head = f"{separator} {item} {after}", f"{item} {after}"
            first = self.add_rule(head if required else f"{head} | {first}")
            after = self.add_rule(tail if required else f"{tail} | {after}")
        return first


def _all(schema: Schema, name: str) -> list[Any]:
    """The items of a list in an unchecked schema; empty if the value is not a list."""
    given = schema.get(name)
    return given if isinstance(given, list) else []


def choices_of(schema: Schema) -> list[Any]:
    """The values of `const` or `enum`; empty: the schema has neither."""
    return [schema["const"]] if "const" in schema else _all(schema, "enum")


def either_of(schema: Schema) -> list[Schema]:
    return [each for each in _all(schema, "anyOf") + _all(schema, "oneOf") if isinstance(each, Mapping)]


_OPEN = {"patternProperties", "anyOf", "oneOf", "not", "if", "$ref", "unevaluatedProperties", "minProperties"}


def close_objects(schema: Any) -> Any:
    """Returns the schema with `additionalProperties` false in objects with `properties` that do not set it themselves.

    Answers that fit the returned schema also fit the given schema. If further properties are allowed, small models
    write them without end, and programs expect only the named properties.
    """
    if isinstance(schema, list):
        return [*map(close_objects, schema)]
    if not isinstance(schema, Mapping):
        return schema
    made, named = {**schema}, schema.get("properties")
    for name in {"properties", "$defs", "definitions"} & made.keys():
        if isinstance(made[name], Mapping):
            made[name] = {key: close_objects(each) for key, each in made[name].items()}
    for name in ({"items", "prefixItems"} if named else {"items", "prefixItems", "anyOf", "oneOf"}) & made.keys():
        made[name] = close_objects(made[name])
    if isinstance(named, Mapping) and not _OPEN & made.keys() and named.keys() >= set(map(str, _all(made, "required"))):
        made.setdefault("additionalProperties", False)
    return made


def merge_references(schema: Schema, root: Schema) -> Schema:
    """A schema with its top-level `$ref` and `allOf` merged into it; references point into `root`. When the merged
    schemas have more than `MOST_NAMES` names, the remaining `$ref` or `allOf` stays."""
    names = 0
    for _ in range(MOST_REFERENCES):
        if (names := names + len(schema)) > MOST_NAMES:
            break
        if isinstance(reference := schema.get("$ref"), str):
            schema = {**{name: each for name, each in schema.items() if name != "$ref"}, **_found(root, reference)}
        elif parts := [each for each in _all(schema, "allOf") if isinstance(each, Mapping)]:
            merged: dict[str, Any] = {name: each for name, each in schema.items() if name != "allOf"}
            for part in parts:
                merged |= part
            schema = merged
        else:
            break
    return schema


def _kind_of(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return {"integer", "number"}
    kinds = {str: "string", float: "number", list: "array", dict: "object", type(None): "null"}
    return {kinds.get(type(value), "")}


def json_types_of(schema: Schema, root: Schema, seen: set[int] | None = None) -> set[str]:
    """The JSON types that a schema allows; empty: any type. seen: Python ids of alternatives that are included."""
    schema = merge_references(schema, root)
    if choices := choices_of(schema):
        return set().union(*map(_kind_of, choices))
    given = schema.get("type")
    kinds = {each for each in ([given] if isinstance(given, str) else _all(schema, "type")) if isinstance(each, str)}
    seen = set[int]() if seen is None else seen
    for choice in either_of(schema):
        if id(choice) not in seen and len(seen) < MOST_REFERENCES:
            seen.add(id(choice))
            kinds |= json_types_of(choice, root, seen)
    return kinds


def properties_of(schema: Schema) -> list[tuple[str, Schema, bool]]:
    """The name of each property of an object, its schema with the needed definitions, and whether it is required."""
    required = {each for each in _all(schema, "required") if isinstance(each, str)}
    given = schema.get("properties")
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    named = given.items() if isinstance(given, Mapping) else ()
    found: list[tuple[str, Schema, bool]] = []
    for name, each in named:
        alone = dict(each) if isinstance(each, Mapping) else {}
        if shared and '"$ref"' in json.dumps(alone):
            alone |= shared
        found.append((name, alone, name in required))
    return found


def _check_references(schema: Schema) -> None:
    """Raises ValueError if a part of a schema refers to anything but definitions."""
    if re.search(r'"\$ref": *"(?!#/(\$defs|definitions)/)', json.dumps(schema)):
        raise ValueError("with this model, references can only be to $defs")


# Maximum number of parts of a schema that one call of `fits_schema` checks, and of characters of the schema
MOST_CHECKS, MOST_CHECKED = 1000, 2**18


def fits_schema(value: Any, schema: Schema, root: Schema | None = None, checks: Iterator[int] | None = None) -> bool:
    """Whether a value has the types, the choices and the required names of a schema; references point into `root`.

    Raises ValueError or RecursionError if the check takes too long.
    """
    if root is None or checks is None:
        if len(json.dumps(schema)) > MOST_CHECKED:
            raise ValueError("it is too large")
        root, checks = schema, count()
    schema = merge_references(schema, root)
    if "$ref" in schema or next(checks) >= MOST_CHECKS:
        raise ValueError("it refers to itself, or has too many parts")
    given, choices, several = schema.get("type"), choices_of(schema), either_of(schema)
    kinds = [given] if isinstance(given, str) else _all(schema, "type")
    if (kinds and not any(kind in kinds for kind in _kind_of(value))) or (choices and value not in choices):
        return False
    if several and not any(fits_schema(value, each, root, checks) for each in several):
        return False
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, list):
        parts = [(each, schema.get("items")) for each in value]
    elif isinstance(value, dict):
        named = schema.get("properties")
        parts = [(each, named.get(name)) for name, each in value.items()] if isinstance(named, Mapping) else []
        if isinstance(named, Mapping) and not schema.get("additionalProperties") and value.keys() - named.keys():
            return False
        if any(name not in value for name in _all(schema, "required")):
            return False
    return all(fits_schema(each, part, root, checks) for each, part in parts if isinstance(part, Mapping))


class Syntax(Protocol):
    """The syntax of a call between its opening and closing marks. pattern: a regex that matches a mark in the call."""

    @property
    def pattern(self) -> str: ...

    def parse_calls(self, body: str, schemas: Mapping[str, Schema]) -> Read:
        """The calls in a text. schemas: JSON schemas of the arguments of known functions. Raises NoCall."""
        ...

    def format_call(self, name: str, arguments: Mapping[str, Any]) -> str: ...

    def call_rule(self, rules: GrammarRules, name: str, schema: Schema) -> str:
        """A rule that matches a call of the function with arguments that fit `schema`."""
        ...


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise NoCall(goes_on=error.msg.startswith("Unterminated string")) from None
    except (ValueError, RecursionError):
        raise NoCall from None


def _object(value: Any) -> dict[str, Any]:
    given = _loads(value) if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise NoCall
    return given


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_OF_CALLS = {"type", "id", "name", "arguments", "parameters"}


@dataclass(frozen=True)
class JsonCalls:
    """JSON objects with a name and arguments: one object, a list of objects, or several objects in a row."""

    before: str = "\n"
    after: str = "\n"
    arguments: str = "arguments"
    has_arguments: bool = False  # an object without arguments is not a call

    pattern: str = field(default="", init=False)

    def parse_calls(self, body: str, schemas: Mapping[str, Schema]) -> Read:
        text = body.strip()
        if text.startswith("{"):
            text = "[" + re.sub(r"\}\s*+(?:;\s*+)?\{\s*+(?=\"(?:name|type)\")", "}, {", text) + "]"
        calls: Read = []
        found = _loads(text)
        for each in found if isinstance(found, list) else [found]:
            if not isinstance(each, dict) or not isinstance(each.get("name"), str):
                raise NoCall
            arguments = next((each[key] for key in ("arguments", "parameters") if key in each), None)
            if self.has_arguments and (arguments is None or each.keys() - _OF_CALLS):
                raise NoCall  # the object may be the definition of a tool, which has a name and parameters, too
            arguments = {} if arguments is None else arguments
            calls.append((each["name"], _object(arguments)))
        if not calls:
            raise NoCall
        return calls

    def format_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f'{self.before}{{"name": "{name}", "{self.arguments}": {_dumped(arguments)}}}{self.after}'

    def call_rule(self, rules: GrammarRules, name: str, schema: Schema) -> str:
        begins = rules.literal(f'{self.before}{{"name": "{name}", "{self.arguments}": ')
        return f"{begins} {rules.json(schema)} {rules.literal('}' + self.after)}"


@dataclass(frozen=True)
class NamedJson:
    """A name, a separator, and the arguments as JSON. also: a regex that matches all spellings of the separator."""

    separator: str
    after: str = ""
    also: str = ""

    @property
    def pattern(self) -> str:
        return self.also or re.escape(self.separator.strip())

    def parse_calls(self, body: str, schemas: Mapping[str, Schema]) -> Read:
        found = re.match(rf"\s*+([\w.-]++)\s*+(?:{self.pattern})(.*)$", body, re.DOTALL)
        if found is None:
            raise NoCall
        return [(found[1], _object(found[2].strip().removesuffix(self.after.strip())))]

    def format_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"{name}{self.separator}{_dumped(arguments)}{self.after}"

    def call_rule(self, rules: GrammarRules, name: str, schema: Schema) -> str:
        after = rules.literal(self.after) if self.after else ""
        return f"{rules.literal(name + self.separator)} {rules.json(schema)} {after}"


def _loose(piece: str) -> str:
    """A regex that matches a piece of text with any white space around it."""
    return r"\s*" + re.escape(piece.strip()) + r"\s*" if piece.strip() else r"\s*"


@dataclass(frozen=True)
class Tagged:
    """Each argument between its own tags: strings are written raw, other values as JSON."""

    after_name: str
    before_key: str
    after_key: str
    after_value: str
    before_name: str = ""
    last: str = ""
    before_json: str = ""  # the text between key and value, in place of `after_key`, if the value is not a string

    def parse_calls(self, body: str, schemas: Mapping[str, Schema]) -> Read:
        head = re.match(rf"{_loose(self.before_name)}([^\s<>\"]+){_loose(self.after_name)}", body)
        if head is None:
            raise NoCall
        arguments: dict[str, Any] = {}
        known = {name: schema for name, schema, _ in properties_of(schemas.get(head[1], {}))}
        key, end, last = (re.escape(piece.strip()) for piece in (self.before_key, self.after_value, self.last))
        texts, others = (re.escape(self._after_key(is_json).strip()) for is_json in (False, True))
        one = re.compile(
            rf"\s*{key}(?P<key>[^<>\"]*?)(?:(?P<text>{texts})|{others})(?P<value>.*?){end}(?=\s*+(?:{key}|{last}\s*+$))",
            re.DOTALL,
        )
        at = head.end()
        while found := one.match(body, at):
            value, at = found["value"], found.end()
            # If the tags of this syntax include line breaks, one line break on each side is not part of the value.
            value = value.removeprefix("\n") if self.after_key.endswith("\n") else value
            value = value.removesuffix("\n") if self.after_value.startswith("\n") else value
            told = found["text"] is not None if texts != others else None
            arguments[found["key"]] = _typed(value, known.get(found["key"]), told)
        if body[at:].strip() != self.last.strip():
            raise NoCall(goes_on=self.before_key.strip() in body[at:])
        return [(head[1], arguments)]

    @property
    def pattern(self) -> str:
        return re.escape(self.before_key)

    def _after_key(self, is_json: bool) -> str:
        return self.before_json if is_json and self.before_json else self.after_key

    def format_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return (
            f"{self.before_name}{name}{self.after_name}"
            + "".join(
                f"{self.before_key}{key}{self._after_key(not isinstance(value, str))}"
                f"{value if isinstance(value, str) else _dumped(value)}{self.after_value}"
                for key, value in arguments.items()
            )
            + self.last
        )

    def call_rule(self, rules: GrammarRules, name: str, schema: Schema) -> str:
        literal, items = rules.literal, list[tuple[str, bool]]()
        for key, each, required in properties_of(schema):
            _check_references(each)
            begins, is_json = literal(f"{self.before_key}{key}"), literal(self._after_key(True))
            texts, others = _split_string_choices(each)
            values = [f"{literal(self.after_key)} {_raw_text(rules, one, self.after_value)}" for one in texts]
            values += [f"{is_json} {rules.json(one)} {literal(self.after_value)}" for one in others]
            items.append((rules.add_rule(f"{begins} ({' | '.join(values)})"), required))
        if "properties" not in schema:
            values = [f"{literal(self.after_key)} {rules.text_until(self.after_value)}"]
            if self.before_json:
                values.append(f"{literal(self.before_json)} {rules.json({})} {literal(self.after_value)}")
            one = f'{literal(self.before_key)} /[^<>"\\n]+/ ({" | ".join(values)})'
            items.append((rules.add_rule(f"({one})*"), True))
        begins = literal(self.before_name + name + self.after_name)
        return f"{begins} {rules.some_of(items, '')} {literal(self.last) if self.last else ''}"


def _split_string_choices(schema: Schema, looks: Iterator[int] | None = None) -> tuple[list[Schema], list[Schema]]:
    """The alternatives of a schema that are strings, which calls contain without quotes, and all other alternatives.

    looks: counts the alternatives. Raises ValueError if there are more than `MOST_REFERENCES`.
    """
    looks = looks or count()
    if next(looks) > MOST_REFERENCES:
        raise ValueError("a schema has too many choices")
    flat = merge_references(schema, schema)
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    if choices := choices_of(flat):
        texts = [each for each in choices if isinstance(each, str)]
        others = [each for each in choices if not isinstance(each, str)]
        return [{"enum": texts}] if texts else [], [{"enum": others}] if others else []
    if several := either_of(flat):
        apart = [_split_string_choices({**shared, **each}, looks) for each in several]
        return [one for texts, _ in apart for one in texts], [one for _, others in apart for one in others]
    kinds = json_types_of(flat, schema)
    others: list[Schema] = [] if kinds else [schema]
    if kinds - {"string"}:
        others.append({**shared, **flat, "type": sorted(kinds - {"string"})})
    return [flat] if "string" in kinds else [], others


def _typed(value: str, schema: Schema | None, is_string: bool | None) -> Any:
    """The value of an argument. is_string: whether the argument's tag marks a string; None: the tag does not say."""
    kinds = json_types_of(schema, schema) if schema is not None else set[str]()
    if is_string or (is_string is None and kinds == {"string"}):
        return value
    choices = choices_of(merge_references(schema, schema)) if schema is not None else []
    if value in choices:
        return value
    read: Any = {"True": True, "False": False, "None": None}.get(value, value)
    with suppress(ValueError, RecursionError):
        read = json.loads(value)
    return read if "string" not in kinds or _kind_of(read) & (kinds - {"string"}) else value


def _raw_text(rules: GrammarRules, schema: Schema, end: str) -> str:
    """Returns an expression that matches a string without quotes, followed by `end`."""
    if choices := choices_of(schema):
        texts = (each if isinstance(each, str) else _dumped(each) for each in choices)
        return f"({' | '.join(map(rules.literal, texts))}) {rules.literal(end)}"
    is_long = "minLength" in schema or "maxLength" in schema
    if "pattern" in schema:
        if is_long:
            raise ValueError("with this model, a string cannot have both a pattern and a length")
        given = str(schema["pattern"])
        before, after = "" if given.startswith("^") else _ANY, "" if given.endswith("$") else _ANY
        pattern = before + given.removeprefix("^").removesuffix("$") + after
    elif is_long:
        pattern = rf"(.|\n){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
    else:
        return rules.text_until(end)
    escaped = re.sub(r"(?<!\\)/", r"\\/", pattern)
    return f"/{escaped}/ {rules.literal(end)}"


@dataclass(frozen=True)
class Python:
    """A list of calls in Python's syntax, with keyword arguments."""

    pattern: str = field(default="", init=False)

    def parse_calls(self, body: str, schemas: Mapping[str, Schema]) -> Read:
        names = {"true": True, "false": False, "null": None}
        # Names of functions may have hyphens, which Python's names cannot have.
        known = {f"function_{number}_": name for number, name in enumerate(schemas) if not name.isidentifier()}
        for placeholder, name in known.items():
            body = re.sub(rf"(?<![\w-]){re.escape(name)}\(", f"{placeholder}(", body)

        def value_of(node: ast.expr) -> Any:
            match node:
                case ast.Name(id=name) if name in names:
                    return names[name]
                case ast.List(elts=items):
                    return [value_of(item) for item in items]
                case ast.Dict(keys=keys, values=values):
                    return {value_of(key): value_of(value) for key, value in zip(keys, values, strict=True) if key}
                case _:
                    return ast.literal_eval(node)

        try:
            try:
                parsed = ast.parse(body.strip(), mode="eval").body
            except SyntaxError:  # models write line breaks into strings
                parsed = ast.parse(body.strip().replace("\n", "\\n"), mode="eval").body
            calls = parsed.elts if isinstance(parsed, ast.List) else [parsed]
            read: Read = []
            for call in calls:
                if not isinstance(call, ast.Call) or call.args or any(each.arg is None for each in call.keywords):
                    raise NoCall
                name = ast.unparse(call.func)
                arguments = {each.arg or "": value_of(each.value) for each in call.keywords}
                read.append((known.get(name, name), arguments))
        except SyntaxError as error:
            raise NoCall(goes_on="unterminated" in str(error)) from None
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise NoCall from None
        return read

    def format_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        plain = {True: "True", False: "False", None: "None"}
        texts = (
            plain[value] if value is None or value in (True, False) else _dumped(value) for value in arguments.values()
        )
        return f"[{name}({', '.join(map('='.join, zip(arguments, texts, strict=True)))})]"

    def call_rule(self, rules: GrammarRules, name: str, schema: Schema) -> str:
        items: list[tuple[str, bool]] = []
        for key, each, required in properties_of(schema):
            _check_references(each)
            if not key.isidentifier() or iskeyword(key):
                raise ValueError(f"with this model, {key!r} cannot be the name of an argument")
            value = '("True" | "False")' if json_types_of(each, each) == {"boolean"} else rules.json(each)
            items.append((rules.add_rule(f"{rules.literal(key + '=')} {value}"), required))
        if "properties" not in schema:
            one = rules.add_rule(f'/[a-zA-Z_][a-zA-Z0-9_]*/ "=" ("True" | "False" | "None" | {rules.json({})})')
            items.append((rules.add_rule(f'({one} (", " {one})*)?'), True))
        return f"{rules.literal(f'[{name}(')} {rules.some_of(items, rules.literal(', '))} {rules.literal(')]')}"


QUOTE = '<|"|>'
_WORD = r"[^{}\[\],:\"\s]++"
_KEY = re.compile(rf"([{{,]\s*+)({_WORD}(?:\s++{_WORD})*+)\s*+:")
"""A key of an object without quotes. The quantifiers are possessive, so that any text is read in linear time."""


@dataclass(frozen=True)
class Gemma:
    """A name and an object. The keys of the object have no quotes, and its strings are enclosed in special tokens."""

    pattern: str = field(default="", init=False)

    def parse_calls(self, body: str, schemas: Mapping[str, Schema]) -> Read:
        found = re.match(r"\s*([\w.-]+)\s*(\{.*)$", body, re.DOTALL)
        if found is None:
            raise NoCall
        parts = found[2].split(QUOTE)
        if len(parts) % 2 == 0:
            raise NoCall(goes_on=True)
        # Parts with odd indices are strings; parts with even indices contain the keys and all other values.
        parts[1::2] = map(json.dumps, parts[1::2])
        parts[::2] = (_KEY.sub(r'\1"\2":', part) for part in parts[::2])
        for word, plain in (("None", "null"), ("True", "true"), ("False", "false")):
            parts[::2] = (re.sub(rf"(?<=[:,\[])\s*{word}\b", plain, part) for part in parts[::2])
        return [(found[1], _object("".join(parts)))]

    def format_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"{name}{self._value(arguments)}"

    def _value(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{QUOTE}{value}{QUOTE}"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{self._value(each)}" for key, each in value.items()) + "}"
        if isinstance(value, list | tuple):
            return f"[{','.join(map(self._value, value))}]"
        return _dumped(value)

    def call_rule(self, rules: GrammarRules, name: str, schema: Schema) -> str:
        return f"{rules.literal(name)} {self._bound(rules, schema, schema, {})}"

    def _bound(self, rules: GrammarRules, schema: Schema, root: Schema, known: dict[str, str]) -> str:
        if isinstance(reference := schema.get("$ref"), str):
            if reference not in known:
                known[reference] = name = rules.add_rule("")
                at = len(rules.lines) - 1
                rules.lines[at] = f"{name}: {self._bound(rules, _found(root, reference), root, known)}"
            return known[reference]
        literal, kinds = rules.literal, json_types_of(schema, root)
        if choices := choices_of(schema):
            return f"({' | '.join(literal(self._value(each)) for each in choices)})"
        if several := either_of(schema):
            return f"({' | '.join(self._bound(rules, each, root, known) for each in several)})"
        if len(kinds) > 1:
            return (
                f"({' | '.join(self._bound(rules, {**schema, 'type': kind}, root, known) for kind in sorted(kinds))})"
            )
        if kinds == {"string"}:
            return f"{literal(QUOTE)} {_raw_text(rules, schema, QUOTE)}"
        if kinds == {"array"}:
            of_item = schema.get("items")
            item = rules.add_rule(self._bound(rules, of_item if isinstance(of_item, Mapping) else {}, root, known))
            least, most = schema.get("minItems", 0), schema.get("maxItems")
            if not least and most is None:
                return f'"[" ({item} ("," {item})*)? "]"'
            if not isinstance(least, int) or not isinstance(most or 0, int) or max(least, most or 0) > MOST_PROPERTIES:
                raise ValueError("minItems or maxItems is too large")
            items = [(item, number < least) for number in range(most if most is not None else least)]
            rest = f'("," {item})*' if most is None else ""
            return f'"[" {rules.some_of(items, json.dumps(","))} {rest} "]"'
        if kinds == {"object"} and properties_of(schema):
            properties = properties_of(schema)
            if wrong := [key for key, _, _ in properties if re.search(r'[{}\[\],:"]', key)]:
                raise ValueError(f"with this model, {wrong[0]!r} cannot be the name of an argument")
            items = [
                (rules.add_rule(f"{literal(key + ':')} {self._bound(rules, each, root, known)}"), required)
                for key, each, required in properties
            ]
            return f'"{{" {rules.some_of(items, json.dumps(","))} "}}"'
        if kinds and kinds != {"object"}:
            return rules.json(schema)
        return self._any(rules, known, object_only=bool(kinds))

    def _any(self, rules: GrammarRules, known: dict[str, str], *, object_only: bool) -> str:
        if "any" not in known:
            known["any"], known["object"] = rules.add_rule(""), rules.add_rule("")
            at = len(rules.lines) - 1
            each, text = known["any"], f"{rules.literal(QUOTE)} {rules.text_until(QUOTE)}"
            key = f'/[^{{}}\\[\\],:"\\n]+/ ":" {each}'
            plain = rules.json({"type": ["number", "boolean", "null"]})
            rules.lines[at - 1] = f'{each}: {text} | {plain} | {known["object"]} | "[" ({each} ("," {each})*)? "]"'
            rules.lines[at] = f'{known["object"]}: "{{" ({key} ("," {key})*)? "}}"'
        return known["object" if object_only else "any"]


def _found(root: Schema, reference: str) -> Schema:
    place: Any = root
    for part in reference.removeprefix("#").strip("/").split("/") if reference not in ("#", "#/") else ():
        place = place.get(part.replace("~1", "/").replace("~0", "~"), {}) if isinstance(place, Mapping) else {}
    return place if isinstance(place, Mapping) else {}
