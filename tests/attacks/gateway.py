"""Attacks on `splitnet serve`.

Each function takes the URL of a server of the tests, attacks the server for some seconds, and returns how often each
outcome occurred: the status of an answer, or what happened to a connection.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from tests import images

Outcomes = Counter[str]

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
REPLY_S = 120.0


def wrong_values(url: str, *, seconds: float, key: str | None = None, count: int = 600_000) -> Outcomes:
    """Sends bodies of megabytes in which every value is wrong, because a report of all errors takes long."""
    return _repeated(url, _wrong_bodies(url, key, count), seconds, key)


def long_texts(url: str, *, seconds: float, key: str | None = None, length: int = 8_000_000) -> Outcomes:
    """Sends texts that are longer than every context, because tokenizing them takes long."""
    model = model_of(url, key)
    texts = ["a " * (length // 2), "1" * length, "\n" * length]
    bodies = [(COMPLETION, json.dumps({"model": model, "prompt": text, "max_tokens": 1})) for text in texts]
    return _repeated(url, bodies, seconds, key)


def deep_schemas(url: str, *, seconds: float, key: str | None = None) -> Outcomes:
    """Asks for answers with schemas that are nested deeper than parsers can recurse."""
    model = model_of(url, key)
    bodies: list[tuple[str, str]] = []
    for depth in (60, 64, 130, 400, 50_000):
        schema = '{"type":"object","properties":{"a":' * depth + '{"type":"string"}' + "}}" * depth
        body = json.dumps({"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]})[:-1]
        wanted = f'{{"type":"json_schema","json_schema":{{"name":"a","schema":{schema}}}}}'
        bodies.append((CHAT, f'{body},"response_format":{wanted}}}'))
    return _repeated(url, bodies, seconds, key)


def bombs(url: str, *, seconds: float, key: str | None = None, count: int = 16) -> Outcomes:
    """Sends small requests that expand to large ones, through all APIs, `count` at a time."""
    bodies = [(path, body) for _, path, body in bombs_of(model_of(url, key))]
    outcomes: Outcomes = Counter()
    with ThreadPoolExecutor(count) as threads:
        starts = [at % len(bodies) for at in range(count)]
        turns = threads.map(lambda at: _repeated(url, bodies[at:] + bodies[:at], seconds, key), starts)
        for each in turns:
            outcomes += each
    return outcomes


def bombs_of(model: str) -> list[tuple[str, str, str]]:
    """Kinds of small requests that expand to large ones: name, path and body of each."""
    user = {"model": model, "messages": [{"role": "user", "content": "a"}]}
    text: Any = {"type": "string", "pattern": "a+"}

    def unfolding(kind: str, depth: int = 24) -> dict[str, Any]:
        levels = {f"d{at}": {kind: [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(depth)}
        return {"$ref": "#/$defs/d0", "$defs": levels | {f"d{depth}": text}}

    def formatted(schema: dict[str, Any]) -> dict[str, Any]:
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        return user | {"max_tokens": 2, "response_format": wanted}

    def ruled(grammar: str) -> dict[str, Any]:
        return {"model": model, "prompt": "a", "max_tokens": 2, "guided_grammar": grammar}

    wanted = {"type": "json_schema", "schema": unfolding("allOf")}
    tools = [{"name": f"f{at}", "input_schema": unfolding("allOf") | {"type": "object"}} for at in range(8)]
    chain = {f"d{at}": {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(20_000)}
    numbers = [{"type": "string", "pattern": f".*{at}.*"} for at in range(200)]
    doubling = "\n".join(["start: r0", *(f"r{at}: r{at + 1} r{at + 1}" for at in range(255)), 'r255: "a"'])
    parts = [{"type": "text", "text": "a"}] * 10
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "references": (CHAT, formatted(unfolding("allOf"))),
        "references of choices": (CHAT, formatted(unfolding("anyOf", 200))),
        "patterns": (CHAT, formatted({"allOf": numbers})),
        "a chain of references": (CHAT, formatted({"$ref": "#/$defs/d0", "$defs": chain | {"d20000": text}})),
        "words": (CHAT, formatted({"enum": [f"word {at}" for at in range(100_000)]})),
        "repeats": (COMPLETION, {**ruled(""), "guided_grammar": None, "guided_regex": "((a{1000}){1000}){1000}"}),
        "states": (COMPLETION, ruled("start: /.*a.{400}/ /.*b.{400}/")),
        "rules": (COMPLETION, ruled(doubling)),
        "a schema in a grammar": (COMPLETION, ruled(f"start: %json {json.dumps(unfolding('allOf'))}")),
        "Responses": ("/v1/responses", {"model": model, "input": "a", "text": {"format": wanted | {"name": "a"}}}),
        "Anthropic": ("/v1/messages", user | {"max_tokens": 4, "output_config": {"format": wanted}}),
        "Anthropic's tools": ("/v1/messages", user | {"max_tokens": 4, "tools": tools, "tool_choice": {"type": "any"}}),
        "Ollama": ("/api/chat", user | {"stream": False, "format": unfolding("allOf")}),
        "parts of messages": (CHAT, user | {"messages": [{"role": "user", "content": parts}] * 16_000}),
        "tokens": ("/detokenize", {"model": model, "tokens": [5] * 700_000}),
    }
    return [(name, path, json.dumps(body)) for name, (path, body) in kinds.items()]


def hostile_images(url: str, *, seconds: float, key: str | None = None) -> Outcomes:
    """Sends images that are damaged, or much larger than their files, to the server's last model.

    A model without eyes refuses them unread.
    """
    model = model_of(url, key, at=-1)
    bodies: list[tuple[str, str]] = []
    for data, _ in images.hostile_images().values():
        content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
        bodies.append((CHAT, json.dumps({"model": model, "messages": [{"role": "user", "content": content}]})))
    return _repeated(url, bodies, seconds, key)


def unfinished_bodies(
    url: str, *, seconds: float, key: str | None = None, count: int = 40, sent: int = 15 * 2**20
) -> Outcomes:
    """Sends most bytes of many large bodies, but never the rest."""
    head = _head("POST", CHAT, url, key, f"Content-Type: application/json\r\nContent-Length: {sent + 2**20}\r\n")
    return _held(url, head + b'{"model":"' + b"x" * sent, count, seconds)


def trickled_bodies(
    url: str, *, seconds: float, key: str | None = None, count: int = 300, over: Event | None = None
) -> Outcomes:
    """Sends the first bytes of a small body on many connections, but never the rest."""
    head = _head("POST", CHAT, url, key, "Content-Type: application/json\r\nContent-Length: 1000\r\n")
    return _held(url, head + b"{", count, seconds, over=over)


def half_requests(url: str, *, seconds: float, key: str | None = None, count: int = 1500) -> Outcomes:
    """Opens many connections, and sends half a line on each."""
    return _held(url, b"GET /health HT", count, seconds)


def stalled_readers(
    url: str, *, seconds: float, key: str | None = None, count: int = 16, prompts: int = 64, over: Event | None = None
) -> Outcomes:
    """Asks for streams with megabytes of details on each token of long prompts, but does not read them."""
    body: dict[str, Any] = {"model": model_of(url, key), "prompt": ["one two three " * 60] * prompts}
    body |= {"max_tokens": 1, "stream": True, "echo": True, "logprobs": 20}
    text = json.dumps(body).encode()
    head = _head("POST", COMPLETION, url, key, f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n")
    return _held(url, head + text, count, seconds, receive_buffer=2048, over=over)


def many_dashboards(url: str, *, seconds: float, key: str | None = None, count: int = 200) -> Outcomes:
    """Opens the stream of the dashboard many times, but does not read."""
    return _held(url, _head("GET", "/dashboard/events", url, key), count, seconds)


def crowd(url: str, *, seconds: float, key: str | None = None, count: int = 64, max_tokens: int = 100) -> Outcomes:
    """Sends more requests at a time than the server answers, repeatedly."""
    body = {"model": model_of(url, key), "prompt": "a", "max_tokens": max_tokens, "temperature": 0}
    bodies = [(COMPLETION, json.dumps(body))]
    outcomes: Outcomes = Counter()
    with ThreadPoolExecutor(count) as threads:
        for each in threads.map(lambda _: _repeated(url, bodies, seconds, key, pause_s=0.05), range(count)):
            outcomes += each
    return outcomes


def rebound_names(url: str, *, seconds: float, key: str | None = None) -> Outcomes:
    """Sends requests like a web page whose host name was rebound to the address of the server."""
    until, outcomes = time.monotonic() + seconds, Outcomes()
    paths = ["/", "/v1/models", "/dashboard/events", "/metrics", "/health"]
    for host in _until(until, ["attacker.example:8000", "127.0.0.1.attacker.example", "localhost.attacker.example"]):
        for path in paths:
            outcomes[_ask(url, path, None, key, {"Host": host})[0]] += 1
    return outcomes


def guessed_prompts(url: str, guesses: Sequence[Sequence[Any]], *, key: str | None = None) -> list[int]:
    """For each guessed chat, a list of messages, how many of its tokens the server reports as computed before."""
    cached: list[int] = []
    for messages in guesses:
        body = {"model": model_of(url, key), "messages": messages, "max_tokens": 1, "temperature": 0}
        status, reply = _ask(url, CHAT, json.dumps(body), key)
        assert status == "200", reply
        cached.append(json.loads(reply)["usage"]["prompt_tokens_details"]["cached_tokens"])
    return cached


def model_of(url: str, key: str | None = None, at: int = 0) -> str:
    """The name of a server's model at an index of its list."""
    status, reply = _ask(url, "/v1/models", None, key)
    assert status == "200", reply
    return json.loads(reply)["data"][at]["id"]


