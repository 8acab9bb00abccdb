"""A repeated request with the same idempotency key gets the same answer, from the tokens that are kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.serve import answer_records
from splitnet.serve.admission import ApiClient
from splitnet.serve.answer_records import RECORD, AnswerRecord, AnswerRecords, created_at, random_hex, random_seed
from splitnet.serve.failures import ApiError
from tests.unit.serve.fake_model import FakeModel
from tests.unit.serve.serving import MODEL, Serve, Server, Told, listening, servers, until

ME, YOU = ApiClient("me"), ApiClient("you")
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT | {"logprobs": True},
    "/v1/completions": {"model": MODEL, "prompt": "Hello", "max_tokens": 40},
    "/v1/responses": {"model": MODEL, "input": "Hello", "max_output_tokens": 40},
    "/v1/messages": CHAT,
}


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Serve]:
    with servers(lambda model=None, **options: Server(model or FakeModel(), tokenizer, **options)) as run:
        yield run


def asked(records: AnswerRecords, client: ApiClient = ME, body: bytes = b"", **headers: str) -> Any:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return records.recorded(client, given, "/path", body)


async def record_of(records: AnswerRecords, tokens: Sequence[int], key: str = "k", client: ApiClient = ME) -> str:
    """Keeps these tokens of an answer; returns the beginning of the ids of its events."""
    async with asked(records, client, idempotency_key=key):
        record = RECORD.get()
        assert record is not None
        await record.pass_tokens(tokens)
        return record.event_prefix


async def kept_by(records: AnswerRecords, key: str = "k", client: ApiClient = ME) -> list[int]:
    async with asked(records, client, idempotency_key=key):
        record = RECORD.get()
        assert record is not None
        return list(record.tokens)


async def events_of(
    http: httpx.AsyncClient, path: str, headers: Mapping[str, str], most: int = 10**9
) -> list[tuple[str, Any]]:
    """The ids and data of the first events of a stream; the connection is closed after them."""
    found: list[tuple[str, Any]] = []
    async with http.stream("POST", path, json=STREAMS[path] | {"stream": True}, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        async with aclosing(_events(reply)) as events:
            async for event in events:
                found.append(event)
                if len(found) == most:
                    break
    return found


async def _events(reply: httpx.Response) -> AsyncGenerator[Any]:
    id = ""
    async for line in reply.aiter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            id = value
        if name == "data":
            yield id, json.loads(value) if value != "[DONE]" else value


async def _all_of(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


def without_measures(events: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Removes how many tokens peers held already, and times."""
    text = json.dumps(events)
    measured = ("timings", "prompt_tokens_details", "input_tokens_details", "cache_read_input_tokens", "input_tokens")

    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if name not in measured}

    return json.loads(text, object_pairs_hook=kept)


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_goes_on_after_its_connection_is_lost(tokenizer: Any, path: str) -> None:
    server = Server(FakeModel(), tokenizer)

    async def come() -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            first = await events_of(http, path, {"Idempotency-Key": "one"}, most=7)
            last = first[-1][0]
            assert last.startswith("one.") and last.endswith(".7")
            rest = await events_of(http, path, {"Last-Event-ID": last})
            assert [int(id.rpartition(".")[2]) for id, _ in rest] == list(range(8, 8 + len(rest)))
            whole = await events_of(http, path, {"Idempotency-Key": "one"})
            assert without_measures(first + rest) == without_measures(whole) and len(whole) > 20
            other = await events_of(http, path, {"Idempotency-Key": "two"})
            assert without_measures(other) != without_measures(whole), "a seed is drawn for each key"
            text = (await http.get("/metrics")).text
            assert Told(text)("resumed_answers_total") == 2
            reply = await http.post(path, json=STREAMS[path] | {"stream": True}, headers={"Last-Event-ID": "one.0.3"})
            assert reply.status_code == 400
            gone = {"Last-Event-ID": "three.00000000.3"}
            reply = await http.post(path, json=STREAMS[path] | {"stream": True}, headers=gone)
            assert reply.status_code == 409 and "begins anew" in reply.text
            reply = await http.post(path, json=STREAMS[path], headers={"Idempotency-Key": "one"})
            assert reply.status_code == 409 and "another request" in reply.text, "the same with another `stream`"

    with closing(server.generations), listening(server.app) as url:
        asyncio.run(come())


