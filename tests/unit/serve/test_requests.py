"""Accepted and refused requests, API keys, admission of clients, and prompts of chats."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse
from typer.testing import CliRunner

from splitnet.cli.main import app
from splitnet.errors import (
    ContextTooLong,
    CoverageError,
    DirectoryError,
    KeyFileError,
    PeerBusy,
    PeerFailed,
    PeerLost,
    SessionClosed,
    SessionLost,
    SplitnetError,
)
from splitnet.limits import FairAccount, Holding
from splitnet.security.identity import KeyOptions
from splitnet.serve.admission import Admission, ApiClient, Overloaded, QuotaExceeded
from splitnet.serve.answers.call_forms import PROBE, probe
from splitnet.serve.apis.openai import API, error_body
from splitnet.serve.apis.openai_requests import ChatRequest, CompletionRequest
from splitnet.serve.failures import ApiError, api_error_of
from splitnet.serve.prompts import Prompts
from splitnet.serve.request_gate import Api, ApiKeys, Gate

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def refusal(kind: type[BaseModel], document: dict[str, Any]) -> ApiError:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(document)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in refused.value.errors()]
    return api_error_of(RequestValidationError(errors))


@pytest.mark.parametrize(
    "more",
    [
        {"frequency_penalty": 0.5, "presence_penalty": -2, "logit_bias": {"7": -100}, "user": "me"},
        {"temperature": 0, "top_p": 0.5, "seed": -1, "stop": ["a", "b"], "n": 2},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stop": None, "max_tokens": None, "stream": None},
        {"top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
)
def test_supported_parameters_are_accepted(more: dict[str, Any]) -> None:
    ChatRequest.model_validate(CHAT | more)
    CompletionRequest.model_validate(TEXT | more)


TOOL = {"type": "function", "function": {"name": "f", "strict": True}}


def test_parameters_that_clients_of_openai_add_are_accepted() -> None:
    defaults = {"store": False, "service_tier": "auto", "modalities": ["text"], "verbosity": "medium"}
    names = {"safety_identifier": "a", "prompt_cache_key": "b", "user": "c"}
    ChatRequest.model_validate(CHAT | defaults | names | {"tools": [TOOL], "parallel_tool_calls": False})


@pytest.mark.parametrize(
    ("more", "binds"),
    [
        ({}, False),
        ({"parallel_tool_calls": True}, False),
        ({"parallel_tool_calls": False}, True),
        ({"tools": [TOOL]}, True),
        ({"tools": [TOOL], "tool_choice": "none"}, False),
    ],
)
def test_calls_are_bound_where_a_request_asks_for_it(more: dict[str, Any], binds: bool) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "g"}}]}
    assert ChatRequest.model_validate(CHAT | tools | more).chat.restricts_calls == binds


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "one of guided_regex and response_format"),
        ({"guided_regex": "a", "min_tokens": 4}, "guided_regex sets where an answer ends"),
        ({"grammar": "root ::= ("}, "the grammar cannot be read"),
        ({"guided_json": "[1]"}, "guided_json is not a JSON schema"),
        ({"guided_json": '{"title": "\\ud800"}'}, "guided_json is not a JSON schema"),
        ({"grammar": 'root ::= "a"\n' * 257}, "more than 256 rules"),
        ({"guided_grammar": 'start: "a"\n' * 257}, "more than 256 rules"),
    ],
)
def test_wrong_constraints_are_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError, match=says):
        _ = ChatRequest.model_validate(CHAT | more).chat


@pytest.mark.parametrize("prompt", ["", "a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_prompts(prompt: Any) -> None:
    assert CompletionRequest.model_validate(TEXT | {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"foo": 1}, "foo", "foo is not supported: leave it out"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "pattern"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "only False is supported"),
        ({"continue_final_message": True}, None, "send it as the last one"),
        ({"echo": True}, None, "set continue_final_message"),
        ({"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, None, "leave out guided_regex"),
        ({"modalities": ["audio"]}, "modalities", "'audio' is not supported, only 'text'"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        ({"tools": [TOOL] * 257}, "tools", "at most 256 items"),
        ({"tool_choice": "required"}, None, "tool_choice asks for a tool that is not in tools"),
        (
            {
                "tool_choice": {"type": "function", "function": {"name": "g"}},
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            None,
            "tool_choice asks for a tool that is not in tools",
        ),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature", "finite number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"top_logprobs": 2}, None, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options is only for streams"),
        ({"prompt_logprobs": 0, "stream": True}, None, "prompt_logprobs is for whole answers only"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "greater than or equal to 1"),
        ({"messages": [{"role": "user"}]}, "messages", "Field required"),
        ({"messages": [{"role": "pope"}]}, "messages", "'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages", "'file' is not supported"),
        (
            {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
            "tools",
            "'custom' is not supported, only 'function'",
        ),
    ],
)
def test_refusals_name_parameter_and_reason(more: dict[str, Any], param: str | None, message: str) -> None:
    error = refusal(ChatRequest, CHAT | more)
    assert (error.status, error.param) == (400, param)
    assert message in str(error)


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [-1], 3, [True]])
def test_invalid_prompts_are_refused(prompt: Any) -> None:
    assert refusal(CompletionRequest, TEXT | {"prompt": prompt}).status == 400


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ContextTooLong("long"), 400),
        (PeerBusy("full"), 429),
        (CoverageError("a hole"), 503),
        (DirectoryError("the DHT did not answer"), 503),
        (SessionClosed("closed"), 503),
        (PeerLost("gone"), 502),
        (SessionLost("gone"), 502),
        (PeerFailed("failed"), 502),
        (SplitnetError("something"), 502),
        (ValueError("a part of the prompt"), 500),
    ],
)
def test_errors_have_the_shape_that_clients_read(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    failure = api_error_of(error)
    assert failure.status == status
    assert ("Retry-After" in failure.headers) == (status in (429, 503))
    (details,) = error_body(failure).values()
    assert set(details) == {"message", "type", "param", "code"} and details["message"]
    assert "prompt" not in details["message"] and "prompt" not in caplog.text


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeff# mine\n one \n\ntwo\n", encoding="utf-8")
    assert len(ApiKeys.from_file(file)) == 2
    file.write_text("\ufeffone\n# mine\ntwo\n", encoding="utf-8")
    keys = ApiKeys.from_file(file)
    assert keys and not ApiKeys.from_file(None)
    owners = [keys.client_of(key) for key in (b"one", b"two", b"# mine", b"", b"on")]
    assert None not in owners[:2] and owners[0] != owners[1] and owners[2:] == [None] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--allow-origin", "*"], "opens the server to the pages of all sites: give --api-key-file"),
        (["--allow-origin", "chat.example"], "'chat.example' is not a site: write https://HOST"),
        (["--allow-origin", "https://chat.example/"], "is not a site"),
        (["--served-name", " "], "--served-name is empty"),
    ],
)
def test_wrong_options_of_the_command_are_refused_at_once(options: list[str], message: str) -> None:
    ran = CliRunner().invoke(app, ["serve", "no-such-model", "--port", "0", *options])
    assert isinstance(ran.exception, SplitnetError) and message in str(ran.exception)


def test_options_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("weight=4,tokens-per-minute=60 one # Ann\ntwo weight=0.5\nthree\n")
    one, two, three = (ApiKeys.from_file(file).client_of(key) for key in (b"one", b"two", b"three"))
    assert one and two and three
    assert (one.weight, two.weight, three.weight) == (4, 0.5, 1)
    assert one.tokens_per_minute == 60 and two.tokens_per_minute is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one weight=0", "a number from 0.001 to 1000"),
        ("one weight=4,weight=4", "weight is given twice"),
        ("one weight=4,nice=1", "'nice' is not an option"),
        ("one tokens-per-minute=many", "write a whole number"),
        ("one kv=8GiB", "leave them out"),
        ("one train=no", "leave them out"),
        ("one two", "write one key"),
        ("weight=4", "write one key"),
        ("first", "listed twice"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"first\n{line}\n")
    with pytest.raises(KeyFileError, match="line 2: ") as refused:
        ApiKeys.from_file(file)
    assert message in str(refused.value)


def test_a_quota_fills_evenly_and_overspent_tokens_are_owed() -> None:
    now = 0.0
    client = ApiClient("", tokens_per_minute=60, clock=lambda: now)
    client.check_quota()
    client.spend_tokens(90)
    with pytest.raises(QuotaExceeded, match="60 tokens per minute") as refused:
        client.check_quota()
    failure = api_error_of(refused.value)
    assert (failure.status, failure.code) == (429, "rate_limit_exceeded")
    assert failure.headers == {"Retry-After": "31"}
    now = 31.0
    client.check_quota()
    now = 1000.0
    client.spend_tokens(60)
    with pytest.raises(QuotaExceeded):
        client.check_quota()


@pytest.mark.parametrize("content", [None, b"", b"# only a comment\n", b"\xff\xfe"])
def test_wrong_files_of_keys_are_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"one (key )?per line"):
        ApiKeys.from_file(file)


def test_requests_run_in_order_and_too_many_are_refused() -> None:
    async def come() -> list[str]:
        admission = Admission(at_a_time=1, waiting=1)
        log: list[str] = []
        leave = asyncio.Event()

        async def request(name: str) -> None:
            async with admission.admitted():
                log.append(name)
                await leave.wait()

        first = asyncio.create_task(request("first"))
        second = asyncio.create_task(request("second"))
        third = asyncio.create_task(request("third"))
        with pytest.raises(Overloaded, match="try again") as refused:
            await third
        failure = api_error_of(refused.value)
        assert (failure.status, failure.code) == (429, "overloaded")
        assert (admission.running, admission.waiting) == (1, 1)
        second.cancel()  # frees a place to wait
        await asyncio.wait([second])
        assert (admission.running, admission.waiting) == (1, 0)
        fourth = asyncio.create_task(request("fourth"))
        leave.set()
        await asyncio.gather(first, fourth)
        assert (admission.running, admission.waiting) == (0, 0)
        return log

    assert asyncio.run(come()) == ["first", "fourth"]


def order_of(admission: Admission, asked: Sequence[ApiClient]) -> list[str]:
    """The order in which waiting requests of clients are admitted, one at a time."""

    async def come() -> list[str]:
        order: list[str] = []

        async def request(client: ApiClient) -> None:
            async with admission.admitted(client):
                order.append(client.name)
                await asyncio.sleep(0)

        async with admission.admitted(asked[0]):
            tasks = [asyncio.create_task(request(client)) for client in asked]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return order

    return asyncio.run(come())


def test_clients_take_turns_with_unequal_numbers_of_requests() -> None:
    greedy, modest = ApiClient("greedy"), ApiClient("modest")
    order = order_of(Admission(1, 64), [greedy] * 10 + [modest] * 2)
    assert order[:4] == ["modest", "greedy", "modest", "greedy"]


def test_turns_are_by_weight() -> None:
    heavy, light = ApiClient("heavy", 3), ApiClient("light")
    order = order_of(Admission(1, 64), [light] * 20 + [heavy] * 20)
    assert 13 <= order[:20].count("heavy") <= 16


def test_the_client_with_most_waiting_requests_is_refused() -> None:
    async def come() -> None:
        admission = Admission(1, 4)
        greedy, modest = ApiClient("greedy"), ApiClient("modest")

        async def request(client: ApiClient) -> str:
            async with admission.admitted(client):
                return client.name

        async with admission.admitted(greedy):
            tasks = [asyncio.create_task(request(client)) for client in [greedy] * 4 + [modest]]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            refused = [task for task in tasks if task.done()]
            assert refused == tasks[3:4], "the last of those who have most"
        assert isinstance(refused[0].exception(), Overloaded)
        assert await tasks[4] == "modest"
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(come())


def test_a_client_leaves_the_spare_places_to_others() -> None:
    async def come() -> None:
        admission = Admission(4, 64, spare=1)
        leave = asyncio.Event()

        async def request(client: ApiClient) -> None:
            async with admission.admitted(client):
                await leave.wait()

        tasks = [asyncio.create_task(request(ApiClient("greedy"))) for _ in range(5)]
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (3, 2)
        async with admission.admitted(ApiClient("modest")):
            assert (admission.running, admission.waiting) == (4, 2)
        leave.set()
        await asyncio.gather(*tasks)

    asyncio.run(come())


def test_a_request_that_is_cancelled_at_its_admission_frees_its_place() -> None:
    async def come() -> None:
        admission = Admission(1, 4)

        async def request() -> None:
            async with admission.admitted():
                pytest.fail("it was cancelled")

        async with admission.admitted():
            task = asyncio.create_task(request())
            await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (1, 0), "it is let in, and has not gone on yet"
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and (admission.running, admission.waiting) == (0, 0)
        async with admission.admitted():
            assert admission.running == 1

    asyncio.run(come())


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.booleans()), max_size=40))
def test_accounts_keep_their_bounds_unless_holdings_are_settled(grown: list[tuple[int, int, bool]]) -> None:
    account = FairAccount(100, 60)
    held: dict[int, Holding] = {}
    for number, (client, amount, settles) in enumerate(grown):
        held[number] = account.make_holding(ApiClient(str(client)), lambda number=number: held.pop(number))
        held[number].grow(amount)
        if number in held:
            held[number].is_pinned = settles
        totals = [
            sum(each.amount for each in held.values() if each.holder == ApiClient(str(name))) for name in range(3)
        ]
        assert max(totals) <= 60
        assert sum(totals) <= 100 or all(each.is_pinned for each in held.values())
        assert list(account.holdings) == list(held.values())


def test_the_largest_holding_is_evicted() -> None:
    account = FairAccount(10)
    gone: list[str] = []
    for client, name, amount in (("a", "a1", 2), ("a", "a2", 5), ("b", "b1", 3)):
        account.make_holding(ApiClient(client), lambda name=name: gone.append(name)).grow(amount)
    account.make_holding(ApiClient("c"), lambda: gone.append("c1")).grow(2)
    assert gone == ["a2"]


def test_a_client_may_hold_as_much_as_its_bound() -> None:
    account = FairAccount(10, 4)
    gone: list[str] = []
    holding = account.make_holding(ApiClient("a"), lambda: gone.append("a"))
    holding.grow(4)
    assert not gone
    holding.grow(1)
    assert gone == ["a"]


def test_the_largest_holder_for_its_weight_is_evicted() -> None:
    account = FairAccount(10)
    gone: list[str] = []
    for client, amount in ((ApiClient("heavy", 3), 6), (ApiClient("light"), 4), (ApiClient("light"), 1)):
        account.make_holding(client, lambda name=client.name: gone.append(name)).grow(amount)
    assert gone == ["light"]


def test_each_protocol_names_its_header_for_keys() -> None:
    other = Api(
        paths=("/other",),
        router=lambda *_: pytest.fail("the paths are not asked for"),
        error_body=lambda failure: {"said": str(failure)},
        key_of=lambda headers: headers.get("x-other-key", ""),
        key_header="x-other-key: KEY",
        challenge="Key",
        error=BaseModel,
        header="other-version",
    )

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse(scope["state"]["client"].name)(scope, receive, send)

    async def ask() -> None:
        gate = Gate(inside, (API, other), ApiKeys({"secret": KeyOptions()}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as client:
            refused = await client.get("/v1/models", headers={"x-other-key": "secret"})
            assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
            assert "as `Authorization: Bearer KEY`" in refused.json()["error"]["message"]
            refused = await client.get("/other/models", headers={"Authorization": "Bearer secret"})
            assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Key"
            assert refused.json()["said"].endswith("as `x-other-key: KEY`")
            taken = await client.get("/other/models", headers={"x-other-key": "secret"})
            assert taken.json() == "key 1"
            # A header decides between protocols with the same path; it does not replace a key.
            theirs = {"other-version": "1"}
            refused = await client.get(
                "/v1/models", headers=theirs | {"Authorization": "Bearer secret", "x-request-id": "a b"}
            )
            assert refused.headers["request-id"] == refused.headers["x-request-id"]
            assert refused.headers["request-id"].startswith("req_"), "a name that could be anything is not told again"
            named = await client.get("/other/a", headers={"x-other-key": "secret", "x-request-id": "mine-1"})
            assert named.headers["x-request-id"] == "mine-1"
            assert refused.status_code == 401 and refused.json()["said"].endswith("as `x-other-key: KEY`")
            assert (await client.get("/v1/models", headers=theirs | {"x-other-key": "secret"})).json() == "key 1"

    asyncio.run(ask())


def messages(said: list[dict[str, Any]]) -> Any:
    return ChatRequest.model_validate({"model": "m", "messages": said}).chat.messages


class Tokenizer:
    """A tokenizer whose tokens are code points; records the messages that its template is given."""

    bos_token_id = None
    special_tokens_map: Mapping[str, str] = {}
    added_tokens_decoder: Mapping[int, Any] = {}

    def __init__(self, template: str | None) -> None:
        self.chat_template = template
        self.given: Any = None
        self.made = 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.made += len(text)
        return type("Encoded", (), {"input_ids": [ord(character) for character in text]})()

    def get_chat_template(self, tools: Any) -> str:
        return self.chat_template or ""

    def apply_chat_template(self, messages: Any, tools: Any, add_generation_prompt: bool, tokenize: bool) -> Any:
        pytest.fail("the template is a stranger's program")


@pytest.fixture(autouse=True)
def templated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the rendering of templates: records their messages and variables, and returns a fixed text."""

    def render(tokenizer: Any, messages: Any, *, variables: Mapping[str, Any] = {}, **options: Any) -> str:
        if messages[:1] == probe(as_text=False)[:1]:
            return PROBE[0]
        tokenizer.given, tokenizer.variables = messages, variables
        if not messages:
            raise TemplateError("nobody has said anything")
        return "\x01\x02\x03"

    monkeypatch.setattr("splitnet.serve.prompts.render", render)
    monkeypatch.setattr("splitnet.serve.answers.call_forms.render", render)
    monkeypatch.setattr("splitnet.serve.prompts.begin", lambda: None)