def _wrong_bodies(url: str, key: str | None, count: int) -> list[tuple[str, str]]:
    model = json.dumps(model_of(url, key))
    user = '"messages":[{"role":"user","content":"a"}]'

    def several(value: str) -> str:
        return ",".join([value] * count)

    names = ",".join(f'"a{number}":1' for number in range(count))
    completions = [f'"prompt":[{several(value)}]' for value in ("-1", "1.5", "[]", "[-1]", '""', "null")]
    chats = [
        f'"messages":[{several("{}")}]',
        f'"messages":[{{"role":"user","content":[{several("1")}]}}]',
        f"{user},{names}",
        f'{user},"logit_bias":{{{names}}}',
        f'{user},"stop":[{several("1")}]',
        f'{user},"tools":[{several("1")}]',
    ]
    bodies = [(COMPLETION, f'{{"model":{model},"max_tokens":1,{rest}}}') for rest in completions]
    return bodies + [(CHAT, f'{{"model":{model},{rest}}}') for rest in chats]


def _repeated(
    url: str, bodies: Sequence[tuple[str, str]], seconds: float, key: str | None, pause_s: float = 0.0
) -> Outcomes:
    until, outcomes = time.monotonic() + seconds, Outcomes()
    for path, body in _until(until, bodies):
        outcomes[_ask(url, path, body, key)[0]] += 1
        time.sleep(pause_s)
    return outcomes