def test_a_repeated_request_is_answered_alike_and_paid_once(serve: Serve) -> None:
    async def come(server: Server) -> None:
        async def ask(key: str, **options: Any) -> Any:
            reply = await server.http.post(
                "/v1/chat/completions", json=CHAT | options, headers={"Idempotency-Key": key}
            )
            assert reply.status_code == 200, reply.text
            answer = reply.json()
            for measured in ("timings", "usage"):
                answer.pop(measured, None)
            return answer

        for options in ({}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["e"]}):
            key = json.dumps(options).replace(" ", "")
            assert await ask(key, **options) == await ask(key, **options)

    serve(come)


def test_the_last_connection_has_the_answer(tokenizer: Any) -> None:
    model = FakeModel()
    server = Server(model, tokenizer)

    async def come() -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            path, key = "/v1/chat/completions", {"Idempotency-Key": "one"}
            model.may_step.clear()
            model.free_steps = 5
            async with http.stream("POST", path, json=STREAMS[path] | {"stream": True}, headers=key) as reply:
                events = _events(reply)
                await anext(events)
                again = asyncio.create_task(events_of(http, path, key))
                rest = asyncio.create_task(_all_of(events))
                try:
                    await until(lambda: rest.done() or server.admission.running == 2)
                finally:
                    model.may_step.set()
                assert (await rest)[-1][1]["error"]["code"] == "answer_moved"
                assert (await again)[-1][1] == "[DONE]"

    with closing(server.generations), listening(server.app) as url:
        asyncio.run(come())


def test_ids_and_seeds_are_those_of_the_record() -> None:
    records = AnswerRecords(clock=lambda: 1000.0)

    async def drawn() -> tuple[str, int, int]:
        async with asked(records, idempotency_key="k"):
            return random_hex(12), random_seed(), created_at()

    async def come() -> None:
        one = await drawn()
        assert one == await drawn() and one[2] == 1000
        assert random_hex(12) != one[0] and random_seed() != one[1], "outside of the request"

    asyncio.run(come())


def test_records_belong_to_one_client_and_one_request() -> None:
    async def come() -> None:
        records = AnswerRecords()
        prefix = await record_of(records, [1, 2, 3])
        assert await kept_by(records) == [1, 2, 3] and await kept_by(records, client=YOU) == []
        with pytest.raises(ApiError) as refused:
            async with asked(records, body=b"other", idempotency_key="k"):
                pass
        assert (refused.value.status, refused.value.code) == (409, "key_reused")
        async with asked(records, last_event_id=f"{prefix}17"):
            record = RECORD.get()
            assert record is not None and record.skips == 17 and list(record.tokens) == [1, 2, 3]
            with pytest.raises(ApiError, match="same tokens"):
                await record.pass_tokens([1, 7])
        async with asked(records):
            assert RECORD.get() is None

    asyncio.run(come())


@pytest.mark.parametrize(
    "headers",
    [
        {"idempotency-key": ""},
        {"idempotency-key": "two words"},
        {"idempotency-key": "x" * 256},
        {"idempotency-key": "é"},
        {"last-event-id": "17"},
        {"last-event-id": "k.0123abcd.-1"},
        {"last-event-id": "k.0123abcd.1234567890"},
        {"idempotency-key": "other", "last-event-id": "k.0123abcd.1"},
    ],
)
def test_wrong_headers_are_refused(headers: dict[str, str]) -> None:
    async def come() -> None:
        with pytest.raises(ApiError) as refused:
            async with AnswerRecords().recorded(ME, headers, "/path", b""):
                pass
        assert refused.value.status == 400

    asyncio.run(come())


def test_records_are_bounded_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_records, "MOST_TOKENS", 1000)
    now = [0.0]

    async def come() -> None:
        records = AnswerRecords(clock=lambda: now[0])
        for number in range(20):
            await record_of(records, range(10), f"k{number}")
        assert [len(await kept_by(records, f"k{number}")) for number in (0, 19)] == [0, 10], "64 tokens at least"
        await record_of(records, range(400), "long", YOU)
        await record_of(records, range(501), "too-long", YOU)
        assert await kept_by(records, "too-long", YOU) == []
        await record_of(records, range(10), "new")
        now[0] = answer_records.RECORD_S + 1
        assert await kept_by(records, "new") == []

    asyncio.run(come())


@given(st.lists(st.integers(0, 2**32 - 1)), st.data())
def test_tokens_pass_once_and_are_new_once(tokens: list[int], data: st.DataObject) -> None:
    async def come() -> None:
        record = AnswerRecord("key", "digest", 1, 0, "name")
        for repetition in range(2):
            record.passed = at = 0
            while at < len(tokens):
                step = data.draw(st.integers(1, 3))
                assert await record.pass_tokens(tokens[at : at + step]) == (not repetition)
                at += step
        assert list(record.tokens) == tokens

    asyncio.run(come())
