"""The dashboard in a browser, with the real model and daemons in separate processes.

Every test fails if the page logs an error or sends a request to another server. Screenshots are kept in `test-output/`.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser import NEEDED, browsing, photograph
from tests.e2e.daemons import Daemon, background, daemons
from tests.e2e.test_serve_command import KEY, ready

SPANS = [(0, 15), (15, 30), (15, 30)]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.timeout(240),
    NEEDED,
]


@pytest.fixture(scope="module")
def peers(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Daemons that a test may kill: one for the first half of the model, two for the second half."""
    with daemons(tmp_path_factory.mktemp("peers"), demo_checkpoint, SPANS, "--kv-memory", "128MiB") as running:
        yield running


@pytest.fixture(scope="module")
def server(peers: list[Daemon], demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that requires a key."""
    home = tmp_path_factory.mktemp("home")
    (home / "keys").write_text(f"{KEY}\n")
    run = home / "birds"
    run.mkdir()
    step = {"tokens": 100, "seconds": 0.5, "sent_bytes": 1_500_000, "received_bytes": 2_500_000, "joules": 4.0}
    held_out = {"step": 2, "eval_loss": 1.25, "eval_accuracy": 0.75}
    lines = [{"step": 1, "loss": 3.0, **step}, {"step": 2, "loss": 2.0, **step}, held_out]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--codec", "none", "--port", "0", "--api-key-file", str(home / "keys"), "--show-tuning", str(run))
    with background(home, "serve", str(demo_checkpoint), "--join", peers[0].address(), *options) as server:
        yield ready(server, demo_checkpoint.stem).removesuffix("v1")
        finished = server.stop(signal.SIGTERM)
    assert finished.code == 0


@dataclass
class Visitor:
    """A visitor with a browser."""

    page: Page
    origin: str

    def come(self, key: str | None = KEY) -> Page:
        """Opens the page, and enters the key, if any."""
        self.page.goto(self.origin)
        if key is not None:
            self.give(key)
            expect(self.page.locator("#connection")).to_have_text("live")
        return self.page

    def give(self, key: str) -> None:
        expect(self.page.locator("#key-dialog")).to_be_visible()
        self.page.fill("#key", key)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.keyboard.press("Enter")


Visit = Callable[..., Visitor]


@pytest.fixture
def visit(server: str) -> Iterator[Visit]:
    """Makes visitors of the server's page, with a screen size and a preferred theme."""
    # The browser logs replies like this one, from which the page learns that it needs a key.
    with browsing(server, "401 (Unauthorized)") as new:
        yield lambda **options: Visitor(new(**options), server)


def background_of(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_a_key_opens_the_page_and_stays_in_the_tab(visit: Visit) -> None:
    visitor = visit()
    page = visitor.come(key=None)
    expect(page.locator("#key-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#connection")).to_have_text("a key is needed")
    page.click("#key-button")
    visitor.give("wrong")
    expect(page.locator("#key-note")).to_contain_text("does not accept this key")
    visitor.give(KEY)
    expect(page.locator("#verdict")).to_have_text("Every block is served")
    expect(page.locator("#verdict-detail")).to_contain_text("Blocks 15..29 have more than one")
    expect(page.locator("#map .span")).to_have_count(3)
    expect(page.locator("#peers tr")).to_have_count(3)
    expect(page.locator("#peers")).to_contain_text("cpu, 32 bits")
    assert page.evaluate("[sessionStorage.getItem('api-key'), localStorage.getItem('api-key')]") == [KEY, None]
    page.reload()
    expect(page.locator("#map .span")).to_have_count(3)
    expect(page.locator("#key-dialog")).to_be_hidden()


def test_a_run_of_fine_tuning_is_shown(visit: Visit) -> None:
    page = visit().come()
    expect(page.locator("#tuning-title")).to_have_text("Fine-tuning: birds")
    expect(page.locator("#tuning-note")).to_have_text(
        "Step 2, loss 2.000; held-out loss 1.250, accuracy 75.0 % at step 2."
    )
    expect(page.locator("#tuning-cost")).to_have_text(
        "200 tokens/s; 200 tokens in 1.0 s; 3.0 MB sent, 5.0 received; 8.0 J at the peers."
    )
    expect(page.locator("#losses path").first).to_have_attribute("d", "M150.0 1.0L300.0 27.0")


def test_a_chat_shows_its_route_and_its_speed_and_can_be_stopped(visit: Visit) -> None:
    visitor = visit(theme="dark")
    page = visitor.come()
    visitor.ask("What is the capital of France? Answer in one word.")
    answer = page.locator(".answer")
    expect(answer.locator(".text")).to_contain_text("Paris")
    expect(answer.locator(".timing")).to_contain_text("tokens/s")
    expect(page.locator("#send")).to_be_visible()
    expect(answer.locator(".chip").first).to_contain_text("0..14")
    expect(answer.locator(".chip").last).to_have_text(re.compile("29$"))
    visitor.ask("Write a very long story about the sea.")
    second = answer.nth(1)
    expect(second.locator(".text")).not_to_be_empty()
    expect(page.locator("#routes .hop").nth(1)).to_be_visible()
    expect(page.locator("#running")).to_have_text("1")
    expect(page.locator("#map .busy").nth(1)).to_be_visible()
    photograph(page, "chat-dark")
    page.click("#stop")
    expect(second).to_contain_text("stopped")
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#send")).to_be_visible()


def test_the_page_fits_a_phone_in_both_themes(visit: Visit) -> None:
    visitor = visit(width=390, height=844, theme="dark")
    page = visitor.come()
    expect(page.locator("#map .span")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    dark = background_of(page)
    photograph(page, "phone-dark")
    page.click("#theme-button")
    assert page.get_attribute("html", "data-theme") == "light"
    light = background_of(page)
    photograph(page, "phone-light")
    page.click("#theme-button")
    page.reload()
    assert page.get_attribute("html", "data-theme") == "dark"
    assert background_of(page) == dark != light


@pytest.mark.parametrize("width", [800, 1280])
def test_the_table_of_peers_fits_its_column(visit: Visit, width: int) -> None:
    page = visit(width=width).come()
    expect(page.locator("#peers tr")).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown, table, chat = (page.locator(place).bounding_box() for place in (".peers", ".peers table", ".chat"))
    assert shown and table and chat
    assert shown["x"] + shown["width"] <= (chat["x"] if chat["x"] > shown["x"] else width)
    assert width < 1240 or table["width"] <= shown["width"]


def test_texts_of_peers_are_never_parsed_as_html(visit: Visit) -> None:
    """The texts are longer than a record allows: the page must not rely on checks of other parts."""
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    peer = {
        "key": evil,
        "short": evil,
        "state": "here",
        "state_s": 1.0,
        "serves": True,
        "address": evil,
        "start": 0,
        "end": 20,
        "moving_to": None,
        "device": evil,
        "weights": evil,
        "token_ms": 1.0,
        "token_joules": 0.25,
        "queue_ms": 0.0,
        "sessions": 1,
        "kv_free": 5,
        "delay_ms": 0.5,
        "version": evil,
    }
    hole = {"start": 20, "end": 30, "advice": f"blocks 20..29: `{evil}`"}
    link = {"codec": evil, "bytes_per_token": 1, "delay_ms": None, "via_client": False}
    route = {"hops": [{"peer": evil, "start": 0, "end": 20}], "links": [link, link]}
    answer = {
        "id": evil,
        "ended": False,
        "began_s": 1.0,
        "first_token_s": 0.5,
        "tokens": 2,
        "tokens_per_s": 2.0,
        "routes": [route],
    }
    snapshot = {
        "type": "snapshot",
        "at": 0.0,
        "version": "0",
        "model": evil,
        "num_blocks": 30,
        "problem": evil,
        "holes": [hole],
        "local_spans": [],
        "peers": [peer],
        "requests": {"running": 1, "waiting": 0},
        "tokens_per_s": 2.0,
        "history": [0.0, 2.0],
        "answers": [answer],
    }
    happened = {"type": "events", "events": [{"number": 1, "at": 0.0, "kind": evil, "text": evil}]}
    stream = "".join(f"data: {json.dumps(document)}\n\n" for document in (snapshot, happened))
    visitor = visit()
    told: dict[str, Any] = {"body": stream, "content_type": "text/event-stream"}
    visitor.page.route("**/dashboard/events", lambda asked: asked.fulfill(**told))
    page = visitor.come(key=None)
    for place in ("#peers .address", "#events span", "#map .span-name", ".hole code", "#routes .hop b", "#model"):
        expect(page.locator(place).first).to_contain_text("<img src=")
    assert page.locator("main img, main script").count() == 0
    assert page.title() == f"{evil}: blocks are missing"


def test_killed_peers_and_their_missing_blocks_are_shown_at_once(visit: Visit, peers: list[Daemon]) -> None:
    visitor = visit(height=1300)
    page = visitor.come()
    visitor.ask("Write a very long story about the sea.")
    expect(page.locator(".answer .chip").first).to_be_visible()  # A route that is not open yet cannot be repaired.
    # The twin that runs the end of the answer is killed, and the other one replaces it, although it may already run
    # some blocks.
    used = page.locator("#routes .hop b").last.inner_text()
    port = page.locator("#peers tr", has_text=used).locator(".address").inner_text().rpartition(":")[2]
    first, second = sorted(peers[1:], key=lambda daemon: f":{port} " not in f"{daemon.log} ".replace("\n", " "))
    first.stop(signal.SIGKILL)
    expect(page.locator("#peers tr.gone")).to_have_count(1, timeout=5000)
    expect(page.locator("#events .good").first).to_contain_text("a route is complete again")
    expect(page.locator("#verdict")).to_have_text("Every block is served")
    expect(page.locator(".answer .route-of")).not_to_contain_text(used)
    second.stop(signal.SIGKILL)
    expect(page.locator("#verdict")).to_have_text("15 of 30 blocks are served by nobody", timeout=5000)
    expect(page.locator(".hole")).to_contain_text("blocks 15..29 are served by nobody: start a peer with")
    expect(page.locator(".hole code")).to_contain_text("--blocks 15:30 --join /ip4/")
    expect(page.locator("#map .hole-band")).to_have_count(1)
    expect(page.locator("#peer-count")).to_have_text("1")
    photograph(page, "hole-light")
