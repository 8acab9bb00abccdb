"""The chat of the dashboard in a browser, on a small random model. Screenshots are kept in `test-output/`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from transformers import AutoTokenizer

from splitnet.directory.dht_directory import DhtDirectory
from splitnet.hf.causal_lm import RemoteCausalLM
from splitnet.serve import responses
from splitnet.serve.gateway import LoadableModel
from splitnet.session.inference import Session
from tests.browser import NEEDED, NewPage, chromium, photograph
from tests.e2e.small_model import small_model
from tests.swarm.harness import LocalSwarm, local_swarm
from tests.unit.serve.serving import MODEL, TEMPLATE, Server
from tests.unit.serve.test_dashboard_chat import ask, listed, opened, said

pytestmark = [pytest.mark.swarm, NEEDED]

OTHER = "small:birds"
STEP_S = 0.05


@pytest.fixture(scope="module")
def swarm(demo_checkpoint: Path, node: DhtDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    folder = small_model(tmp_path_factory.mktemp("chat") / MODEL, demo_checkpoint, seed=0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with local_swarm(folder, [(0, 2), (2, 6)], node=node) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm) -> RemoteCausalLM:
    return swarm.model()


@pytest.fixture
def visit(swarm: LocalSwarm, model: RemoteCausalLM, browser: Browser) -> Iterator[NewPage]:
    """Opens the page of a server; it loads another model on request."""
    server, other = (Server(model, AutoTokenizer.from_pretrained(swarm.folder)) for _ in range(2))
    server.app.state.gateway.offers = [LoadableModel([OTHER], lambda: other.app.state.gateway.served)]
    with opened(browser, server, 2) as visit:
        yield visit
    server.generations.close()
    other.generations.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step through the peers takes some time."""
    decoded = Session._decoded

    def later(self: Session, request: Any) -> Any:
        time.sleep(STEP_S)
        return decoded(self, request)

    monkeypatch.setattr(Session, "_decoded", later)


def test_the_chat_continues_after_a_stopped_answer(visit: NewPage, slow: None) -> None:
    page = visit()
    sent = listed(page)
    first = ask(page, "Tell me of bees")
    expect(first.locator(".text")).not_to_be_empty()
    expect(first.locator(".chip").last).to_contain_text("2..5")
    expect(page.locator("#send")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(first.locator(".note")).to_have_text("stopped")
    expect(page.locator("#running")).to_have_text("0")
    expect(first.locator(".timing")).to_have_text(re.compile(r"first token after .* tokens/s · \d+ tokens"))
    second = ask(page, "Go on")
    expect(second.locator(".text")).not_to_be_empty()
    page.click("#stop")
    expect(second.locator(".note")).to_have_text("stopped")
    expect(page.locator("#question")).to_be_focused()
    (asked, answered, again) = said(sent[1])
    assert (asked, answered[0], again) == (("user", "Tell me of bees"), "assistant", ("user", "Go on"))
    assert answered[1].strip() and sent[0]["model"] == MODEL and sent[0]["temperature"] == 0


@pytest.mark.full
def test_the_progress_of_the_prompt_is_shown(visit: NewPage, slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "FIRST_EVENT_S", 0.1)
    monkeypatch.setattr(Session, "step_positions", lambda *_: 2)
    page = visit()
    answer = ask(page, "bees hum and " * 40)
    expect(answer.locator("progress")).to_be_visible()
    expect(answer.locator(".timing")).to_contain_text("tokens of the prompt are read")
    read, most = (int(answer.locator("progress").evaluate(f"each => each.{name}")) for name in ("value", "max"))
    assert 0 <= read < most and most > 100
    photograph(page, "chat-reading")
    expect(answer.locator(".text")).not_to_be_empty()
    expect(answer.locator("progress")).to_be_hidden()
    page.keyboard.press("Escape")


@pytest.mark.full
def test_a_changed_question_ends_the_current_answer(visit: NewPage, slow: None) -> None:
    page = visit()
    expect(ask(page, "Tell me of bees").locator(".text")).not_to_be_empty()
    sent = listed(page)
    page.get_by_role("button", name="Edit").click()
    page.keyboard.type(" and wasps")
    page.keyboard.press("Enter")
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator(".answer .text")).not_to_be_empty()
    expect(page.locator("#stop")).to_be_visible()
    assert said(sent[0]) == [("user", "Tell me of bees and wasps")]
    page.click("#new-chat")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator(".empty")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()


def test_the_model_is_chosen(visit: NewPage, slow: None) -> None:
    page = visit()
    sent = listed(page)
    choice = page.get_by_label("Model", exact=True)
    expect(choice).to_have_value(MODEL)
    choice.select_option(OTHER)
    answer = ask(page, "Tell me of bees")
    expect(answer.locator(".text")).not_to_be_empty()
    expect(answer.locator(".chip").last).to_contain_text("2..5")
    page.keyboard.press("Escape")
    expect(answer.locator(".timing")).to_contain_text(f"{OTHER} · first token")
    photograph(page, "chat-models")
    expect(page.get_by_role("article", name=f"Answer of {OTHER}")).to_have_count(1)
    assert [request["model"] for request in sent] == [OTHER]