def _until(end: float, things: Sequence[Any]) -> Iterator[Any]:
    """Yields all things once, and then repeatedly until the time `end`."""
    yield from things
    while time.monotonic() < end:
        yield from things


def _ask(
    url: str, path: str, body: str | None, key: str | None, headers: dict[str, str] | None = None
) -> tuple[str, str]:
    """The status and the body of a reply, or what happened to the connection."""
    server = urlsplit(url)
    given = {"Content-Type": "application/json", **(headers or {})}
    if key is not None:
        given["Authorization"] = f"Bearer {key}"
    connection = HTTPConnection(server.hostname or "", server.port, timeout=REPLY_S)
    try:
        connection.request("GET" if body is None else "POST", path, body, given)
        reply = connection.getresponse()
        if path == "/dashboard/events" and reply.status == 200:
            return "200", ""  # the answer is an endless stream
        return str(reply.status), reply.read().decode(errors="replace")
    except TimeoutError:
        return "silent", ""
    except (OSError, HTTPException):
        return "cut off", ""
    finally:
        connection.close()


def _head(method: str, path: str, url: str, key: str | None, more: str = "") -> bytes:
    authorization = f"Authorization: Bearer {key}\r\n" if key is not None else ""
    return f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n{authorization}{more}\r\n".encode()


def _held(
    url: str,
    sent: bytes,
    count: int,
    seconds: float,
    *,
    receive_buffer: int | None = None,
    over: Event | None = None,
) -> Outcomes:
    """Opens connections, sends the same bytes on each, and does not read until the time is over and `over` is set."""
    server, until = urlsplit(url), time.monotonic() + seconds
    outcomes: Outcomes = Counter()
    connections: list[socket.socket] = []
    try:
        for _ in range(count):
            connection = socket.socket()
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.settimeout(10)
            try:
                connection.connect((server.hostname or "", server.port or 80))
                connection.sendall(sent)
            except OSError:
                outcomes["cut off"] += 1
                connection.close()
                continue
            connections.append(connection)
        time.sleep(max(0.0, until - time.monotonic()))
        if over is not None:
            over.wait(120)
        for connection in connections:
            outcomes[_state_of(connection)] += 1
    finally:
        for connection in connections:
            connection.close()
    return outcomes


def _state_of(connection: socket.socket) -> str:
    """The status of a complete answer; `open`: the server waits or has more to send."""
    connection.settimeout(0.001)
    received = b""
    try:
        while (new := connection.recv(2**16)) and len(received) < 2**22:
            received += new
    except TimeoutError:
        if not received or (received.split(b" ", 2)[1] == b"200" and not received.endswith(b"0\r\n\r\n")):
            return "open"
    except OSError:
        return "cut off"
    return received.split(b" ", 2)[1].decode() if received else "cut off"