def test_messages_as_templates_expect_them() -> None:
    tokenizer = Tokenizer("{{ tools }}")
    said: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]
    prompts = Prompts(tokenizer, 300, 256)
    assert prompts.tokens_of_chat(messages(said), []) == [1, 2, 3]
    assert tokenizer.given == [
        {"role": "system", "content": "Be kind."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c", "name": "f"},
    ]
    said[1]["tool_calls"][0]["function"]["arguments"] = ""
    assert messages(said)[1]["tool_calls"][0]["function"]["arguments"] == {}, "as some send calls without arguments"
    for wrong in ("{", '{"a": "\\ud800"}', '{"a": NaN}', "[" * 1000 + "]" * 1000):
        said[1]["tool_calls"][0]["function"]["arguments"] = wrong
        with pytest.raises(ApiError, match="not valid JSON"):
            prompts.tokens_of_chat(messages(said), [])


class WithVariables(Tokenizer):
    """A tokenizer whose template has two variables for requests."""

    special_tokens_map: Mapping[str, str] = {"bos_token": "<s>"}

    def __init__(self) -> None:
        super().__init__(
            "{{ bos_token }}{% if enable_thinking is not defined %}{% set enable_thinking = 1 %}{% endif %}"
            "{{ enable_thinking }}{{ reasoning_effort }}{% generation %}{% set content = namespace(a=1) %}"
            "{% for message in messages %}{{ message.role }}{{ message['content'] }}{% break %}{% endfor %}"
            "{%- endgeneration -%}{{ content }}"
            "{% for message in messages %}{% if message.a %}"
            "{% set inner = message.a %}{% endif %}{{ inner }}{% endfor %}"
        )
        self.variables: dict[str, Any] = {}


def test_a_template_gets_the_variables_that_it_uses() -> None:
    tokenizer = WithVariables()
    prompts = Prompts(tokenizer, 300, 256)
    said = ChatRequest.model_validate(
        CHAT | {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    )
    prompts.tokens_of_chat(said.chat.messages, [], said.chat.variables)
    assert tokenizer.variables == {"enable_thinking": False, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    "name",
    [
        "thinking",
        "role",
        "content",
        "messages",
        "bos_token",
        "tokenize",
        "add_generation_prompt",
        "raise_exception",
        "namespace",
        "message",
        "inner",
    ],
)
def test_variables_that_a_template_does_not_use_are_refused(name: str) -> None:
    said = ChatRequest.model_validate(CHAT | {"chat_template_kwargs": {name: True}})
    with pytest.raises(ApiError, match=f"no place for '{name}'") as refused:
        Prompts(WithVariables(), 300, 256).tokens_of_chat(said.chat.messages, [], said.chat.variables)
    assert refused.value.param == "chat_template_kwargs"
    said = ChatRequest.model_validate(CHAT | {"reasoning_effort": "high"})
    with pytest.raises(ApiError, match="no place for 'reasoning_effort'") as refused:
        Prompts(Tokenizer("{{ messages }}"), 300, 256).tokens_of_chat(said.chat.messages, [], said.chat.variables)
    assert refused.value.param == "reasoning_effort"


def test_prompts_that_the_model_cannot_read_are_refused() -> None:
    prompts = Prompts(Tokenizer(None), 100, 8)
    with pytest.raises(ApiError, match="no chat template"):
        prompts.tokens_of_chat([], [])
    with pytest.raises(ApiError, match="nobody has said anything"):
        Prompts(Tokenizer("{{ messages }}"), 100, 8).tokens_of_chat([], [])
    with pytest.raises(ApiError, match="empty"):
        prompts.tokens_of_text("")
    with pytest.raises(ApiError, match="0 to 99"):
        prompts.tokens_of_text([100])
    assert prompts.tokens_of_text("A") == [65]


def test_a_too_long_text_is_not_tokenized_whole() -> None:
    tokenizer = Tokenizer("{{ messages }}")
    prompts = Prompts(tokenizer, 100, 100_000)
    assert len(prompts.tokens_of_text("A" * 90_000)) == 90_000
    tokenizer.made = 0
    with pytest.raises(ApiError, match="more tokens than the model's context of 100000: shorten"):
        prompts.tokens_of_text("A" * 10_000_000)
    with pytest.raises(ApiError, match="shorten the prompt"):
        prompts.tokens_of_chat(messages([{"role": "user", "content": "A" * 60_000}] * 100), [])
    assert tokenizer.made < 400_000
    with pytest.raises(ApiError, match="shorten the prompt"):
        prompts.checked_ids("A" * 10_000_000)
    # A text that is cut may be longer than the context, up to a bound.
    assert len(prompts.tokens_of_chat(messages([{"role": "user", "content": "A" * 1_000_000}]), [], last=2)) == 2
    tokenizer.made = 0
    with pytest.raises(ApiError, match="shorten the prompt"):
        prompts.tokens_of_chat(messages([{"role": "user", "content": "A" * 10_000_000}]), [], last=5)
    with pytest.raises(ApiError, match="shorten the prompt"):
        prompts.tokens_of_text("A" * 10_000_000, last=100_000)
    assert tokenizer.made < 4_000_000


def test_room_for_an_answer() -> None:
    prompts = Prompts(Tokenizer(None), 100, 8)
    assert [prompts.last(-1, most) for most in (None, 0, 3, 8)] == [7, 8, 5, 1]
    assert [prompts.last(count, 3) for count in (None, 20)] == [None, 20]
    assert Prompts(Tokenizer(None), 100, None).last(-1, 3) is None
    assert prompts.room_for([1] * 5, None) == 3
    assert prompts.room_for([1] * 5, 2) == 2
    assert prompts.room_for([1] * 8, 0) == 0
    for length, max_tokens in ((8, None), (5, 4), (9, 0)):
        with pytest.raises(ApiError, match="context of 8: shorten") as refused:
            prompts.room_for([1] * length, max_tokens)
        assert refused.value.code == "context_length_exceeded"
