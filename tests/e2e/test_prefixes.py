"""Agents that send the same tools again: `splitnet serve` and daemons as a user runs them, asked by OpenAI's client."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from splitnet.wire.sent_log import PAGE
from tests.e2e.daemons import Daemon, background, daemons
from tests.e2e.test_serve_command import STARTING

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

TOOLS = "You may call:\n" + "\n".join(
    json.dumps({"name": f"tool_{number}", "parameters": {"path": "string", "lines": number}}) for number in range(12)
)
TWO = [(0, 15), (15, 30)]
SPARE = PAGE + 64  # Positions of a prompt that are computed again: the last page, and the new text.


@contextmanager
def served(home: Path, model: Path, daemon: Daemon) -> Iterator[OpenAI]:
    """OpenAI's client of a server that keeps no sessions, and has the key in `home`."""
    options = ("--codec", "none", "--port", "0", "--keep-sessions", "0", "--join", daemon.address())
    with background(home, "serve", str(model), *options) as server:
        assert server.process.stdout is not None
        url = server.process.stdout.readline().decode().split()[-1]
        with OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            yield client
        finished = server.stop(signal.SIGTERM)
    assert finished.code == 0 and finished.errors == STARTING, finished.errors


def ask(client: OpenAI, question: str) -> tuple[str, int, int]:
    """Asks a question after the tools: the answer, the tokens of the prompt, and the number of tokens stored by the
    peers."""
    (model,) = client.models.list()
    messages: list[Any] = [{"role": "system", "content": TOOLS}, {"role": "user", "content": question}]
    said = client.chat.completions.create(model=model.id, messages=messages, temperature=0, max_tokens=12)
    assert said.usage is not None and said.usage.prompt_tokens_details is not None
    stored = said.usage.prompt_tokens_details.cached_tokens or 0
    return said.choices[0].message.content or "", said.usage.prompt_tokens, stored


def expected(local: Any, tokenizer: Any, question: str) -> str:
    """The answer of plain transformers."""
    messages = [{"role": "system", "content": TOOLS}, {"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = local.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ports(running: Sequence[Daemon]) -> list[str]:
    return [re.findall(r" at tcp://127\.0\.0\.1:(\d+)", daemon.log)[0] for daemon in running]


@pytest.mark.full
def test_the_second_request_continues_after_the_stored_tools(
    trio: list[Daemon], demo_checkpoint: Path, local: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with served(tmp_path, demo_checkpoint, trio[0]) as client:
        first = ask(client, "Which tool reads a file?")
        second = ask(client, "Which tool has 7 lines?")
    assert first[2] == 0 and second[1] - SPARE <= second[2] < second[1]
    assert first[0] == expected(local, tokenizer, "Which tool reads a file?")
    assert second[0] == expected(local, tokenizer, "Which tool has 7 lines?")


@pytest.mark.full
def test_stored_tools_are_used_after_a_restart_of_all_daemons(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path / "cache"))
    listen: list[tuple[str, ...]] = [()] * len(TWO)
    asked: list[tuple[str, int, int]] = []
    for _ in range(2):
        with daemons(tmp_path, demo_checkpoint, TWO, "--kv-memory", "256MiB", each=listen) as running:
            with served(tmp_path, demo_checkpoint, running[0]) as client:
                asked.append(ask(client, "Which tool reads a file?"))
            listen = [("--listen", f"tcp://127.0.0.1:{port}") for port in ports(running)]
    (text, prompt, known), again = asked
    assert known == 0 and again[:2] == (text, prompt) and prompt - SPARE <= again[2] < prompt


@pytest.mark.full
def test_daemons_without_a_store_use_no_stored_tools(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPLITNET_CACHE", str(tmp_path / "cache"))
    with (
        daemons(tmp_path, demo_checkpoint, [(0, 30)], "--prefix-store", "off") as running,
        served(tmp_path, demo_checkpoint, running[0]) as client,
    ):
        asked = [ask(client, "Which tool reads a file?") for _ in range(2)]
    assert asked[0] == asked[1] and asked[0][2] == 0
    assert not (tmp_path / "cache" / "prefixes").exists()
